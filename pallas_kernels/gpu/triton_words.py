"""Functions that several Triton kernels call: e4m3 numbers, and the rotation of a pair of channels.

e4m3 is converted by integer arithmetic, which every GPU has; instructions for it came with Ada.

Format of e4m3 (Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433): exponents of 4 bits, 7 at
one; mantissas of 3 bits; numbers below 2^-6 are multiples of 2^-9.
"""

import triton
import triton.language as tl

__all__ = ["e4m3_byte", "e4m3_float", "e4m3_signed", "rotate"]


@triton.jit
def e4m3_float(byte):
    """Positive e4m3 numbers as float32."""
    bits = byte.to(tl.int32)
    normal = ((bits << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(bits < 8, bits.to(tl.float32) * 0.001953125, normal)


@triton.jit
def e4m3_signed(byte):
    """e4m3 numbers of either sign as float32."""
    bits = byte.to(tl.int32)
    size = e4m3_float(bits & 127)
    return tl.where(bits > 127, -size, size)


@triton.jit
def e4m3_byte(x):
    """The nearest e4m3 number, half to even, of float32 numbers from 0 to 448, as int32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # 2^23 + n has n in its last bits.
    small = (x * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 15
    return tl.where(x < 0.015625, small, normal)


@triton.jit
def rotate(a, b, cos, sin):
    """The two channels of every pair, rotated."""
    return a * cos - b * sin, a * sin + b * cos
