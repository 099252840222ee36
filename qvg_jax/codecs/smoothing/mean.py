"""Removing the mean token of a span, alone or as the first step of another smoothing.

Axes: B batch, H heads, T tokens, D head dim.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qvg_jax.codecs.base import EmptyState, Shape, Smoothing, check_span
from qvg_jax.codecs.quantize.scales import span_exponent, times_power_of_two
from qvg_jax.codecs.spec import factory

__all__ = ["MeanPacked", "centred", "mean_smoothing"]


class MeanPacked(NamedTuple):
    """What mean smoothing stores."""

    mean_BHD: Float[Array, "B H D"]


def centred(
    x_BHTD: Float[Array, "B H T D"],
) -> tuple[Float[Array, "B H D"], Float[Array, "B H T D"], Int[Array, "B H"]]:
    """The mean of every channel as stored, and the span without it, divided by a power of two.

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


@factory
def mean_smoothing() -> Smoothing:
    """Subtracts from every channel its mean over the tokens of the span.

    m_d = mean_t x_td in bfloat16, r = x - m. Decoding: x = r + m, one addition per element.
    Entries that are not finite do not count for the mean, and stay what they are in the residual.

    Returns:
        A stateless `Smoothing` that stores 2 D bytes per head and span.

    Source: Liu et al., "KIVI" (arXiv 2402.02750): keys have channels of large, steady size.
    """

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> EmptyState:
        check_span(shape, dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[MeanPacked, Array, EmptyState]:
        del key
        check_span(x_BHTD.shape, x_BHTD.dtype)
        mean_BHD, _, _ = centred(x_BHTD)
        residual_BHTD = x_BHTD.astype(jnp.float32) - mean_BHD.astype(jnp.float32)[:, :, None]
        return MeanPacked(mean_BHD), residual_BHTD, state

    def decode(packed: MeanPacked, residual_BHTD: Array) -> Array:
        mean_BH1D = packed.mean_BHD.astype(jnp.float32)[:, :, None]
        return residual_BHTD.astype(jnp.float32) + mean_BH1D

    def nbytes(shape: Shape) -> int:
        check_span(shape)
        b, h, _, d = shape
        return b * h * d * 2

    return Smoothing(init, encode, decode, nbytes, "mean")
