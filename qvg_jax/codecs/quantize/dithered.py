"""Quantization with a dither that is known from the place of a value and subtracted when it is read.

Tokens that show the same thing in many frames are alike, and a fixed grid gives them the same error in
each: attention averages over such tokens, but their error does not average out. Here the grid of every
token is shifted by a known share of a step, so that the errors of like tokens differ and cancel.

Axes: B batch, H heads, T tokens, D head dim, C code bytes of one token.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, PRNGKeyArray, UInt8

from qvg_jax.codecs.base import Codec, EmptyState, Shape, check_span, per_element
from qvg_jax.codecs.quantize.grid import power_of_gain
from qvg_jax.codecs.quantize.packing import pack, packed_width, unpack
from qvg_jax.codecs.quantize.scales import (
    load_scale,
    scale_format,
    span_exponent,
    store_scale,
    times_power_of_two,
)
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import DitheredFit, Levels, Storage

__all__ = ["DitheredPacked", "channel_sizes", "dithered_quantize"]

_BITS = (2, 3, 4)


class DitheredPacked(NamedTuple):
    """The packed form of `dithered_quantize`; `zeros_BHT1`, the middles, is None unless it is asymmetric."""

    codes_BHTC: UInt8[Array, "B H T C"]
    scales_BHT1: Float[Array, "B H T 1"]
    zeros_BHT1: Float[Array, "B H T 1"] | None
    exponents_BH: Int8[Array, "B H"]
    deviations_BHD: Float[Array, "B H D"]


@factory
def dithered_quantize(
    bits: int = 2,
    *,
    asymmetric: bool = False,
    reach: float | None = None,
    gain: str | float = "match",
) -> Codec:
    """Rounds each token to n = 2^bits even levels that are shifted by a known dither.

    Channels are first divided by their deviations w, the mean magnitude over the span, so that no
    loud channel sets the step of the others. Then, per token, with y = x / w and the dither j:
        symmetric:  m = 0,                   step = 2 max |y| / reach
        asymmetric: m = (max y + min y) / 2, step = (max y - min y) / reach
        l_c = (64 c + j - 32 n + 1/2) / 64                  the level of code c, in steps
        code = the c in 0 .. n - 1 with l_c nearest to (y - m) / step
        x_hat = w (m + scale l_code)
    With 2 bits 64 code + j is one byte k, and x_hat = w (m + (scale / 64) (k - 127.5)).

    The scale that is stored is, with l the token's levels and a = <y - m, l>,
        gain "none":  the step
        gain "lsq":   a / <l, l>, least squares
        gain "match": |y - m|^2 / a, so that <y - m, y_hat - m> is |y - m|^2
        gain p:       lsq^(1 - p) match^p
    The dither's error does not depend on what is quantized, so the step itself is right on average and
    "match" moves it by the little that ends fall short. Least squares shrinks, which makes errors
    smaller and keys milder: better where few keys matter, worse where many do.

    Errors are at most half a step in the n - 1 steps that every shift of the grid reaches. With the
    default reach the ends of a token lie 3/8 of a step (asymmetric: 1/4) outside of that, and rounding
    the step to e4m3 moves them by up to 1/16, so a token's largest value can be off by up to a step
    at 2 bits; on average it falls short by 1/14 (1/32) of one. Nothing else clips: scales follow the
    largest value, and with the power of two of each head and span they hold up to 1e36.

    Decode, per element: unpack (a shift), a bit field that is the sum of a constant of the channel and
    one of the token (an addition per four elements, which fit a register as bytes), convert, one
    multiply-add, and the product with w: for V once per query after the weighted sum, for K before RoPE
    or with its cosines and sines.

    An all-zero token decodes to m = 0. What is not finite: a NaN is stored as the code nearest zero, an
    infinity as the largest or smallest code, and neither counts for scale, middle and deviations.

    Args:
        bits: 2, 3 or 4.
        asymmetric: whether a token also has a middle m of its own; another byte per token.
        reach: steps from the smallest to the largest value of a token (symmetric: between plus and minus
            the largest magnitude), n - 1 to n + 1. At n - 1 no end falls short, but for the rounding of
            the step; at more, steps are finer and ends fall short for some shifts. None is n - 1/4,
            and n - 1/2 if asymmetric, near the least errors of attention measured.
        gain: "none", "lsq", "match", or p, where 0 is lsq and 1 match.

    Returns:
        A stateless codec. Per token it stores D codes and an e4m3 scale (and middle); per head and span
        D deviations in bfloat16 and a power of two.

    Raises:
        ValueError: an argument outside its set; on use, codes that do not fill whole bytes.

    Source: subtractive dither: L. Schuchman, "Dither signals and their effect on quantization noise"
    (IEEE Trans. Commun. 1964). Its sequence is this library's.
    """
    # Here, for importing this library loads no kernel.
    from pallas_kernels.dequantize.dither import FINE, dither

    if bits not in _BITS:
        raise ValueError(f"bits={bits} is not accepted: give 2, 3 or 4")
    n, power = 2**bits, power_of_gain(gain)
    reach = (n - 0.5 if asymmetric else n - 0.25) if reach is None else reach
    if not n - 1 <= reach <= n + 1:
        raise ValueError(f"reach={reach} is not accepted: give {n - 1} to {n + 1} at bits={bits}")
    e4m3 = scale_format("e4m3")

    # The kernels' own, which nobody needs who makes no such codec.

    def check(shape: Shape, dtype: Any = jnp.float32) -> None:
        check_span(shape, dtype)
        packed_width(shape[3], bits)

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> EmptyState:
        check(shape, dtype)
        return EmptyState()

    def lowest(shape: Shape) -> Float[Array, "1 1 T D"]:
        """Returns l_0, the level of code 0 of every token and channel."""
        j_11TD = dither(shape[2], shape[3])[None, None].astype(jnp.float32)
        return (j_11TD + 0.5) / FINE - n / 2

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[DitheredPacked, EmptyState]:
        del key  # the dither is deterministic
        check(x_BHTD.shape, x_BHTD.dtype)
        x_BHTD = jnp.where(jnp.isnan(x_BHTD), 0, x_BHTD).astype(jnp.float32)
        finite_BHTD = jnp.isfinite(x_BHTD)
        w_BHD, exponent_BH = channel_sizes(jnp.where(finite_BHTD, x_BHTD, 0))
        w_BH1D = w_BHD.astype(jnp.float32)[:, :, None]
        y_BHTD = x_BHTD / jnp.where(w_BH1D > 0, w_BH1D, 1)
        y_BHTD = times_power_of_two(y_BHTD, -exponent_BH)

        size_BHTD = jnp.where(finite_BHTD, jnp.abs(y_BHTD), 0)
        high_BHT1 = jnp.max(size_BHTD, 3, keepdims=True)
        low_BHT1, zeros_BHT1, m_BHT1 = -high_BHT1, None, jnp.zeros_like(high_BHT1)
        if asymmetric:
            low_BHT1 = jnp.min(y_BHTD, 3, keepdims=True, where=finite_BHTD, initial=jnp.inf)
            high_BHT1 = jnp.max(y_BHTD, 3, keepdims=True, where=finite_BHTD, initial=-jnp.inf)
            some_BHT1 = low_BHT1 <= high_BHT1
            low_BHT1, high_BHT1 = (jnp.where(some_BHT1, x, 0) for x in (low_BHT1, high_BHT1))
            middle_BHT1 = (low_BHT1 + high_BHT1) / 2
            zeros_BHT1, _, m_BHT1 = store_scale(middle_BHT1, exponent_BH, e4m3)
        step_BHT1 = (high_BHT1 - low_BHT1) / reach
        scales_BHT1, exponents_BH, scale_BHT1 = store_scale(step_BHT1, exponent_BH, e4m3)

        l_11TD = lowest(x_BHTD.shape)
        u_BHTD = (y_BHTD - m_BHT1) / jnp.where(scale_BHT1 > 0, scale_BHT1, 1)
        u_BHTD = jnp.where(scale_BHT1 > 0, u_BHTD, 0)
        codes_BHTD = jnp.clip(jnp.floor(u_BHTD - l_11TD + 0.5), 0, n - 1)
        if power is not None:
            l_BHTD = codes_BHTD + l_11TD
            from_m_BHTD = jnp.where(finite_BHTD, y_BHTD - m_BHT1, 0)
            step_BHT1 = _corrected(scale_BHT1, from_m_BHTD, l_BHTD, power)
            scales_BHT1, _, _ = store_scale(step_BHT1, exponent_BH, e4m3)
        codes_BHTC = pack(codes_BHTD.astype(jnp.uint8), bits)
        return DitheredPacked(codes_BHTC, scales_BHT1, zeros_BHT1, exponents_BH, w_BHD), state

    def decode(packed: DitheredPacked, dtype: Any = jnp.bfloat16) -> Array:
        codes_BHTD = unpack(packed.codes_BHTC, bits).astype(jnp.float32)
        scale_BHT1 = load_scale(packed.scales_BHT1, packed.exponents_BH)
        y_BHTD = (codes_BHTD + lowest(codes_BHTD.shape)) * scale_BHT1
        if packed.zeros_BHT1 is not None:
            y_BHTD += load_scale(packed.zeros_BHT1, packed.exponents_BH)
        return (y_BHTD * packed.deviations_BHD.astype(jnp.float32)[:, :, None]).astype(dtype)

    def nbytes(shape: Shape) -> int:
        check(shape)
        b, h, t, d = shape
        return b * h * (t * (packed_width(d, bits) + 1 + asymmetric) + 2 * d + 1)

    def deficit(packed: DitheredPacked) -> Array:
        """Returns v - v_hat of `key_bias`: (2 p - 1) of -step^2 / 12, the error's variance at gain 1."""
        square_BH = jnp.mean(jnp.square(packed.deviations_BHD.astype(jnp.float32)), axis=2)
        scale_BHT = load_scale(packed.scales_BHT1, packed.exponents_BH)[..., 0]
        p = 1.0 if power is None else power
        return (1 - 2 * p) * square_BH[..., None] * jnp.square(scale_BHT) / 12

    name = f"dithered{bits}" + ("-asym" if asymmetric else "")
    storage = Storage(
        Levels(
            bits,
            None,
            offset=n / 2 - 0.5 / FINE,
            scale_dtype="e4m3",
            zero_points=asymmetric,
            exponents=True,
            dithered=True,
            deviations=True,
            fit=None if power is None else DitheredFit(reach, power),
        )
    )
    return Codec(init, encode, decode, per_element(nbytes), name, nbytes, storage, deficit)


