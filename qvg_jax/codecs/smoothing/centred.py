"""Centring of a span on its mean token, in numbers near one: the first step towards principal axes.

Axes: B batch, H heads, T tokens, D head dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qvg_jax.codecs.quantize.scales import span_exponent, times_power_of_two

__all__ = ["centred"]


def centred(
    x_BHTD: Float[Array, "B H T D"],
) -> tuple[Float[Array, "B H D"], Float[Array, "B H T D"], Int[Array, "B H"]]:
    """Returns the mean of every channel as stored, and the span without it, divided by a power of two.

    m_d = mean of the finite x_td, in bfloat16; y_td = (x_td - m_d) 2^-e, 0 where x_td is not
    finite. 2^e is a power of two near the span's largest entry, so that squares and sums of y stay
    within float32 whatever x is.

    Returns:
        mean (bfloat16), y (float32), e (int32).
    """
    finite_BHTD = jnp.isfinite(x_BHTD)
    exponent_BH = span_exponent(x_BHTD)
    y_BHTD = times_power_of_two(jnp.where(finite_BHTD, x_BHTD, 0), -exponent_BH)
    count_BHD = jnp.maximum(jnp.sum(finite_BHTD, axis=2, dtype=jnp.float32), 1)
    mean_BHD = (jnp.sum(y_BHTD, axis=2) / count_BHD).astype(jnp.bfloat16)
    y_BHTD = jnp.where(finite_BHTD, y_BHTD - mean_BHD.astype(jnp.float32)[:, :, None], 0)
    return times_power_of_two(mean_BHD, exponent_BH).astype(jnp.bfloat16), y_BHTD, exponent_BH
