"""Levels on Hopper: codes and scales of a tile of residuals that lies in the registers of a warpgroup."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dequantize.dither import CHANNEL_STEP, FINE, TOKEN_SHIFT, TOKEN_STEP
from pallas_kernels.gpu.registers import constant, fold, over_columns
from pallas_kernels.kmeans.types import HEAD_DIM
from pallas_kernels.quantize_pack.types import Dithered, Integers, Midrise

__all__ = ["dithered", "integers", "midrise", "ones"]

_W = plgpu.Layout.WGMMA
_LARGE = 3e38
_EVEN, _AWAY = lax.RoundingMethod.TO_NEAREST_EVEN, lax.RoundingMethod.AWAY_FROM_ZERO
_AT_ONCE = 32  # channels whose levels are in registers beside the residuals


def _row_max(x: Array) -> Array:
    return fold(x, jnp.maximum, 8).max(axis=1)


def _row_min(x: Array) -> Array:
    return fold(x, jnp.minimum, 8).min(axis=1)


def _row_sum(x: Array) -> Array:
    return fold(x, jnp.add, 8).sum(axis=1)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _floats(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.float32)


def _four_bits(x: Array) -> Array:
    """A positive float32 rounded to four significant bits, half to even; as an integer."""
    bits = _bits(x)
    return (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000


def _e4m3(x: Array) -> tuple[Array, Array]:
    """A positive float32 rounded to e4m3: its byte (int32) and its value."""
    x = jnp.minimum(x, 448.0)
    normal = _four_bits(x)
    steps = lax.round(x * 512.0, _EVEN)  # below 2^-6 the steps are 2^-9
    small = _bits(steps + 2.0**23) & 15
    is_small = x < 2.0**-6
    byte = jnp.where(is_small, small, (normal >> 20) - 960)
    return byte, jnp.where(is_small, steps * 2.0**-9, _floats(normal))


def ones(condition: Array) -> Array:
    """1 where the condition holds, else 0, in float32."""
    return jnp.where(condition, 1.0, 0.0)


def _e4m3_signed(x: Array) -> tuple[Array, Array]:
    """A float32 of either sign rounded to e4m3: its byte (int32) and its value."""
    byte, value = _e4m3(jnp.abs(x))
    return jnp.where(x < 0.0, byte + 128, byte), jnp.where(x < 0.0, -value, value)


def _inverse(scale: Array) -> Array:
    return jnp.where(scale > 0.0, 1.0 / jnp.where(scale > 0.0, scale, 1.0), 0.0)


def _rounded(x: Array, how: lax.RoundingMethod, least: float, most: float) -> Array:
    return jnp.minimum(jnp.maximum(lax.round(x, how), float(least)), float(most))


def integers(r: Array, form: Integers) -> tuple[Array, list[Array]]:
    """Codes as float32, and bytes of e4m3: the scales of all groups, then zero points if there are any."""
    q, codes, scales, zeros = 2 ** (form.bits - 1) - 1, [], [], []
    for start in range(0, HEAD_DIM, form.group):
        part = r[:, start : start + form.group]
        if form.zero_points:
            steps = 2**form.bits - 1
            low, high = _row_min(part), _row_max(part)
            byte, zero = _e4m3_signed(low)
            zeros.append(byte)
            byte, scale = _e4m3(jnp.maximum((high - low) / steps, 1e-10))
            above = (part - over_columns(zero, part.shape)) * over_columns(
                _inverse(scale), part.shape
            )
            codes.append(_rounded(above, _AWAY, 0, steps))
        else:
            byte, scale = _e4m3(jnp.maximum(_row_max(jnp.abs(part)) / q, 1e-10))
            if q == 1:
                edge = over_columns(jnp.where(scale > 0.0, scale * 0.5, _LARGE), part.shape)
                codes.append(ones(part >= edge) - ones(part <= -edge) + 1.0)
            else:
                ratio = part * over_columns(_inverse(scale), part.shape)
                codes.append(_rounded(ratio, _AWAY, -q, q) + float(q))
        scales.append(byte)
    codes = codes[0] if len(codes) == 1 else jnp.concatenate(codes, axis=1)
    return codes, scales + zeros


def midrise(r: Array, form: Midrise) -> tuple[Array, list[Array]]:
    """Codes as float32, and least-squares scale, matching scale and largest entry."""
    n = 2**form.bits

    def codes_for(scale):
        if n == 2:
            return ones(r >= 0.0)
        if n == 4:
            edge = over_columns(jnp.where(scale > 0.0, scale, 1.0), r.shape)
            return ones(r >= -edge) + ones(r >= 0.0) + ones(r >= edge)
        inverse = over_columns(1.0 / jnp.where(scale > 0.0, scale, 1.0), r.shape)
        code = lax.round(r * inverse + (n - 1) / 2, _EVEN)
        return jnp.minimum(jnp.maximum(code, 0.0), float(n - 1))

    energy = _row_sum(r * r)
    scale = lax.sqrt(energy * (1 / HEAD_DIM)) * form.ratio
    for _ in range(form.refine):
        codes = codes_for(scale)
        levels = codes - (n - 1) / 2
        along, square = _row_sum(r * levels), _row_sum(levels * levels)
        scale = jnp.where(along > 0.0, along / square, scale)
    match = jnp.where(along > 0.0, energy / jnp.where(along > 0.0, along, 1.0), scale)
    if form.recode:
        codes = codes_for(_floats(_four_bits(scale)))
    return codes, [scale, match, _row_max(jnp.abs(r))]


def dithered(r: Array, factor: Any, first: Array, form: Dithered) -> tuple[Array, list[Array]]:
    """Codes as float32, and least-squares scale, matching scale and middle; see `reference.dithered`.

    Levels are made for some channels after others, so that they need few registers, and never kept.

    Args:
        r: residuals (64, D).
        factor: of the channels, in shared memory.
        first: the first token's number in the span.
        form: what is computed.
    """
    n = 2**form.bits
    y = r * lax.broadcast_in_dim(plgpu.load(factor, layout=_W.reduce(0)), r.shape, [1])
    if form.zero_points:
        low, high = _row_min(y), _row_max(y)
        _, middle = _e4m3_signed((low + high) * 0.5)
        y, size, more = y - over_columns(middle, y.shape), high - low, [middle]
    else:
        size, more = 2.0 * _row_max(jnp.abs(y)), []
    _, step = _e4m3(size / form.reach)
    inverse = _inverse(step)
    token = plgpu.broadcasted_iota(jnp.int32, step.shape, 0, layout=_W.reduce(1)) + first
    # The multiplication wraps around as that of unsigned numbers; the last six bits of the shift, too.
    shift = (token * TOKEN_STEP) >> TOKEN_SHIFT
    codes, sums = [], [constant((r.shape[0], 8), 0.0)] * 3
    for start in range(0, HEAD_DIM, _AT_ONCE):
        part = y[:, start : start + _AT_ONCE]
        channel = plgpu.broadcasted_iota(jnp.int32, part.shape, 1, layout=_W) + start
        j = (over_columns(shift, part.shape) + channel * CHANNEL_STEP) & (FINE - 1)
        lowest = j.astype(jnp.float32) * (1 / FINE) + (0.5 / FINE - n / 2)
        code = _rounded(part * over_columns(inverse, part.shape) - lowest, _EVEN, 0, n - 1)
        level = code + lowest
        products = part * level, level * level, part * part
        sums = [s + fold(p, jnp.add, 8) for s, p in zip(sums, products, strict=True)]
        codes.append(code)
    along, square, energy = (s.sum(axis=1) for s in sums)
    some = jnp.where(along > 0.0, along, 1.0)
    lsq = jnp.where(along > 0.0, some / square, step)
    match = jnp.where(along > 0.0, energy / some, step)
    return jnp.concatenate(codes, axis=1), [lsq, match, *more]
