"""The definition of `assign_and_pack`, `assign_and_subtract` and `pack_dithered` in plain JAX.

Axes: R rows, T tokens, D head dim, K centroids, G groups of g channels, C code bytes of a token.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.dequantize.dither import FINE, dither
from pallas_kernels.kmeans.reference import nearest
from pallas_kernels.kmeans.types import Metric
from pallas_kernels.quantize_pack.types import Dithered, Integers, Midrise

__all__ = ["dithered", "four_bits", "integers", "midrise", "packed", "residual"]

_E4M3 = jnp.float8_e4m3fn


def residual(x_RTD: Array, c_RKD: Array, metric: Metric | None = None) -> tuple[Array, Array]:
    """ids (uint8) of the nearest centroids and x - c in float32."""
    ids_RT, _ = nearest(x_RTD, c_RKD, metric)
    picked_RTD = jax.vmap(lambda c, i: c[i])(c_RKD.astype(jnp.float32), ids_RT)
    return ids_RT.astype(jnp.uint8), x_RTD.astype(jnp.float32) - picked_RTD


def packed(codes_RTD: Array, bits: int) -> Array:
    """Bytes of the codes of consecutive channels, the first one in the highest bits."""
    *lead, d = codes_RTD.shape
    n = 8 // bits
    shift = jnp.arange(n - 1, -1, -1, dtype=jnp.uint8)[None, None, None] * jnp.uint8(bits)
    codes = codes_RTD.astype(jnp.uint8).reshape(*lead, d // n, n)
    return jnp.sum(codes << shift, axis=-1, dtype=jnp.uint8)


def integers(r_RTD: Array, form: Integers) -> tuple[Array, ...]:
    """Packed codes (R, T, C), bytes of e4m3 scales (R, T, G), and those of zero points if there are any."""
    r, t, d = r_RTD.shape
    groups = r_RTD.reshape(r, t, d // form.group, form.group)
    if form.zero_points:
        least, most = 0, 2**form.bits - 1
        low_RTG = groups.min(-1)
        zero_RTG, size_RTG = _in_e4m3(low_RTG), groups.max(-1) - low_RTG
    else:
        most = 2 ** (form.bits - 1) - 1
        least, size_RTG = -most, jnp.abs(groups).max(-1)
        zero_RTG = jnp.zeros_like(size_RTG, _E4M3)
    scale_RTG = _in_e4m3(jnp.maximum(size_RTG / most, 1e-10))
    step, zero = (y.astype(jnp.float32)[..., None] for y in (scale_RTG, zero_RTG))
    ratio = jnp.where(step > 0, (groups - zero) / jnp.where(step > 0, step, 1), 0)
    codes = jnp.clip(lax.round(ratio, lax.RoundingMethod.AWAY_FROM_ZERO), least, most) - least
    stored = (scale_RTG, zero_RTG) if form.zero_points else (scale_RTG,)
    bytes_RTG = (lax.bitcast_convert_type(y, jnp.uint8) for y in stored)
    return packed(codes.reshape(r, t, d), form.bits), *bytes_RTG


def _in_e4m3(x: Array) -> Array:
    return jnp.clip(x, -448, 448).astype(_E4M3)


def four_bits(x: Array) -> Array:
    """Positive float32 numbers rounded to four significant bits, half to even, as e4m3 has."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return lax.bitcast_convert_type(bits, jnp.float32)


def midrise(r_RTD: Array, form: Midrise) -> tuple[Array, Array]:
    """Packed codes (R, T, C) and (R, 3, T): least-squares scale, matching scale, largest entry.

    s = ratio rms(r); then `refine` times: codes are the levels l nearest to r / s, and
    s = <r, l> / <l, l>. The matching scale is <r, r> / <r, l>.
    """
    n = 2**form.bits

    def codes_for(scale_RT: Array) -> Array:
        scale = jnp.where(scale_RT > 0, scale_RT, 1)[..., None]
        return jnp.clip(jnp.floor(r_RTD / scale + n / 2), 0, n - 1)

    energy = jnp.sum(r_RTD * r_RTD, -1)
    scale = jnp.sqrt(energy / r_RTD.shape[-1]) * form.ratio
    for _ in range(form.refine):
        codes = codes_for(scale)
        levels = codes - (n - 1) / 2
        along, square = jnp.sum(r_RTD * levels, -1), jnp.sum(levels * levels, -1)
        scale = jnp.where(along > 0, along / square, scale)
    match = jnp.where(along > 0, energy / jnp.where(along > 0, along, 1), scale)
    if form.recode:
        codes = codes_for(four_bits(scale))
    stats = jnp.stack([scale, match, jnp.abs(r_RTD).max(-1)], axis=1)
    return packed(codes, form.bits), stats


def dithered(r_RTD: Array, factor_RD: Array, form: Dithered) -> tuple[Array, Array]:
    """Packed codes (R, T, C) and (R, 2 or 3, T): least-squares scale, matching scale, and the middle if any.

    y = r factor; m = (max y + min y) / 2 in e4m3, or 0; step = (max y - min y) / reach in e4m3, or
    2 max |y| / reach. Codes are the levels l nearest to (y - m) / step. The scales are
    <y - m, l> / <l, l> and <y - m, y - m> / <y - m, l>, or the step where <y - m, l> is not positive.
    """
    n, t, d = 2**form.bits, *r_RTD.shape[1:]
    y_RTD = r_RTD.astype(jnp.float32) * factor_RD[:, None]
    size_RT, middle = 2 * jnp.abs(y_RTD).max(-1), []
    if form.zero_points:
        low_RT, high_RT = y_RTD.min(-1), y_RTD.max(-1)
        middle_RT = _in_e4m3((low_RT + high_RT) / 2).astype(jnp.float32)
        y_RTD, size_RT, middle = y_RTD - middle_RT[..., None], high_RT - low_RT, [middle_RT]
    step_RT = _in_e4m3(size_RT / form.reach).astype(jnp.float32)
    step_RT1 = step_RT[..., None]
    u_RTD = jnp.where(step_RT1 > 0, y_RTD / jnp.where(step_RT1 > 0, step_RT1, 1), 0)
    lowest_1TD = ((dither(t, d).astype(jnp.float32) + 0.5) / FINE - n / 2)[None]
    codes_RTD = jnp.clip(jnp.floor(u_RTD - lowest_1TD + 0.5), 0, n - 1)
    level_RTD = codes_RTD + lowest_1TD
    along_RT, square_RT = jnp.sum(y_RTD * level_RTD, -1), jnp.sum(level_RTD * level_RTD, -1)
    some_RT, energy_RT = jnp.where(along_RT > 0, along_RT, 1), jnp.sum(y_RTD * y_RTD, -1)
    lsq_RT = jnp.where(along_RT > 0, some_RT / square_RT, step_RT)
    match_RT = jnp.where(along_RT > 0, energy_RT / some_RT, step_RT)
    return packed(codes_RTD, form.bits), jnp.stack([lsq_RT, match_RT, *middle], axis=1)
