"""Batched k-means, Lloyd's algorithm: exact in float32, bounded in memory, same bytes every run.

Axes: B batch, H heads, T tokens (t of one step), D head dim, K centroids.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from qvg_jax.codecs.base import Shape

__all__ = ["assign", "lloyd", "restarted", "rows"]

# Distances are made for this many (token, centroid) pairs at a time. On a CPU 4 MiB of them stay
# in the cache (12 x 1536 x 256: 16 ms instead of 52); an accelerator wants fewer, larger steps.
_PAIRS_CPU, _PAIRS = 2**20, 2**24


def assign(
    x_BHTD: Float[Array, "B H T D"], c_BHKD: Float[Array, "B H K D"]
) -> tuple[Int[Array, "B H T"], Float[Array, "B H T"]]:
    """Returns the nearest centroid of every token and its squared distance.

    id_t = argmin_k ||c_k||^2 - 2 x_t . c_k, the first k on ties, accumulated in float32 whatever
    the dtype of x. Memory: a fixed number of (token, centroid) pairs at a time.

    Args:
        x_BHTD: tokens.
        c_BHKD: centroids, finite.

    Returns:
        ids (int32, 0..K-1) and squared distances (float32), both (B, H, T).
    """
    return lax.platform_dependent(
        x_BHTD,
        c_BHKD,
        cpu=lambda x, c: _assign(x, c, _PAIRS_CPU),
        default=lambda x, c: _assign(x, c, _PAIRS),
    )


def _assign(x_BHTD: Array, c_BHKD: Array, pairs: int) -> tuple[Array, Array]:
    b, h, t, _ = x_BHTD.shape
    k = c_BHKD.shape[2]
    c_BHKD = c_BHKD.astype(jnp.float32)
    csq_BHK1 = jnp.sum(c_BHKD * c_BHKD, axis=-1)[..., None]
    # Centroids before tokens: the reduction over K then runs down columns, which vectorises.
    k_K1 = jnp.arange(k, dtype=jnp.int32)[None, None, :, None]

    def nearest(x_BHtD: Array) -> tuple[Array, Array]:
        x_BHtD = x_BHtD.astype(jnp.float32)
        dot_BHKt = jnp.einsum("bhkd,bhtd->bhkt", c_BHKD, x_BHtD, precision=lax.Precision.HIGHEST)
        score_BHKt = csq_BHK1 - 2 * dot_BHKt
        best_BHt = jnp.min(score_BHKt, axis=2)
        # Same as argmin, in two plain reductions: XLA's argmin is scalar code on a CPU.
        hit_BHKt = jnp.where(score_BHKt == best_BHt[:, :, None], k_K1, k - 1)
        xsq_BHt = jnp.sum(x_BHtD * x_BHtD, axis=-1)
        return jnp.min(hit_BHKt, axis=2), jnp.maximum(best_BHt + xsq_BHt, 0)

    chunk = _chunk(x_BHTD.shape, k, pairs)
    if chunk == t:
        return nearest(x_BHTD)

    def body(i: Array, out: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(i * chunk, t - chunk)  # the last chunk overlaps: no padding needed
        new = nearest(lax.dynamic_slice_in_dim(x_BHTD, start, chunk, axis=2))
        return jax.tree.map(
            lambda o, n: lax.dynamic_update_slice_in_dim(o, n, start, axis=2), out, new
        )

    out = (jnp.zeros((b, h, t), jnp.int32), jnp.zeros((b, h, t), jnp.float32))
    return lax.fori_loop(0, math.ceil(t / chunk), body, out)


def _chunk(shape: Shape, k: int, pairs: int) -> int:
    """Returns the tokens of a step, so that a step holds about `pairs` (token, centroid) pairs."""
    b, h, t, _ = shape
    steps = math.ceil(t / max(64, pairs // (b * h * k)))
    return math.ceil(t / steps)  # even steps: the overlap of the last one is wasted work


def _sums_scatter(x_BHTD: Array, ids_BHT: Array, k: int) -> tuple[Array, Array]:
    """Returns sum and number of the tokens of each cluster by scatter-add; id K means "none"."""

    def one(x_TD: Array, ids_T: Array) -> tuple[Array, Array]:
        x_TD = x_TD.astype(jnp.float32)
        total = jax.ops.segment_sum(x_TD, ids_T, num_segments=k + 1)
        count = jax.ops.segment_sum(jnp.ones_like(x_TD[:, 0]), ids_T, num_segments=k + 1)
        return total[:k], count[:k]

    return jax.vmap(jax.vmap(one))(x_BHTD, ids_BHT)


def _sums_onehot(x_BHTD: Array, ids_BHT: Array, k: int, pairs: int = _PAIRS) -> tuple[Array, Array]:
    """Returns the same sums by products with one-hot rows, a fixed number of pairs at a time."""
    b, h, t, d = x_BHTD.shape
    chunk = _chunk(x_BHTD.shape, k, pairs)
    k_K1 = jnp.arange(k, dtype=jnp.int32)[None, None, :, None]

    def body(i: Array, out: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(i * chunk, t - chunk)
        x_BHtD = lax.dynamic_slice_in_dim(x_BHTD, start, chunk, axis=2).astype(jnp.float32)
        ids_BHt = lax.dynamic_slice_in_dim(ids_BHT, start, chunk, axis=2)
        fresh_t = start + jnp.arange(chunk, dtype=jnp.int32) >= i * chunk  # not counted before
        hot_BHKt = (ids_BHt[:, :, None] == k_K1) & fresh_t[None, None, None]
        hot_BHKt = hot_BHKt.astype(jnp.float32)
        total = jnp.einsum("bhkt,bhtd->bhkd", hot_BHKt, x_BHtD, precision=lax.Precision.HIGHEST)
        return out[0] + total, out[1] + jnp.sum(hot_BHKt, axis=-1)

    out = (jnp.zeros((b, h, k, d), jnp.float32), jnp.zeros((b, h, k), jnp.float32))
    return lax.fori_loop(0, math.ceil(t / chunk), body, out)


def _sums(x_BHTD: Array, ids_BHT: Array, k: int) -> tuple[Array, Array]:
    # Scatter-add is 2 to 12 times faster on a CPU and ordered there. On a GPU it uses atomics, so
    # its rounding changes from run to run: one-hot products keep "same input, same bytes".
    return lax.platform_dependent(
        x_BHTD,
        ids_BHT,
        cpu=lambda x, i: _sums_scatter(x, i, k),
        default=lambda x, i: _sums_onehot(x, i, k),
    )


def lloyd(
    x_BHTD: Float[Array, "B H T D"],
    c_BHKD: Float[Array, "B H K D"],
    iters: int | Int[Array, ""],
    *,
    used_BHT: Bool[Array, "B H T"] | None = None,
    reseed: bool = False,
    some_t: np.ndarray | None = None,
) -> Float[Array, "B H K D"]:
    """Returns the centroids after Lloyd's iterations: assign every token, move each centroid to their mean.

    c_k <- mean{x_t : id_t = k}; an empty cluster keeps its centroid.

    Args:
        x_BHTD: tokens.
        c_BHKD: initial centroids.
        iters: number of iterations; an array when it is only known at run time.
        used_BHT: tokens that count (default: all); the others are assigned but move nothing.
        reseed: in the first of at least two iterations, a centroid that attracted at most one
            token moves to one of the quarter of tokens that lie farthest from their centroid.
        some_t: tokens that all iterations but the last one look at; None is all tokens.

    Returns:
        Centroids, float32. They are the means of the last assignment; the tokens' nearest
        centroids afterwards are `assign(x_BHTD, centroids)`.
    """
    k = c_BHKD.shape[2]
    few_BHtD, used_BHt = x_BHTD, used_BHT
    if some_t is not None:
        few_BHtD = x_BHTD[:, :, some_t]
        used_BHt = None if used_BHT is None else used_BHT[:, :, some_t]

    def step(c_BHKD: Array, reseed: Bool[Array, ""] | bool, last: bool = False) -> Array:
        x, used = (x_BHTD, used_BHT) if last else (few_BHtD, used_BHt)
        ids_BHT, distance_BHT = assign(x, c_BHKD)
        if used is not None:
            ids_BHT = jnp.where(used, ids_BHT, k)
            distance_BHT = jnp.where(used, distance_BHT, -1)
        sum_BHKD, count_BHK = _sums(x, ids_BHT, k)
        mean_BHKD = sum_BHKD / jnp.maximum(count_BHK, 1)[..., None]
        new_BHKD = jnp.where(count_BHK[..., None] > 0, mean_BHKD, c_BHKD)
        if reseed is False:
            return new_BHKD
        spare_BHK = (count_BHK <= 1) & reseed
        return restarted(x, new_BHKD, spare_BHK, distance_BHT)

    c_BHKD = c_BHKD.astype(jnp.float32)
    more, done = jnp.asarray(iters) > 1, 0
    if some_t is not None:
        if reseed:
            c_BHKD = lax.cond(more, lambda c: step(c, True), lambda c: c, c_BHKD)
            done = 1
        c_BHKD = lax.fori_loop(done, iters - 1, lambda _, c: step(c, False), c_BHKD)
        return step(c_BHKD, False, last=True)
    if reseed:
        c_BHKD = step(c_BHKD, more)
        done = 1
    return lax.fori_loop(done, iters, lambda _, c: step(c, False), c_BHKD)


def restarted(
    x_BHTD: Array, c_BHKD: Array, spare_BHK: Array, distance_BHT: Array
) -> Float[Array, "B H K D"]:
    """Returns the centroids, the spare ones moved to tokens far from their nearest centroid.

    The n-th of N spare centroids takes the token at rank n * step by distance: evenly over the
    farthest quarter, as the very farthest ones are often all alike.
    """
    quarter = x_BHTD.shape[2] // 4
    far_BHT = _descending(distance_BHT)
    spares_BH1 = jnp.sum(spare_BHK, axis=-1, keepdims=True, dtype=jnp.int32)
    step_BH1 = jnp.maximum(quarter // jnp.maximum(spares_BH1, 1), 1)
    nth_BHK = jnp.maximum(jnp.cumsum(spare_BHK, axis=-1, dtype=jnp.int32) - 1, 0)
    far_BHK = jnp.take_along_axis(far_BHT, nth_BHK * step_BH1, axis=-1)
    return jnp.where(spare_BHK[..., None], rows(x_BHTD, far_BHK).astype(jnp.float32), c_BHKD)


def _descending(distance_BHT: Array) -> Int[Array, "B H T"]:
    """Returns the order of falling distances, the first of equal ones first; none is NaN or minus zero."""
    # As integers, which sort two to five times faster than floats, whose zeros and NaN are compared apart.
    # Not lax.top_k: with heads on several devices it would gather them all.
    bits_BHT = lax.bitcast_convert_type(distance_BHT.astype(jnp.float32), jnp.uint32)
    key_BHT = jnp.where(bits_BHT >> 31 == 1, bits_BHT, bits_BHT ^ jnp.uint32(0x7FFFFFFF))
    token_BHT = lax.broadcasted_iota(jnp.int32, distance_BHT.shape, 2)
    return lax.sort((key_BHT, token_BHT), dimension=2, is_stable=True, num_keys=1)[1]


def rows(
    table_BHKD: Float[Array, "B H K D"], ids_BHT: Int[Array, "B H T"] | UInt[Array, "B H T"]
) -> Float[Array, "B H T D"]:
    """Returns row `ids` of each head's table. The ids are in bounds, so no clamping per element."""

    def one(table_KD: Array, ids_T: Array) -> Array:
        return table_KD.at[ids_T].get(mode="promise_in_bounds")

    return jax.vmap(jax.vmap(one))(table_BHKD, ids_BHT.astype(jnp.int32))
