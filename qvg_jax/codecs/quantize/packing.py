"""Packing of codes of 2, 3, 4 or 8 bits into bytes, consecutive channels together, the first one highest.

2 bits: c0<<6 | c1<<4 | c2<<2 | c3. 4 bits: c0<<4 | c1. 8 bits: the codes. 3 bits: eight codes fill
24 bits, c0 in the highest, stored as three bytes, the highest first. This is the layout of the
official QVG kernels for 2 and 4 bits.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8

__all__ = ["BITS", "pack", "packed_width", "unpack"]

BITS = (2, 3, 4, 8)

# Codes that fill whole bytes together, and how many bytes that is.
_UNIT = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}


def packed_width(channels: int, bits: int) -> int:
    """Returns the bytes that `channels` codes of `bits` bits take.

    Args:
        channels: number of codes; a multiple of 4, 8, 2, 1 for 2, 3, 4, 8 bits.
        bits: 2, 3, 4 or 8.

    Raises:
        ValueError: other bits, or channels that do not fill whole bytes.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits} is not accepted: give 2, 3, 4 or 8")
    codes, nbytes = _UNIT[bits]
    if channels % codes:
        raise ValueError(
            f"head_dim={channels} does not fill whole bytes at bits={bits}; "
            f"accepted: a multiple of {codes}"
        )
    return channels // codes * nbytes


def pack(codes: UInt8[Array, "*lead D"], bits: int) -> UInt8[Array, "*lead C"]:
    """Packs codes below 2**bits along the last axis; the inverse of `unpack`."""
    *lead, d = codes.shape
    width = packed_width(d, bits)
    n, nbytes = _UNIT[bits]
    if bits == 8:
        return codes
    codes = _whole(codes).reshape(*lead, d // n, n)
    word_dtype = jnp.uint8 if nbytes == 1 else jnp.uint32
    word = jnp.zeros((*lead, d // n), word_dtype)
    for i in range(n):
        word |= codes[..., i].astype(word_dtype) << word_dtype(bits * (n - 1 - i))
    if nbytes == 1:
        return word
    parts = [(word >> word_dtype(8 * (nbytes - 1 - j))).astype(jnp.uint8) for j in range(nbytes)]
    return jnp.stack(parts, axis=-1).reshape(*lead, width)


def unpack(packed: UInt8[Array, "*lead C"], bits: int) -> UInt8[Array, "*lead D"]:
    """Returns codes from their packed bytes; the inverse of `pack`.

    Decoding runs at every attention read, so its speed counts. Measured on two CPU cores inside a
    whole QVG decode (12 x 1536 x 128), G elements/s: shifting each field out and stacking them
    2.2 to 3.2; gathering four values per byte from a 256-entry table 0.9 to 2.5; shifting by a
    broadcast [6, 4, 2, 0] axis 0.9; spreading a byte over a uint32 and bitcasting 1.5 to 2.0.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits} is not accepted: give 2, 3, 4 or 8")
    *lead, width = packed.shape
    n, nbytes = _UNIT[bits]
    if bits == 8:
        return packed
    word = packed
    if nbytes > 1:
        parts = packed.reshape(*lead, width // nbytes, nbytes).astype(jnp.uint32)
        word = jnp.zeros(parts.shape[:-1], jnp.uint32)
        for j in range(nbytes):
            word |= parts[..., j] << jnp.uint32(8 * (nbytes - 1 - j))
    mask = word.dtype.type(2**bits - 1)
    fields = [(word >> word.dtype.type(bits * (n - 1 - i))) & mask for i in range(n)]
    codes = jnp.stack(fields, axis=-1).astype(jnp.uint8)
    return _whole(codes.reshape(*lead, width // nbytes * n))


def _whole(codes: Array) -> Array:
    """Returns the codes; on a CPU, XLA computes them once and keeps them.

    Fused with their neighbours, every code is computed once per byte field while packing (5.3 ms
    instead of 0.8 for 12 x 1536 x 128) and 3-bit codes field by field while unpacking (0.3 G
    elements/s instead of 1.5). A GPU fuses well and would only pay for the extra traffic.
    """
    return lax.platform_dependent(codes, cpu=lax.optimization_barrier, default=lambda c: c)
