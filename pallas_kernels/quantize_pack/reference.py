"""The definition of `assign_and_pack` and `assign_and_subtract` in plain JAX.

Axes: R rows, T tokens, D head dim, K centroids, G groups of g channels, C code bytes of a token.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.kmeans.reference import nearest
from pallas_kernels.quantize_pack.types import Integers, Midrise

__all__ = ["four_bits", "integers", "midrise", "packed", "residual"]


def residual(x_RTD: Array, c_RKD: Array) -> tuple[Array, Array]:
    """ids (uint8) of the nearest centroids and x - c in float32."""
    ids_RT, _ = nearest(x_RTD, c_RKD)
    picked_RTD = jax.vmap(lambda c, i: c[i])(c_RKD.astype(jnp.float32), ids_RT)
    return ids_RT.astype(jnp.uint8), x_RTD.astype(jnp.float32) - picked_RTD


def packed(codes_RTD: Array, bits: int) -> Array:
    """Bytes of the codes of consecutive channels, the first one in the highest bits."""
    *lead, d = codes_RTD.shape
    n = 8 // bits
    shift = jnp.arange(n - 1, -1, -1, dtype=jnp.uint8)[None, None, None] * jnp.uint8(bits)
    codes = codes_RTD.astype(jnp.uint8).reshape(*lead, d // n, n)
    return jnp.sum(codes << shift, axis=-1, dtype=jnp.uint8)


def integers(r_RTD: Array, form: Integers) -> tuple[Array, Array]:
    """Packed codes (R, T, C) and bytes of e4m3 scales (R, T, G) of symmetric integers."""
    r, t, d = r_RTD.shape
    q = 2 ** (form.bits - 1) - 1
    groups = r_RTD.reshape(r, t, d // form.group, form.group)
    scale = jnp.clip(jnp.abs(groups).max(-1) / q, 1e-10, 448).astype(jnp.float8_e4m3fn)
    step = scale.astype(jnp.float32)[..., None]
    ratio = jnp.where(step > 0, groups / jnp.where(step > 0, step, 1), 0)
    codes = jnp.clip(lax.round(ratio, lax.RoundingMethod.AWAY_FROM_ZERO), -q, q) + q
    bytes_RTG = lax.bitcast_convert_type(scale, jnp.uint8)
    return packed(codes.reshape(r, t, d), form.bits), bytes_RTG


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
