"""Packing of codes with any number of levels up to 16 (or 256) into bytes.

Powers of two above two take the layout of `packing`. Otherwise a byte holds as many base-n digits
as fit, the first one highest: 8 of base 2, 5 trits (3^5 = 243), 3 of base 5 or 6 (6^3 = 216).
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

from qvg_jax.codecs.quantize.packing import pack, packed_width, unpack

__all__ = ["LEVEL_COUNTS", "code_bits", "pack_levels", "packed_levels_width", "unpack_levels"]

LEVEL_COUNTS = (*range(2, 17), 256)

_DIGITS = {2: 8, 3: 5, 5: 3, 6: 3}  # base -> digits in a byte
_BITS = {4: 2, 256: 8} | dict.fromkeys(range(7, 9), 3) | dict.fromkeys(range(9, 17), 4)


def code_bits(levels: int) -> int | None:
    """Returns the bits of a code below `levels`, or None where codes are digits that share a byte."""
    if levels in _DIGITS:
        return 1 if levels == 2 else None
    return _BITS[levels]


def packed_levels_width(channels: int, levels: int) -> int:
    """Returns the bytes that `channels` codes below `levels` take; a last byte may be partly empty.

    Args:
        channels: number of codes.
        levels: 2 to 16, or 256.

    Raises:
        ValueError: another number of levels, or one of a whole number of bits (4, 7 and more)
            whose codes do not fill whole bytes.
    """
    if levels not in LEVEL_COUNTS:
        raise ValueError(f"levels={levels} is not accepted: give 2 to 16, or 256")
    if levels in _DIGITS:
        return -(-channels // _DIGITS[levels])
    return packed_width(channels, _BITS[levels])


def pack_levels(codes: UInt8[Array, "*lead D"], levels: int) -> UInt8[Array, "*lead C"]:
    """Packs codes below `levels` along the last axis; the inverse of `unpack_levels`."""
    *lead, d = codes.shape
    width = packed_levels_width(d, levels)
    if levels not in _DIGITS:
        return pack(codes, _BITS[levels])
    n = _DIGITS[levels]
    codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, width * n - d)]).reshape(*lead, width, n)
    word = codes[..., 0]
    for i in range(1, n):
        word = word * jnp.uint8(levels) + codes[..., i]
    return word


def unpack_levels(
    packed: UInt8[Array, "*lead C"], levels: int, channels: int
) -> UInt8[Array, "*lead D"]:
    """Returns the first `channels` codes of packed bytes.

    Digit i of n is byte // base^(n-1-i) mod base: per element a multiplication and a shift in
    place of the division, and a multiply-subtract for the remainder (a shift and a mask at base 2).
    """
    if levels not in _DIGITS:
        return unpack(packed, _BITS[levels])
    n = _DIGITS[levels]
    digits = [packed // jnp.uint8(levels ** (n - 1 - i)) % jnp.uint8(levels) for i in range(n)]
    codes = jnp.stack(digits, axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * n)
    return codes[..., :channels]
