"""Device memory of the parts that several models have, from shapes and from compiled programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.umt5.config import UMT5Config
from models.umt5.params import WEIGHTS as TEXT_WEIGHTS
from models.umt5.pipeline import encode
from qvg_jax.app.memory_plan import Need, shape_bytes, temporary_bytes


def text_encoder_bytes(config: UMT5Config, slots: int, prompts: int = 1) -> int:
    """Weights and temporaries of the text encoder on prompts of so many tokens."""
    model = TEXT_WEIGHTS.skeleton(config)
    ids = jax.ShapeDtypeStruct((prompts, slots), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, jnp.bool_)
    return shape_bytes(model) + temporary_bytes(encode, model, ids, mask)


def text_kv_bytes(config: Any, rows: int, prompts: int = 1) -> int:
    """Keys and values of prompts for the cross-attention of all layers of a transformer."""
    return 2 * config.layers * prompts * rows * config.width * jnp.dtype(config.dtype).itemsize


def with_decoder(
    name: str, held: dict[str, int], block: int, past: int, decoding: int, *, last: bool
) -> Need:
    """The memory needs of an arm whose blocks a VAE decodes.

    Args:
        name: of the arm.
        held: bytes of what is there all the time, but for the decoder's past.
        block, decoding: temporaries of the program that makes a block, and of the decoder.
        past: what the decoder keeps from one call to the next.
        last: whether it is called when all latents are made and the cache is gone.
    """
    busy = {"a block": block}
    if last:
        instead = {"decoding": past + decoding}
        return Need(name=name, held=held, temporaries=busy, in_place_of_cache=instead)
    held = held | {"decoded past": past}
    return Need(name=name, held=held, temporaries=busy | {"decoding": decoding})


def most(fits: Callable[[int], bool], top: int) -> int:
    """The largest number up to `top` that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
