"""A fixed random rotation of the head dim, so that no channel stands out.

Axes: B batch, H heads, T tokens, D head dim.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from qvg_jax.codec import EmptyState, Shape, Smoothing, check_span

__all__ = ["hadamard", "rotation"]

_KINDS = ("hadamard",)


@functools.cache
def hadamard(size: int, seed: int) -> Float[np.ndarray, "D D"]:
    """The randomised Hadamard matrix diag(s) H / sqrt(D): orthogonal, entries +-1 / sqrt(D).

    H is Sylvester's, H_ij = (-1)^(number of common binary ones of i and j); the signs s come from
    a generator seeded with `seed`, the same on every machine.

    Raises:
        ValueError: size is not a power of two.
    """
    if size & (size - 1):
        raise ValueError(f"head_dim={size} is not a power of two; accepted by a Hadamard rotation:"
                         " 1, 2, 4, ..., 64, 128, 256, ...")  # fmt: skip
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    signs = np.random.Generator(np.random.PCG64(seed)).integers(0, 2, size) * 2 - 1
    return (signs[:, None] * h / np.sqrt(size)).astype(np.float32)


def rotation(kind: str = "hadamard", seed: int = 0) -> Smoothing:
    """Rotates every token by one fixed random rotation: y = x R, decoding x = y R^T.

    Spreads channels that stand out over all of them, so that one scale per token fits, and makes
    what is quantized nearly normal. Nothing is stored: R follows from the seed.

    Decode, per element: log2 D additions as a fast Walsh-Hadamard transform (7 at D = 128, with
    exchanges between lanes), or D multiply-adds as a matrix product, which is what happens here.
    For V it can be had once per query, after the weighted sum.

    Entries that are not finite count as zero.

    Args:
        kind: "hadamard".
        seed: of the signs.

    Returns:
        A stateless `Smoothing` that stores nothing.

    Raises:
        ValueError: another kind; on use, a head dim that is not a power of two.

    Source: Ashkboos et al., "QuaRot" (arXiv 2404.00456), section 3; randomised signs: Ailon &
    Chazelle, "The fast Johnson-Lindenstrauss transform" (2009).
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is not accepted: give 'hadamard'")

    def matrix(shape: Shape, dtype: Any = jnp.float32) -> Array:
        check_span(shape, dtype)
        return jnp.asarray(hadamard(shape[3], seed))

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> EmptyState:
        matrix(shape, dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[tuple[()], Array, EmptyState]:
        del key
        r_DD = matrix(x_BHTD.shape, x_BHTD.dtype)
        x_BHTD = jnp.where(jnp.isfinite(x_BHTD), x_BHTD, 0).astype(jnp.float32)
        y_BHTD = jnp.einsum("bhtd,de->bhte", x_BHTD, r_DD, precision=lax.Precision.HIGHEST)
        return (), y_BHTD, state

    def decode(packed: tuple[()], residual_BHTD: Array) -> Array:
        del packed
        r_DD = matrix(residual_BHTD.shape)
        y_BHTD = residual_BHTD.astype(jnp.float32)
        return jnp.einsum("bhte,de->bhtd", y_BHTD, r_DD, precision=lax.Precision.HIGHEST)

    def nbytes(shape: Shape) -> int:
        matrix(shape)
        return 0

    return Smoothing(init, encode, decode, nbytes, kind)
