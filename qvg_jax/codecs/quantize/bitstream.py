"""Codes of 1 to 8 bits one after another in a stream of bytes, highest bits first.

For small side information of any length; `packing` and `radix` hold the codes of tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

__all__ = ["pack_bits", "packed_bits_width", "unpack_bits"]


def packed_bits_width(count: int, bits: int) -> int:
    """Returns the bytes that `count` codes take; the last byte may be partly empty.

    Raises:
        ValueError: bits outside 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} is not accepted: give 1 to 8")
    return -(-count * bits // 8)


def pack_bits(codes: UInt8[Array, "*lead N"], bits: int) -> UInt8[Array, "*lead C"]:
    """Packs codes below 2**bits along the last axis; the inverse of `unpack_bits`."""
    *lead, count = codes.shape
    width = packed_bits_width(count, bits)
    place = jnp.arange(bits - 1, -1, -1, dtype=jnp.uint8).reshape((1,) * (len(lead) + 1) + (bits,))
    stream = ((codes[..., None] >> place) & jnp.uint8(1)).reshape(*lead, count * bits)
    stream = jnp.pad(stream, [(0, 0)] * len(lead) + [(0, width * 8 - count * bits)])
    return _bytes(stream.reshape(*lead, width, 8))


def unpack_bits(packed: UInt8[Array, "*lead C"], bits: int, count: int) -> UInt8[Array, "*lead N"]:
    """Returns the first `count` codes of packed bytes."""
    *lead, width = packed.shape
    place = jnp.arange(7, -1, -1, dtype=jnp.uint8).reshape((1,) * (len(lead) + 1) + (8,))
    stream = ((packed[..., None] >> place) & jnp.uint8(1)).reshape(*lead, width * 8)
    return _bytes(stream[..., : count * bits].reshape(*lead, count, bits))


def _bytes(fields: Array) -> Array:
    n = fields.shape[-1]
    weight = (jnp.uint8(1) << jnp.arange(n - 1, -1, -1, dtype=jnp.uint8)).reshape(
        (1,) * (fields.ndim - 1) + (n,)
    )
    return jnp.sum(fields * weight, axis=-1, dtype=jnp.uint8)
