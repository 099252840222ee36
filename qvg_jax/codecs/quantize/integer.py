"""Integer quantization with one small scale per group of channels.

Axes: B batch, H heads, T tokens, D head dim, G groups of one token, C code bytes of one token.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, PRNGKeyArray, UInt8

from qvg_jax.codecs.base import Codec, EmptyState, Shape, check_span, per_element
from qvg_jax.codecs.number_format import FormatLike, format_name
from qvg_jax.codecs.quantize.packing import BITS, pack, packed_width, unpack
from qvg_jax.codecs.quantize.scales import (
    saturate,
    scale_format,
    span_exponent,
    times_power_of_two,
)
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import LargestFit, Levels, Storage

__all__ = ["IntegerPacked", "residual_quantize"]

_MODES = ("symmetric", "asymmetric")
_SHIFT = 6  # a normalized span reaches up to 2^6: of e4m3's 2^-9 .. 448 most lies below
_FLOOR = 1e-10  # least scale, as in the official kernels; zero once rounded to e4m3


class IntegerPacked(NamedTuple):
    """The packed form of `residual_quantize`.

    `zeros_BHTG` is None in symmetric mode, `exponents_BH` unless the span is normalized.
    """

    codes_BHTC: UInt8[Array, "B H T C"]
    scales_BHTG: Float[Array, "B H T G"]
    zeros_BHTG: Float[Array, "B H T G"] | None
    exponents_BH: Int8[Array, "B H"] | None = None


@factory
def residual_quantize(
    bits: int = 2,
    group: int = 64,
    mode: str = "symmetric",
    scale_dtype: FormatLike = "e4m3",
    *,
    normalize: bool = False,
) -> Codec:
    """Rounds each group of channels to integers with one scale (and zero point) per group.

    Symmetric: q = 2^(bits-1) - 1, scale = max|x| / q, code = round(x / scale) in -q..q, stored
    with offset q (2 bits use three of the four levels). x ~ (code - q) scale.
    Asymmetric: q = 2^bits - 1, zero = min x, scale = (max x - min x) / q,
    code = round((x - zero) / scale) in 0..q. x ~ code scale + zero.

    Ties round away from zero. The scale has a floor of 1e-10. With e4m3, scale and zero are rounded
    to e4m3 *before* the codes are computed; with bf16 the codes use the unrounded ones. An e4m3
    scale of zero (a group below about 1e-3 q) gives zero codes, so an all-zero group decodes to
    zero; e4m3 saturates at 448, so larger groups are clipped to 448 q. That is the published format.
    `normalize` first divides each head's span by a power of two from its largest entry and stores
    that, so that e4m3 holds any size: values of +-700 and more, and residuals far below one.

    What is not finite: a NaN is stored as the code nearest zero, an infinity as the largest or
    smallest code, and neither counts for scale and zero point, so no NaN is ever stored and the
    other channels of the group keep their accuracy.

    Args:
        bits: 2, 3, 4 or 8.
        group: channels that share a scale; divides the head dim.
        mode: "symmetric" or "asymmetric".
        scale_dtype: "e4m3", "bf16" or "f32" (or the jax dtype): storage of scale and zero point.
        normalize: whether to keep a power of two per head and span: one byte.

    Returns:
        A stateless codec. Per token it stores D * bits / 8 bytes of codes and D / group scales
        (twice that in asymmetric mode).

    Raises:
        ValueError: an argument outside its set; on use, a head dim that `group` does not divide
            or whose codes do not fill whole bytes.

    Source:
        arXiv 2602.02958, section on progressive residual quantization; rounding rules of the
        official kernels.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits} is not accepted: give 2, 3, 4 or 8")
    if group < 1:
        raise ValueError(f"group={group} is not accepted: give 1 or more channels")
    if mode not in _MODES:
        raise ValueError(f"mode={mode!r} is not accepted: give 'symmetric' or 'asymmetric'")
    dtype = scale_format(scale_dtype)
    symmetric = mode == "symmetric"
    q = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    rounds_first = dtype.itemsize == 1

    def check(shape: Shape, x_dtype: Any = jnp.float32) -> None:
        check_span(shape, x_dtype)
        d = shape[3]
        if d % group:
            raise ValueError(
                f"group={group} must divide head_dim={d}; got remainder {d % group}; "
                f"accepted: {', '.join(str(g) for g in range(1, d + 1) if d % g == 0)}"
            )
        packed_width(d, bits)

    def init(shape: Shape, x_dtype: Any = jnp.bfloat16) -> EmptyState:
        check(shape, x_dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[IntegerPacked, EmptyState]:
        del key  # rounding is deterministic
        check(x_BHTD.shape, x_BHTD.dtype)
        b, h, t, d = x_BHTD.shape
        x_BHTD, exponents_BH = x_BHTD.astype(jnp.float32), None
        if normalize:
            exponents_BH = (span_exponent(x_BHTD) - _SHIFT).astype(jnp.int8)
            x_BHTD = times_power_of_two(x_BHTD, -exponents_BH.astype(jnp.int32))
        x_BHTGg = x_BHTD.reshape(b, h, t, d // group, group)
        finite_BHTGg = jnp.isfinite(x_BHTGg)
        if symmetric:
            zero_BHTG = jnp.zeros((b, h, t, d // group), jnp.float32)
            top_BHTG = jnp.max(jnp.where(finite_BHTGg, jnp.abs(x_BHTGg), 0), axis=-1)
        else:
            # An all-bad group has no finite extremes: it becomes an all-zero group.
            low = jnp.min(jnp.where(finite_BHTGg, x_BHTGg, jnp.inf), axis=-1)
            high = jnp.max(jnp.where(finite_BHTGg, x_BHTGg, -jnp.inf), axis=-1)
            zero_BHTG = jnp.where(jnp.isfinite(low), low, 0)
            top_BHTG = jnp.where(jnp.isfinite(low), high - zero_BHTG, 0)
        scale_BHTG = jnp.maximum(top_BHTG / q, _FLOOR)
        stored_scale, stored_zero = saturate(scale_BHTG, dtype), saturate(zero_BHTG, dtype)
        if rounds_first:
            scale_BHTG = stored_scale.astype(jnp.float32)
            zero_BHTG = stored_zero.astype(jnp.float32)
        scale_BHTG1 = scale_BHTG[..., None]
        # NaN stands for zero, which asymmetric codes reach through the zero point.
        x_BHTGg = jnp.where(jnp.isnan(x_BHTGg), 0, x_BHTGg)
        ratio = (x_BHTGg - zero_BHTG[..., None]) / jnp.where(scale_BHTG1 > 0, scale_BHTG1, 1)
        ratio = jnp.where(scale_BHTG1 > 0, ratio, 0)
        rounded = lax.round(ratio, lax.RoundingMethod.AWAY_FROM_ZERO)
        codes = jnp.clip(rounded, -q if symmetric else 0, q) + (q if symmetric else 0)
        codes_BHTC = pack(codes.astype(jnp.uint8).reshape(b, h, t, d), bits)
        stored_zero = None if symmetric else stored_zero
        return IntegerPacked(codes_BHTC, stored_scale, stored_zero, exponents_BH), state

    def decode(packed: IntegerPacked, dtype: Any = jnp.bfloat16) -> Array:
        codes_BHTD = unpack(packed.codes_BHTC, bits).astype(jnp.float32)
        if symmetric:
            codes_BHTD = codes_BHTD - q
        b, h, t, d = codes_BHTD.shape
        x_BHTGg = codes_BHTD.reshape(b, h, t, d // group, group)
        x_BHTGg = x_BHTGg * packed.scales_BHTG.astype(jnp.float32)[..., None]
        if not symmetric:
            x_BHTGg = x_BHTGg + packed.zeros_BHTG.astype(jnp.float32)[..., None]
        x_BHTD = x_BHTGg.reshape(b, h, t, d)
        if normalize:
            x_BHTD = times_power_of_two(x_BHTD, packed.exponents_BH)
        return x_BHTD.astype(dtype)

    def nbytes(shape: Shape) -> int:
        check(shape)
        *lead, d = shape
        scales = d // group * dtype.itemsize * (1 if symmetric else 2)
        return math.prod(lead) * (packed_width(d, bits) + scales) + normalize * lead[0] * lead[1]

    def deficit(packed: IntegerPacked) -> Array:
        """Returns v - v_hat of `key_bias` for rounding to a fine grid: -step^2 / 12, mean over the groups."""
        scale_BHTG = packed.scales_BHTG.astype(jnp.float32)
        if normalize:
            scale_BHTG = times_power_of_two(scale_BHTG, packed.exponents_BH)
        return -jnp.mean(jnp.square(scale_BHTG), axis=3) / 12

    storage = Storage(
        Levels(
            bits,
            group,
            offset=q if symmetric else 0,
            scale_dtype=format_name(dtype),
            zero_points=not symmetric,
            exponents=normalize,
            fit=LargestFit() if rounds_first and not normalize else None,
        )
    )
    name = f"int{bits}-{'sym' if symmetric else 'asym'}-g{group}-{format_name(dtype)}"
    name += "-normalized" if normalize else ""
    return Codec(init, encode, decode, per_element(nbytes), name, nbytes, storage, deficit)
