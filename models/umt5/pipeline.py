"""The text encoder for as long as a prompt takes: load, encode, release the memory."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.umt5.config import UMT5Config
from models.umt5.modeling import UMT5
from models.umt5.params import load_umt5
from models.umt5.tokenizer import Tokenizer, Tokens


def drop(module: nnx.Module) -> None:
    """Frees the device memory of all arrays of `module`, which cannot be used any more."""
    for x in jax.tree.leaves(module):
        if isinstance(x, jax.Array) and not x.is_deleted():
            x.delete()


@contextlib.contextmanager
def borrow_umt5(
    source: str | Path | Iterable[str | Path],
    config: UMT5Config,
    *,
    device: jax.Device | jax.sharding.Sharding | None = None,
) -> Iterator[UMT5]:
    """Loads the encoder for the body of a `with`, and frees its memory after it, whatever happens.

    Args: see `load_umt5`.
    """
    model = load_umt5(source, config, device=device)
    try:
        yield model
    finally:
        drop(model)


@jax.jit
def encode(model: UMT5, ids_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> Array:
    """`UMT5.encode`, jitted: as it runs, and to ask for its memory."""
    return model.encode(ids_BT, mask_BT)


def encode_tokens(model: UMT5, tokens: Tokens) -> Float[Array, "B T C"]:
    """Embeddings of padded prompts, 0 in the padding.

    Raises:
        ValueError: an id outside the vocabulary: the tokenizer is not the one of these weights.
    """
    top = int(tokens.ids_BT.max(initial=0))
    if top >= model.config.vocabulary or tokens.ids_BT.min(initial=0) < 0:
        raise ValueError(
            f"token id {top} is outside the vocabulary of {model.config.vocabulary}: the tokenizer "
            "does not belong to these weights"
        )
    return encode(model, *tokens)


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    source: str | Path | Iterable[str | Path],
    config: UMT5Config,
    *,
    device: jax.Device | jax.sharding.Sharding | None = None,
) -> Float[Array, "B T C"]:
    """Loads the encoder, encodes `prompts`, and frees the encoder's memory.

    Args:
        prompts: texts as the user wrote them.
        tokenizer: turns them into ids; decides T.
        source: checkpoint, see `load_umt5`.
        config: structure and dtype of the encoder.
        device: where the encoder runs; default: JAX's default device.

    Returns:
        Embeddings in `config.dtype`, 0 after each prompt's end.
    """
    tokens = tokenizer(prompts)  # before the weights: a missing package should not cost a load
    with borrow_umt5(source, config, device=device) as model:
        return jax.block_until_ready(encode_tokens(model, tokens))
