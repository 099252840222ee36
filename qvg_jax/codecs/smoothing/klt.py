"""Rotation of a span onto its own principal axes (Karhunen-Loeve transform), measured and stored.

Axes: B batch, H heads, T tokens, D head dim, R principal axes.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from qvg_jax.codecs.base import EmptyState, Shape, Smoothing, check_span
from qvg_jax.codecs.quantize.scales import times_power_of_two
from qvg_jax.codecs.smoothing.centred import centred
from qvg_jax.codecs.smoothing.reflections import (
    Reflections,
    reflections_nbytes,
    reflections_of,
    rotation_of,
)
from qvg_jax.codecs.spec import factory

__all__ = ["KLTPacked", "klt_rotation"]


class KLTPacked(NamedTuple):
    """The stored part of `klt_rotation`: the mean token, and the rotation as reflections."""

    mean_BHD: Float[Array, "B H D"]
    reflections: Reflections


@factory
def klt_rotation(rank: int | None = None, vector_bits: int = 6) -> Smoothing:
    """Removes the mean token of a span and rotates the rest onto the span's principal axes.

    With C = sum_t (x_t - m)(x_t - m)^T = U diag(w) U^T, w descending, and Q orthogonal with
    q_i = +-u_i for i <= R:
        encode: y_t = Q^T (x_t - m)      decode: x_t = m + Q y_t
    The first R channels of the residual are uncorrelated with everything and ordered by energy; the
    other D - R span what is left. A quantizer that spends bits by channel, `allocated_quantize`,
    then reaches a fraction of the error of one that spends them evenly.

    Q is stored as R Householder vectors of few bits (`reflections_of`). Whatever their rounding, Q
    is orthogonal, so the rotation itself loses nothing; coarse vectors only decorrelate less.
    Measured on captured K and V, 6 bits are as good as 8, 5 nearly so, 4 cost 5 to 10 % of error.

    Storage: R (D - (R + 1) / 2) vector_bits / 8 + 2 R + 2 D bytes per head and span. At D = 128, 6
    bits, full rank: 0.09 bits per element in a span of 5,120 tokens, 0.012 in one of 37,440.
    rank=64: 0.08 at 5,120, 0.43 at 768; what a short span wants is fewer axes.
    Decode, per element: D multiply-adds, one matrix product (T, D) x (D, D) per head; that is D / Q
    of one of the products with the Q queries that share the decoded tokens (or 2 R with the
    reflections kept apart). For V it can be had once per query and span, after the weighted sum:
    sum_t p_t v_t = Q sum_t p_t y_t + m sum_t p_t. For K only without RoPE in between.
    Encode: 2 D multiply-adds per element, and per head an eigen-decomposition of (D, D) and R
    rank-one updates of (D, R).

    Entries that are not finite count as the mean of their channel.

    Args:
        rank: R, how many axes are the principal ones, at most D; None is all of them (D - 1
            reflections, which leave no choice for the last axis). More than the span has (one
            token, constant tokens) are arbitrary axes of no energy.
        vector_bits: bits of an entry of a stored vector, 2 to 8.

    Returns:
        A stateless `Smoothing`.

    Raises:
        ValueError: an argument outside its range; on use, rank > D or D = 1.

    Source: transform coding, Goyal, "Theoretical foundations of transform coding" (IEEE Signal
    Processing Magazine 18, 2001); per span as in low-rank KV smoothing.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} is not accepted: give 1 to head_dim, or None")
    if not 2 <= vector_bits <= 8:
        raise ValueError(f"vector_bits={vector_bits} is not accepted: give 2 to 8")

    def reflections(shape: Shape, dtype: Any = jnp.float32) -> int:
        check_span(shape, dtype)
        d = shape[3]
        if d < 2:
            raise ValueError(f"head_dim={d} has no axes to turn; accepted: 2 or more")
        if rank is not None and rank > d:
            raise ValueError(f"rank={rank} is more than head_dim={d}; shape={tuple(shape)}")
        return d - 1 if rank is None else min(rank, d - 1)

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> EmptyState:
        reflections(shape, dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[KLTPacked, Array, EmptyState]:
        del key
        r = reflections(x_BHTD.shape, x_BHTD.dtype)
        mean_BHD, x_BHTD, exponent_BH = centred(x_BHTD)
        energy_BHDD = _product("bhtd,bhte->bhde", x_BHTD, x_BHTD)
        _, axes_BHDD = jnp.linalg.eigh(energy_BHDD)
        stored = reflections_of(axes_BHDD[..., ::-1][..., :r], vector_bits)
        q_BHDD = rotation_of(stored, x_BHTD.shape[3], vector_bits)
        y_BHTD = times_power_of_two(_product("bhtd,bhde->bhte", x_BHTD, q_BHDD), exponent_BH)
        return KLTPacked(mean_BHD, stored), y_BHTD, state

    def decode(packed: KLTPacked, residual_BHTD: Array) -> Array:
        y_BHTD = residual_BHTD.astype(jnp.float32)
        q_BHDD = rotation_of(packed.reflections, y_BHTD.shape[3], vector_bits)
        x_BHTD = _product("bhte,bhde->bhtd", y_BHTD, q_BHDD)
        return x_BHTD + packed.mean_BHD.astype(jnp.float32)[:, :, None]

    def nbytes(shape: Shape) -> int:
        r = reflections(shape)
        b, h, _, d = shape
        return b * h * (reflections_nbytes(d, r, vector_bits) + 2 * d)

    return Smoothing(init, encode, decode, nbytes, "klt" + ("" if rank is None else str(rank)))


def _product(form: str, a: Array, b: Array) -> Array:
    return jnp.einsum(form, a, b, precision=lax.Precision.HIGHEST)
