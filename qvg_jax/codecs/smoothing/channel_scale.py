"""Dividing every channel by a power of two near its size.

Axes: B batch, H heads, T tokens, D head dim.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, PRNGKeyArray

from qvg_jax.codecs.base import EmptyState, Shape, Smoothing, check_span
from qvg_jax.codecs.quantize.scales import span_exponent, times_power_of_two
from qvg_jax.codecs.spec import factory

__all__ = ["ChannelScalePacked", "channel_scale"]


class ChannelScalePacked(NamedTuple):
    """What channel scaling stores."""

    exponents_BHD: Int8[Array, "B H D"]


@factory
def channel_scale() -> Smoothing:
    """Divides channel d by 2^e_d, the power of two nearest to its RMS over the span's tokens.

    e_d = round(log2 sqrt(mean_t x_td^2)), y = x 2^-e, exactly. A scale per token then fits all
    channels: a channel with half the size gets half the step. Decoding: x = y 2^e, per element one
    multiplication, which a kernel may merge with a per-channel step or, for K, with the query.

    Entries that are not finite do not count. A channel of zeros has e = 0.

    Returns:
        A stateless `Smoothing` that stores one int8 per channel, head and span.

    Source: per-channel smoothing as in Xiao et al., "SmoothQuant" (arXiv 2211.10438), with powers
    of two and nothing moved into weights.
    """

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> EmptyState:
        check_span(shape, dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[ChannelScalePacked, Array, EmptyState]:
        del key
        check_span(x_BHTD.shape, x_BHTD.dtype)
        span_BH = span_exponent(x_BHTD)
        y_BHTD = times_power_of_two(jnp.where(jnp.isfinite(x_BHTD), x_BHTD, 0), -span_BH)
        power_BHD = jnp.mean(y_BHTD * y_BHTD, axis=2)
        _, twice_BHD = jnp.frexp(power_BHD)  # power in [2^(twice - 1), 2^twice)
        exponent_BHD = twice_BHD.astype(jnp.int32) // 2 + span_BH[..., None]
        exponent_BHD = jnp.where(power_BHD > 0, jnp.clip(exponent_BHD, -100, 120), 0)
        packed = ChannelScalePacked(exponent_BHD.astype(jnp.int8))
        return packed, x_BHTD.astype(jnp.float32) * _power(-exponent_BHD), state

    def decode(packed: ChannelScalePacked, residual_BHTD: Array) -> Array:
        return residual_BHTD.astype(jnp.float32) * _power(packed.exponents_BHD.astype(jnp.int32))

    def nbytes(shape: Shape) -> int:
        check_span(shape)
        b, h, _, d = shape
        return b * h * d

    return Smoothing(init, encode, decode, nbytes, "channelscale", isometric=False)


def _power(exponent_BHD: Array) -> Array:
    bits_BHD = (exponent_BHD + 127) << 23
    return lax.bitcast_convert_type(bits_BHD, jnp.float32)[:, :, None]
