"""Low-rank smoothing: subtract from every token its mean and its part in a few principal axes.

Axes: B batch, H heads, T tokens, D head dim, R axes, C bytes of one token's coefficients.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from qvg_jax.codecs.base import EmptyState, Shape, Smoothing, check_span
from qvg_jax.codecs.quantize.bitstream import pack_bits, packed_bits_width, unpack_bits
from qvg_jax.codecs.quantize.levels import best_ratio, midrise_levels
from qvg_jax.codecs.quantize.scales import times_power_of_two
from qvg_jax.codecs.smoothing.centred import centred
from qvg_jax.codecs.spec import factory

__all__ = ["LowRankPacked", "low_rank_smoothing", "principal_axes"]

_HIGHEST = lax.Precision.HIGHEST


class LowRankPacked(NamedTuple):
    """The stored part of `low_rank_smoothing`."""

    mean_BHD: Float[Array, "B H D"]
    axes_BHDR: Float[Array, "B H D R"]
    codes_BHTC: UInt8[Array, "B H T C"]
    step_BHR: Float[Array, "B H R"]


def principal_axes(
    energy_BHDD: Float[Array, "B H D D"], rank: int, iters: int
) -> Float[Array, "B H D R"]:
    """Returns the `rank` leading eigenvectors of symmetric matrices by subspace iteration.

    Q <- orthonormal basis of C Q, from unit vectors of the largest diagonal entries; then the axes
    within Q that diagonalise Q^T C Q. Deterministic. With singular C the axes stay orthonormal.

    Args:
        energy_BHDD: C, positive semi-definite.
        rank: R, at most D.
        iters: products with C.

    Returns:
        Orthonormal columns, by falling energy.
    """
    diagonal_BHD = jnp.diagonal(energy_BHDD, axis1=2, axis2=3)
    first_BHR = jnp.argsort(diagonal_BHD, axis=-1, descending=True, stable=True)[..., :rank]
    channel_D = jnp.arange(energy_BHDD.shape[2], dtype=first_BHR.dtype)[None, None, :, None]
    q_BHDR = (channel_D == first_BHR[:, :, None]).astype(jnp.float32)
    # Sizes between 0 and 1, whatever the units.
    top_BH11 = jnp.max(diagonal_BHD, axis=-1)[..., None, None]
    c_BHDD = energy_BHDD / jnp.where(top_BH11 > 0, top_BH11, 1)
    for _ in range(iters):
        q_BHDR = jnp.linalg.qr(jnp.matmul(c_BHDD, q_BHDR, precision=_HIGHEST))[0]
    within_BHRR = jnp.einsum("bhdr,bhde,bhes->bhrs", q_BHDR, c_BHDD, q_BHDR, precision=_HIGHEST)
    _, turn_BHRR = jnp.linalg.eigh(within_BHRR)
    return jnp.matmul(q_BHDR, turn_BHRR[..., ::-1], precision=_HIGHEST)


@factory
def low_rank_smoothing(rank: int = 4, iters: int = 4, bits: int = 2) -> Smoothing:
    """Subtracts the span's mean token and every token's quantized part in R principal axes.

    With axes A (D, R) of C = sum_t (x_t - m)(x_t - m)^T, a_t = A^T (x_t - m):
        a_hat_tr = step_r (code_tr - (2^bits - 1) / 2),   r_t = x_t - m - A a_hat_t.
    Mean and axes are rounded to bfloat16 first; step_r is the least-error step for a normal density
    of the coefficient's deviation. What the coefficients lose stays in the residual, so nothing is
    hidden. Decoding: x = r + m + A a_hat.

    Storage per head and span: 2 D + 2 D R + 2 R bytes, and R bits per token, rounded up to bytes.
    Decode, per element: R multiply-adds (and unpacking R codes once per token).
    Encode: 2 D + R multiply-adds per element, `iters` small products and QR factorisations.

    Entries that are not finite count as the mean of their channel and stay in the residual.

    Args:
        rank: R, at most D. More than the span has are axes of no energy.
        iters: subspace iterations.
        bits: bits of a coefficient, 1 to 8.

    Returns:
        A stateless `Smoothing`.

    Raises:
        ValueError: an argument outside its range; on use, rank > D.

    Source: principal-component smoothing as a baseline of QVG's; subspace iteration: Golub & Van
    Loan, Matrix Computations, section 8.2.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} is not accepted: give 1 to head_dim")
    if iters < 1:
        raise ValueError(f"iters={iters} is not accepted: give 1 or more")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} is not accepted: give 1 to 8")
    ratio, half = best_ratio(midrise_levels(2**bits)), (2**bits - 1) / 2

    def check(shape: Shape, dtype: Any = jnp.float32) -> None:
        check_span(shape, dtype)
        if rank > shape[3]:
            raise ValueError(f"rank={rank} is more than head_dim={shape[3]}; shape={tuple(shape)}")

    def common(packed: LowRankPacked) -> Array:
        """Returns m + A a_hat, which is what was subtracted."""
        codes_BHTR = unpack_bits(packed.codes_BHTC, bits, rank).astype(jnp.float32)
        a_BHTR = (codes_BHTR - half) * packed.step_BHR.astype(jnp.float32)[:, :, None]
        axes_BHDR = packed.axes_BHDR.astype(jnp.float32)
        x_BHTD = jnp.einsum("bhtr,bhdr->bhtd", a_BHTR, axes_BHDR, precision=_HIGHEST)
        return x_BHTD + packed.mean_BHD.astype(jnp.float32)[:, :, None]

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> EmptyState:
        check(shape, dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[LowRankPacked, Array, EmptyState]:
        del key
        check(x_BHTD.shape, x_BHTD.dtype)
        mean_BHD, y_BHTD, exponent_BH = centred(x_BHTD)
        c_BHDD = jnp.einsum("bhtd,bhte->bhde", y_BHTD, y_BHTD, precision=_HIGHEST)
        axes_BHDR = principal_axes(c_BHDD, rank, iters).astype(jnp.bfloat16)
        a_BHTR = jnp.einsum(
            "bhtd,bhdr->bhtr", y_BHTD, axes_BHDR.astype(jnp.float32), precision=_HIGHEST
        )
        step_BHR = jnp.sqrt(jnp.mean(a_BHTR * a_BHTR, axis=2)) * ratio
        step_BHR = times_power_of_two(step_BHR, exponent_BH).astype(jnp.bfloat16)
        unit_BH1R = times_power_of_two(step_BHR, -exponent_BH)[:, :, None]
        codes_BHTR = jnp.floor(a_BHTR / jnp.where(unit_BH1R > 0, unit_BH1R, 1) + 2 ** (bits - 1))
        codes_BHTC = pack_bits(jnp.clip(codes_BHTR, 0, 2**bits - 1).astype(jnp.uint8), bits)
        packed = LowRankPacked(mean_BHD, axes_BHDR, codes_BHTC, step_BHR)
        return packed, x_BHTD.astype(jnp.float32) - common(packed), state

    def decode(packed: LowRankPacked, residual_BHTD: Array) -> Array:
        return residual_BHTD.astype(jnp.float32) + common(packed)

    def nbytes(shape: Shape) -> int:
        check(shape)
        b, h, t, d = shape
        return b * h * (2 * d + 2 * d * rank + 2 * rank + t * packed_bits_width(rank, bits))

    return Smoothing(init, encode, decode, nbytes, f"lowrank{rank}x{bits}bit")
