"""Scales in small formats: e4m3 with one power of two per span and head, bf16, or f32.

e4m3 reaches from 2^-9 to 448. Captured values reach +-700 and residuals go far below one, so a
span is first divided by a power of two taken from its largest entry; that exponent is stored.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from qvg_jax.codecs.number_format import FormatLike, dtype_of, format_name

__all__ = [
    "SCALE_SHIFT",
    "gained",
    "load_scale",
    "saturate",
    "scale_format",
    "span_exponent",
    "store_scale",
    "times_power_of_two",
]

_FORMATS = ("e4m3", "bf16", "f32")

# A scale of 1 for the normalised span is stored as 2^6: of e4m3's 2^-9 .. 448, seven times the
# span's largest entry is then the top, and 2^-12 of it is the smallest scale in full precision.
SCALE_SHIFT = 6


def scale_format(scale_dtype: FormatLike) -> jnp.dtype:
    """Returns the dtype of "e4m3", "bf16" or "f32" (or of that jax dtype); ValueError otherwise."""
    if format_name(scale_dtype) not in _FORMATS:
        raise ValueError(f"scale_dtype={scale_dtype!r} is not accepted: give e4m3, bf16 or f32")
    return dtype_of(format_name(scale_dtype))


def span_exponent(x_BH: Float[Array, "B H *rest"]) -> Int[Array, "B H"]:
    """Returns the e with max |x| in [2^(e-1), 2^e) per batch row and head, over the finite entries.

    Limited to -100 .. 120, where 2^e and 2^-e are ordinary float32 numbers; 0 for an all-zero span.
    """
    size = jnp.where(jnp.isfinite(x_BH), jnp.abs(x_BH), 0)
    _, exponent_BH = jnp.frexp(jnp.max(size, axis=tuple(range(2, x_BH.ndim))))
    return jnp.clip(exponent_BH.astype(jnp.int32), -100, 120)


def times_power_of_two(
    x_BH: Float[Array, "B H *rest"], exponent_BH: Int[Array, "B H"]
) -> Float[Array, "B H *rest"]:
    """Returns x * 2^exponent per batch row and head, float32, exact; exponents in -126 .. 127."""
    # From the bits: XLA's exp2 of an integer is not exact everywhere.
    bits_BH = (exponent_BH.astype(jnp.int32) + 127) << 23
    power_BH = lax.bitcast_convert_type(bits_BH, jnp.float32)
    power = power_BH.reshape(power_BH.shape + (1,) * (x_BH.ndim - 2))
    return x_BH.astype(jnp.float32) * power


def store_scale(
    scale_BH: Float[Array, "B H *rest"], exponent_BH: Int[Array, "B H"], dtype: jnp.dtype
) -> tuple[Float[Array, "B H *rest"], Int8[Array, "B H"] | None, Float[Array, "B H *rest"]]:
    """Rounds scales of a normalised span to their storage.

    Args:
        scale_BH: scales of x * 2^-exponent, float32.
        exponent_BH: from `span_exponent`.
        dtype: from `scale_format`.

    Returns:
        The stored scales; the stored exponents (e4m3 only, else None: the power of two is inside
        the scale); and the stored scales in units of the normalised span again, float32.
        Saturates at the format's largest number.
    """
    if dtype.itemsize == 1:
        stored = saturate(scale_BH * 2.0**SCALE_SHIFT, dtype)
        exponents = (exponent_BH - SCALE_SHIFT).astype(jnp.int8)
        return stored, exponents, stored.astype(jnp.float32) * 2.0**-SCALE_SHIFT
    stored = saturate(times_power_of_two(scale_BH, exponent_BH), dtype)
    return stored, None, times_power_of_two(stored, -exponent_BH)


def gained(
    lsq: Float[Array, "..."], match: Float[Array, "..."], power: float
) -> Float[Array, "..."]:
    """Returns lsq^(1 - p) match^p of a least-squares and a matching scale; zero where there is nothing to match."""
    some = jnp.where(lsq > 0, lsq, 1)  # zero has no negative power, which a gain above 1 asks for
    return jnp.where(lsq > 0, some ** (1 - power) * match**power, 0)


def load_scale(
    stored_BH: Float[Array, "B H *rest"], exponents_BH: Int8[Array, "B H"] | None
) -> Float[Array, "B H *rest"]:
    """Returns scales in the units of the span, float32, from what `store_scale` stored."""
    if exponents_BH is None:
        return stored_BH.astype(jnp.float32)
    return times_power_of_two(stored_BH.astype(jnp.float32), exponents_BH)


def saturate(x: Array, dtype: jnp.dtype) -> Array:
    """Returns x in `dtype`; what is too large becomes the largest number of that format."""
    # e4m3 has no infinity: XLA would turn anything above 448 into NaN.
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)
