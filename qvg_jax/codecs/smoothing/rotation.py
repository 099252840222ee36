"""A fixed random rotation of the head dim, so that no channel stands out.

Axes: B batch, H heads, T tokens, D head dim.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from qvg_jax.codecs.base import EmptyState, Shape, Smoothing, check_span
from qvg_jax.codecs.spec import factory

__all__ = ["hadamard", "rotation", "token_signs"]

_KINDS = ("hadamard",)
_SIGNS = ("span", "token")


@functools.cache
def hadamard(size: int, seed: int) -> Float[np.ndarray, "D D"]:
    """Returns the randomised Hadamard matrix diag(s) H / sqrt(D): orthogonal, entries +-1 / sqrt(D).

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


def token_signs(tokens: int, size: int, seed: int) -> Float[Array, "1 1 T D"]:
    """Returns signs +-1 that differ from token to token: bits of a hash of token and channel, no storage.

    Word w of token t, which has the signs of channels 32 w to 32 w + 31, lowest bit first, is
    mix(t ceil(D / 32) + w + seed 2654435761) modulo 2^32, mix being the finalizer of MurmurHash3
    (A. Appleby, 2011): two multiplications, three shifts and three exclusive-ors per 32 signs.
    """
    words = -(-size // 32)
    # From an iota and not a constant: XLA would fold a constant into a table of T D entries.
    h_Tw = jnp.arange(tokens * words, dtype=jnp.uint32).reshape(tokens, words)
    h_Tw += jnp.uint32(seed * 2654435761 % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h_Tw = (h_Tw ^ (h_Tw >> jnp.uint32(shift))) * jnp.uint32(factor)
    h_Tw ^= h_Tw >> jnp.uint32(16)
    bit_Twb = (h_Tw[..., None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & jnp.uint32(1)
    return 1 - 2 * bit_Twb.reshape(1, 1, tokens, -1)[..., :size].astype(jnp.float32)


@factory
def rotation(kind: str = "hadamard", seed: int = 0, signs: str = "span") -> Smoothing:
    """Rotates every token by a fixed random rotation: y = x R, decoding x = y R^T.

    Spreads channels that stand out over all of them, so that one scale per token fits, and makes
    what is quantized nearly normal. Nothing is stored: R follows from the seed.

    Tokens that show the same thing are alike, and so are their errors after one rotation: attention
    averages such tokens, and their errors do not average out. With `signs="token"` the signs differ
    from token to token (`token_signs`), so that equal tokens have independent errors: a dither that
    costs neither bits nor error. It is for V, which attention averages.

    Decode, per element: log2 D additions as a fast Walsh-Hadamard transform (7 at D = 128, with
    exchanges between lanes), or D multiply-adds as a matrix product, which is what happens here.
    For V it can be had once per query, after the weighted sum; not with signs per token, which
    also cost a shift, a mask and an exclusive-or per element, and a hash per 32 elements.

    Entries that are not finite count as zero.

    Args:
        kind: "hadamard".
        seed: of the signs.
        signs: "span", the same for all tokens, or "token".

    Returns:
        A stateless `Smoothing` that stores nothing.

    Raises:
        ValueError: another kind or other signs; on use, a head dim that is not a power of two.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (arXiv
    2404.00456); randomised signs: Ailon & Chazelle, "The fast Johnson-Lindenstrauss transform"
    (2009). Signs per token are this library's.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is not accepted: give 'hadamard'")
    if signs not in _SIGNS:
        raise ValueError(f"signs={signs!r} is not accepted: give one of {_SIGNS}")
    each = signs == "token"

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
        if each:
            x_BHTD *= token_signs(*x_BHTD.shape[2:], seed)
        y_BHTD = jnp.einsum("bhtd,de->bhte", x_BHTD, r_DD, precision=lax.Precision.HIGHEST)
        return (), y_BHTD, state

    def decode(packed: tuple[()], residual_BHTD: Array) -> Array:
        del packed
        r_DD = matrix(residual_BHTD.shape)
        y_BHTD = residual_BHTD.astype(jnp.float32)
        x_BHTD = jnp.einsum("bhte,de->bhtd", y_BHTD, r_DD, precision=lax.Precision.HIGHEST)
        return x_BHTD * token_signs(*x_BHTD.shape[2:], seed) if each else x_BHTD

    def nbytes(shape: Shape) -> int:
        matrix(shape)
        return 0

    return Smoothing(init, encode, decode, nbytes, f"{kind}-token" if each else kind)
