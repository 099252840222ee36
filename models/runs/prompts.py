"""Prompts as a transformer reads them: by umT5, or, without weights, by a stand-in."""

import hashlib
import unicodedata
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from models.runs.checkpoint_folder import Parts
from models.umt5 import PromptTooLongWarning, Tokenizer
from models.umt5.config import UMT5Config
from models.umt5.pipeline import borrow_umt5, encode_tokens
from qvg_jax.errors import told_to_user


class Embedded(NamedTuple):
    """Embeddings of prompts."""

    text_BUE: Float[Array, "B U E"]  # 0 after each prompt's end
    mask_BU: Bool[np.ndarray, "B U"]  # true up to it
    said: list[str]  # warnings for the user: what of a prompt that is too long was cut off


def embed_prompts(
    prompts: Sequence[str], parts: Parts, config: UMT5Config, *, slots: int
) -> Embedded:
    """Embeddings by umT5, whose memory is free again afterwards.

    Args:
        prompts: texts as the user wrote them.
        parts: where tokenizer and text encoder are.
        config: of the text encoder.
        slots: tokens of a prompt, U.

    Raises:
        UserError: the tokenizer's package is not installed, or its file is not readable.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromptTooLongWarning)
        with told_to_user():
            tokens = Tokenizer.from_file(parts.tokenizer, length=slots)(prompts)
    said = [str(w.message) for w in caught if issubclass(w.category, PromptTooLongWarning)]
    with borrow_umt5(parts.text, config) as model:
        text_BUE = jax.block_until_ready(encode_tokens(model, tokens))
    return Embedded(text_BUE, tokens.mask_BT, said)


def stand_in_embedding(prompt: str, *, slots: int, width: int, dtype: DTypeLike) -> Embedded:
    """One vector of normal noise for each word, drawn from the word's letters; no padding.

    For random weights, where no tokenizer and no meaning are to be had: the same word always gives
    the same row, so another prompt gives another video, on every machine.

    Args:
        prompt: the text; none is one word without letters.
        slots: words that are read at most.
        width: of the embedding, E.
        dtype: of the embedding.
    """
    # Unlike a tokenizer, letters need no repair: no package is wanted for it.
    words = unicodedata.normalize("NFC", prompt).split() or [""]
    said = []
    if len(words) > slots:
        cut = " ".join(words[slots:])
        said.append(
            f"the prompt has {len(words)} words, at most {slots} are used; cut off: {cut!r}"
        )
    rows = []
    for word in words[:slots]:
        letters = word.encode("utf-8", "surrogatepass")  # also what a terminal could not decode
        seed = int.from_bytes(hashlib.sha256(letters).digest()[:8], "little")
        rows.append(np.random.default_rng(seed).standard_normal(width, np.float32))
    text_BUE = jnp.asarray(np.stack(rows)[None], dtype)
    return Embedded(text_BUE, np.ones(text_BUE.shape[:2], bool), said)
