"""Bits and bytes of packed spans: what a codec promises, and what its buffers really take.

Bits per element come from the storage formats; `packed_bytes` asks the buffers. Tests hold the two
equal, so a compression ratio is never a claim about formats alone.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from qvg_jax.codecs.base import Codec, Packed, Shape
from qvg_jax.errors import wrong_kind

__all__ = ["bits_per_element", "compression_ratio", "packed_bytes", "pair_bits"]


def _span(shape: Shape) -> Shape:
    """Returns (B, H, T, D): (T, D) is taken as one head of one batch element."""
    return (1, 1, *shape) if len(shape) == 2 else tuple(shape)


def bits_per_element(codec: Codec, shape: Shape) -> float:
    """Returns the bits that `codec` stores per element of a span, everything included.

    8 * bytes(codes, scales, zero points, ids, centroids) / (B H T D).

    Args:
        codec: any codec.
        shape: (B, H, T, D), or (T, D) for one head.

    Returns:
        Bits per element.

    Raises:
        TypeError: the codec is none.
        ValueError: the codec does not accept the shape.
    """
    if not isinstance(codec, Codec):
        raise wrong_kind("codec", codec, "a Codec, as qvg.presets.get(NAME) returns it")
    return codec.bits_per_element(_span(shape))


def pair_bits(pair: tuple[Codec, Codec], shape: Shape) -> float:
    """Returns the bits per element of K and V together: the mean over (key codec, value codec)."""
    return sum(codec.bits_per_element(_span(shape)) for codec in pair) / 2  # or codecs of layers


def compression_ratio(codec: Codec, shape: Shape, dtype: Any = jnp.bfloat16) -> float:
    """Returns how many times smaller a packed span is than the same span in `dtype`.

    Args:
        codec: any codec.
        shape: (B, H, T, D), or (T, D) for one head.
        dtype: what the uncompressed cache holds.

    Returns:
        bits of `dtype` / bits per element.
    """
    return 8 * jnp.dtype(dtype).itemsize / bits_per_element(codec, shape)


def packed_bytes(packed: Packed) -> int:
    """Returns the bytes that the arrays of a pytree take on their device.

    Args:
        packed: pytree of arrays. Tracers and `jax.ShapeDtypeStruct`s have no buffer; theirs is
            size times item size.

    Returns:
        Bytes, summed over the leaves.
    """
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(packed))


def _leaf_bytes(leaf: Any) -> int:
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
        return leaf.on_device_size_in_bytes()
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
