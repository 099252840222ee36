"""A prompt as the transformer reads it: by umT5, or, without weights, by a stand-in."""

import hashlib
import warnings

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.self_forcing.config import SelfForcingConfig
from models.self_forcing.parts import Parts, Sizes
from models.umt5 import PromptTooLongWarning, Tokenizer, clean_prompt, encode_prompts


def embed_prompt(
    prompt: str, parts: Parts, sizes: Sizes
) -> tuple[Float[Array, "1 U E"], list[str]]:
    """The embedding of a prompt; the text encoder's memory is free again afterwards.

    Returns:
        The embedding, 0 after the prompt's end, and warnings for the user: what of a prompt that
        is too long was cut off.

    Raises:
        ValueError: the tokenizer's package is not installed, or its file is not readable.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromptTooLongWarning)
        try:
            tokenizer = Tokenizer.from_file(parts.tokenizer, length=sizes.dit.text_slots)
            text_BUE = encode_prompts([prompt], tokenizer, parts.text, sizes.text)
        except ImportError as error:
            raise ValueError(str(error)) from error
    said = [str(w.message) for w in caught if issubclass(w.category, PromptTooLongWarning)]
    return text_BUE, said


def stand_in_embedding(
    prompt: str, config: SelfForcingConfig
) -> tuple[Float[Array, "1 U E"], list[str]]:
    """One vector of normal noise for each word, drawn from the word's letters.

    For random weights, where no tokenizer and no meaning are to be had: the same word always gives
    the same row, so another prompt gives another video, on every machine.

    Returns:
        The embedding and warnings, as `embed_prompt`.
    """
    words = clean_prompt(prompt).split() or [""]
    said = []
    if len(words) > config.text_slots:
        cut = " ".join(words[config.text_slots :])
        said.append(
            f"the prompt has {len(words)} words, at most {config.text_slots} are used; "
            f"cut off: {cut!r}"
        )
    rows = []
    for word in words[: config.text_slots]:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        rows.append(np.random.default_rng(seed).standard_normal(config.text_width, np.float32))
    return jnp.asarray(np.stack(rows)[None], config.dtype), said
