"""Storage of centroids in small formats: int8 with a step per channel, or e4m3 with one power of two.

Axes: B batch, H heads, S stages, K centroids, D head dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from qvg_jax.codecs.number_format import FormatLike, dtype_of, format_name
from qvg_jax.codecs.quantize.scales import (
    load_scale,
    span_exponent,
    store_scale,
    times_power_of_two,
)

__all__ = ["load_table", "store_table", "table_format", "table_nbytes"]

_FORMATS = ("bf16", "f16", "f32", "int8", "e4m3")


def table_format(centroid_dtype: FormatLike) -> str:
    """Returns the short name of an accepted format: bf16, f16, f32, int8 or e4m3.

    Raises:
        ValueError: anything else.
    """
    name = format_name(centroid_dtype)
    if name not in _FORMATS:
        raise ValueError(
            f"centroid_dtype={name} is not accepted: give bfloat16, float16, float32, int8 or e4m3"
        )
    return name


def table_nbytes(form: str, k: int, d: int) -> int:
    """Returns the bytes of one table of K centroids."""
    if form == "int8":
        return k * d + 2 * d
    if form == "e4m3":
        return k * d + 1
    return k * d * dtype_of(form).itemsize


def store_table(
    c_BHKD: Float[Array, "B H K D"], form: str
) -> tuple[Array, Array | None, Float[Array, "B H K D"]]:
    """Rounds centroids to their storage.

    "int8": code = round(c / step_d), step_d = max_k |c_kd| / 127 in bfloat16. "e4m3": c 2^-e in
    e4m3, with one e per head. Otherwise the float itself.

    Returns:
        Codes, steps (bfloat16 (B, H, D); int8 exponents (B, H); or None), and the centroids as
        `load_table` gives them.
    """
    if form == "e4m3":
        exponent_BH = span_exponent(c_BHKD)
        scaled = times_power_of_two(c_BHKD, -exponent_BH)
        codes, steps, _ = store_scale(scaled, exponent_BH, jnp.dtype(jnp.float8_e4m3fn))
    elif form == "int8":
        top_BHD = jnp.max(jnp.abs(c_BHKD), axis=2)
        steps = (top_BHD / 127).astype(jnp.bfloat16)
        unit_BH1D = steps.astype(jnp.float32)[:, :, None]
        codes = jnp.round(c_BHKD / jnp.where(unit_BH1D > 0, unit_BH1D, 1))
        codes = jnp.clip(codes, -127, 127).astype(jnp.int8)
    else:
        codes, steps = c_BHKD.astype(dtype_of(form)), None
    return codes, steps, load_table(codes, steps, form)


def load_table(codes: Array, steps: Array | None, form: str) -> Float[Array, "B H K D"]:
    """Returns centroids from what `store_table` stored; small formats as float32, floats as they are."""
    if form == "e4m3":
        return load_scale(codes, steps)
    if form == "int8":
        return codes.astype(jnp.float32) * steps.astype(jnp.float32)[:, :, None]
    return codes