def channel_sizes(
    x_BHTD: Float[Array, "B H T D"],
) -> tuple[Float[Array, "B H D"], Int[Array, "B H"]]:
    """Returns the mean magnitude w of every channel, in bfloat16, and the `span_exponent` of x / w; x is finite."""
    size_BHTD = jnp.abs(x_BHTD.astype(jnp.float32))
    w_BHD = jnp.sum(size_BHTD / x_BHTD.shape[2], axis=2).astype(jnp.bfloat16)
    divisor_BHD = jnp.where(w_BHD > 0, w_BHD, 1).astype(jnp.float32)
    # The largest first, so that one pass over the span finds both.
    return w_BHD, span_exponent(jnp.max(size_BHTD, axis=2) / divisor_BHD)


def _corrected(scale_BHT1: Array, x_BHTD: Array, l_BHTD: Array, power: float) -> Array:
    """Returns lsq^(1 - p) match^p for values x with levels l; the scale itself where x is zero."""
    both_BHT1 = jnp.sum(x_BHTD * l_BHTD, 3, keepdims=True)
    good_BHT1 = both_BHT1 > 0
    some_BHT1 = jnp.where(good_BHT1, both_BHT1, 1)
    lsq_BHT1 = some_BHT1 / jnp.sum(l_BHTD * l_BHTD, 3, keepdims=True)
    match_BHT1 = jnp.sum(x_BHTD * x_BHTD, 3, keepdims=True) / some_BHT1
    return jnp.where(good_BHT1, lsq_BHT1 ** (1 - power) * match_BHT1**power, scale_BHT1)
