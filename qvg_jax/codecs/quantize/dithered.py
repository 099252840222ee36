"""Quantization with a dither that is known from the place of a value and subtracted when it is read.

Tokens that show the same thing in many frames are alike, and a fixed grid gives them the same error in
each: attention averages over such tokens, but their error does not average out. Here the grid of every
token is shifted by a known share of a step, so that the errors of like tokens differ and cancel.

Axes: B batch, H heads, T tokens, D head dim, C code bytes of one token.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, PRNGKeyArray, UInt8, UInt32

from qvg_jax.codecs.base import Codec, EmptyState, Shape, check_span, per_element
from qvg_jax.codecs.quantize.packing import pack, packed_width, unpack
from qvg_jax.codecs.quantize.scales import (
    load_scale,
    scale_format,
    span_exponent,
    store_scale,
    times_power_of_two,
)
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import Storage

__all__ = ["DitheredPacked", "dither", "dithered_quantize"]

_BITS = (2, 3, 4)
_FINE = 64  # shifts of a grid: a 2-bit code and its dither together are one byte
_TOKEN_STEP = 0x63DE254D  # of 2^32: near 0.39, see `dither`
_CHANNEL_STEP = 37


class DitheredPacked(NamedTuple):
    """The packed form of `dithered_quantize`; `zeros_BHT1` is None without zero points."""

    codes_BHTC: UInt8[Array, "B H T C"]
    scales_BHT1: Float[Array, "B H T 1"]
    zeros_BHT1: Float[Array, "B H T 1"] | None
    exponents_BH: Int8[Array, "B H"]
    deviations_BHD: Float[Array, "B H D"]


def dither(tokens: int, head_dim: int) -> UInt32[Array, "T D"]:
    """Returns the dither j of every token t and channel c of a span, in 64ths of a step, 0 to 63.

    j = ((t A mod 2^32) >> 26) + 37 c, modulo 64. Multiples of A / 2^32 modulo 1 fall evenly into the
    unit interval, so that errors of like tokens do not only differ, but cancel sooner than independent
    ones would. A was searched for: over 34 strides between such tokens (1, rows of 6 to 104
    patches, frames of 24 to 6,240) and 2 to 48 of them, the energy of their mean error is 0.37 of that of
    independent errors on average and 1.4 at most. (The golden ratio: 0.56 and 4.4.)
    """
    t_T = jnp.arange(tokens, dtype=jnp.uint32) * jnp.uint32(_TOKEN_STEP) >> jnp.uint32(26)
    c_D = jnp.arange(head_dim, dtype=jnp.uint32) * jnp.uint32(_CHANNEL_STEP)
    return (t_T[:, None] + c_D) % jnp.uint32(_FINE)


@factory
def dithered_quantize(
    bits: int = 2, *, zero_points: bool = False, reach: float | None = None
) -> Codec:
    """Rounds each token to n = 2^bits even levels that are shifted by a known dither.

    Channels are first divided by their deviations w, the mean magnitude over the span, so that no
    loud channel sets the step of the others. Then, per token, with y = x / w and the dither j:
        without zero points: m = 0,                 scale = 2 max |y| / reach
        with zero points:    m = (max y + min y)/2, scale = (max y - min y) / reach
        code = round((y - m) / scale + (n - 1) / 2 + 1 / 2 - (j + 1/2) / 64), in 0 .. n - 1
        x_hat = w (m + scale ((64 code + j) / 64 - n / 2 + 1 / 128))
    With 2 bits 64 code + j is one byte k, and x_hat = w (m + (scale / 64) (k - 127.5)).

    The error is spread evenly over a step, whatever x is, so there is no gain to correct: x_hat is
    right on average, over tokens with the same x. It is up to half a step in all of the range that
    all shifts reach, n - 1 steps. With the default reach the ends of a token are 3/8 of a step (1/4
    with zero points) further out, so that a token's largest value can be off by 7/8 (3/4) of a step at
    2 bits, for some shifts of the grid. Nothing else clips: scales follow the largest value, and
    with the power of two that is kept for each head and span they hold up to 1e36.

    Decode, per element: unpack (a shift), a bit field that is the sum of a constant of the channel and
    one of the token (an addition per four elements, which fit a register as bytes), convert, one
    multiply-add, and the product with w: for V once per query after the weighted sum, for K before RoPE
    or with its cosines and sines.

    An all-zero token decodes to m = 0. What is not finite: a NaN is stored as the code nearest zero, an
    infinity as the largest or smallest code, and neither counts for scale, zero point and deviations.

    Args:
        bits: 2, 3 or 4.
        zero_points: whether a token also has a middle m of its own, stored as what code 0 stands for
            without dither, m - scale (n - 1) / 2.
        reach: steps from the smallest to the largest value of a token (without zero points: between
            plus and minus the largest magnitude), n - 1 to n + 1. At n - 1 no error is ever larger than half a
            step; at more, steps are finer and the ends of the range fall short. None is n - 1/4, and
            n - 1/2 with zero points, where measured errors of attention are least.

    Returns:
        A stateless codec. Per token it stores D codes and an e4m3 scale (and zero point); per head and span
        D deviations in bfloat16 and a power of two.

    Raises:
        ValueError: an argument outside its set; on use, codes that do not fill whole bytes.

    Source: subtractive dither: L. Schuchman, "Dither signals and their effect on quantization noise"
    (IEEE Trans. Commun. 1964). Its sequence is this library's.
    """
    if bits not in _BITS:
        raise ValueError(f"bits={bits} is not accepted: give 2, 3 or 4")
    n = 2**bits
    reach = (n - 0.5 if zero_points else n - 0.25) if reach is None else reach
    if not n - 1 <= reach <= n + 1:
        raise ValueError(f"reach={reach} is not accepted: give {n - 1} to {n + 1} at bits={bits}")
    middle, e4m3 = (n - 1) / 2, scale_format("e4m3")

    def check(shape: Shape, dtype: Any = jnp.float32) -> None:
        check_span(shape, dtype)
        packed_width(shape[3], bits)

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> EmptyState:
        check(shape, dtype)
        return EmptyState()

    def shift(shape: Shape) -> Array:
        """Returns what is added to a code: (j + 1/2) / 64 - 1/2 of every token and channel."""
        return (dither(shape[2], shape[3]).astype(jnp.float32) + 0.5) / _FINE - 0.5

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[DitheredPacked, EmptyState]:
        del key  # the dither is deterministic
        check(x_BHTD.shape, x_BHTD.dtype)
        x_BHTD = jnp.where(jnp.isnan(x_BHTD), 0, x_BHTD).astype(jnp.float32)
        finite_BHTD = jnp.isfinite(x_BHTD)
        known_BHTD = jnp.where(finite_BHTD, x_BHTD, 0)
        w_BHD = jnp.sum(jnp.abs(known_BHTD) / x_BHTD.shape[2], axis=2).astype(jnp.bfloat16)
        w_BH1D = w_BHD.astype(jnp.float32)[:, :, None]
        y_BHTD = x_BHTD / jnp.where(w_BH1D > 0, w_BH1D, 1)
        inside_BHTD = jnp.where(finite_BHTD, y_BHTD, 0)
        exponent_BH = span_exponent(inside_BHTD)
        inside_BHTD = times_power_of_two(inside_BHTD, -exponent_BH)
        if zero_points:
            low_BHT1 = jnp.min(inside_BHTD, 3, keepdims=True, where=finite_BHTD, initial=1)
            high_BHT1 = jnp.max(inside_BHTD, 3, keepdims=True, where=finite_BHTD, initial=-1)
            size_BHT1 = jnp.maximum(high_BHT1 - low_BHT1, 0) / reach
        else:
            size_BHT1 = 2 * jnp.max(jnp.abs(inside_BHTD), 3, keepdims=True) / reach
        scales_BHT1, exponents_BH, scale_BHT1 = store_scale(size_BHT1, exponent_BH, e4m3)
        zeros_BHT1, m_BHT1 = None, jnp.zeros_like(scale_BHT1)
        if zero_points:
            center_BHT1 = jnp.where(high_BHT1 >= low_BHT1, (low_BHT1 + high_BHT1) / 2, 0)
            zero_BHT1 = center_BHT1 - middle * scale_BHT1
            zeros_BHT1, _, zero_BHT1 = store_scale(zero_BHT1, exponent_BH, e4m3)
            m_BHT1 = zero_BHT1 + middle * scale_BHT1
        y_BHTD = times_power_of_two(y_BHTD, -exponent_BH)
        u_BHTD = (y_BHTD - m_BHT1) / jnp.where(scale_BHT1 > 0, scale_BHT1, 1)
        u_BHTD = jnp.where(scale_BHT1 > 0, u_BHTD, 0) + (middle + 0.5)
        codes_BHTD = jnp.clip(jnp.floor(u_BHTD - shift(x_BHTD.shape)), 0, n - 1)
        codes_BHTC = pack(codes_BHTD.astype(jnp.uint8), bits)
        return DitheredPacked(codes_BHTC, scales_BHT1, zeros_BHT1, exponents_BH, w_BHD), state

    def decode(packed: DitheredPacked, dtype: Any = jnp.bfloat16) -> Array:
        codes_BHTD = unpack(packed.codes_BHTC, bits).astype(jnp.float32)
        scale_BHT1 = load_scale(packed.scales_BHT1, packed.exponents_BH)
        y_BHTD = (codes_BHTD + (shift(codes_BHTD.shape) - middle)) * scale_BHT1
        if packed.zeros_BHT1 is not None:
            zero_BHT1 = load_scale(packed.zeros_BHT1, packed.exponents_BH)
            y_BHTD += zero_BHT1 + middle * scale_BHT1
        return (y_BHTD * packed.deviations_BHD.astype(jnp.float32)[:, :, None]).astype(dtype)

    def nbytes(shape: Shape) -> int:
        check(shape)
        b, h, t, d = shape
        return b * h * (t * (packed_width(d, bits) + 1 + zero_points) + 2 * d + 1)

    def deficit(packed: DitheredPacked) -> Array:
        """Returns v - v_hat of `key_bias`: -step^2 / 12, as the error does not depend on the key."""
        square_BH = jnp.mean(jnp.square(packed.deviations_BHD.astype(jnp.float32)), axis=2)
        scale_BHT = load_scale(packed.scales_BHT1, packed.exponents_BH)[..., 0]
        return -square_BH[..., None] * jnp.square(scale_BHT) / 12

    name = f"dithered{bits}" + ("-asym" if zero_points else "")
    storage = Storage("dithered levels")
    return Codec(init, encode, decode, per_element(nbytes), name, nbytes, storage, deficit)
