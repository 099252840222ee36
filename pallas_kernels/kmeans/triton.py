"""One Lloyd iteration in Triton, for GPUs from Ampere on: two kernels, each of which reads x once.

The first finds the nearest centroid of every token, by products with 64 centroids after another.
The second adds up the tokens of 128 clusters, by products of one-hot rows with them, and counts.
As one kernel they would need the sums of all clusters beside the scores, more registers than exists
are. There are no atomics: the sums of every part of the tokens are stored and added in a fixed order.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array

from pallas_kernels.gpu.triton_launch import Launch

__all__ = ["TILE", "assign", "assign_launch", "sums", "sums_launch"]

TILE = 64  # tokens
_ASSIGNED = 128  # tokens that a program assigns
_AT_ONCE = 64  # centroids of a product
_CLUSTERS = {64: 128, 128: 128, 256: 64}  # clusters that a program sums, by head_dim


@triton.jit
def _assign(
    x, c, bias, ids, score,
    TOKENS: tl.constexpr, D: tl.constexpr, CENTROIDS: tl.constexpr, ASSIGNED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The first centroid with the largest x . c + bias, for some tokens of a row."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ASSIGNED + tl.arange(0, ASSIGNED)
    exists = token < TOKENS
    channel, column = tl.arange(0, D), tl.arange(0, AT_ONCE)
    at = x + row * (TOKENS * D) + token[:, None] * D + channel[None, :]
    tokens = tl.load(at, mask=exists[:, None], other=0.0)
    best = tl.full((ASSIGNED,), float("-inf"), tl.float32)
    which = tl.zeros((ASSIGNED,), tl.int32)
    for first in range(0, CENTROIDS, AT_ONCE):
        place = row * CENTROIDS + first + column
        centroids = tl.load(c + place[:, None] * D + channel[None, :])
        s = tl.dot(tokens, tl.trans(centroids)) + tl.load(bias + place)[None, :]
        largest = tl.max(s, 1)
        nearest = tl.min(tl.where(s == largest[:, None], first + column[None, :], CENTROIDS - 1), 1)
        which = tl.where(largest > best, nearest, which)
        best = tl.maximum(best, largest)
    tl.store(ids + row * TOKENS + token, which.to(ids.dtype.element_ty), mask=exists)
    tl.store(score + row * TOKENS + token, best, mask=exists)


@triton.jit
def _sums(
    x, ids, total, number,
    TOKENS: tl.constexpr, D: tl.constexpr, CENTROIDS: tl.constexpr, PARTS: tl.constexpr,
    CLUSTERS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums and numbers of the tokens of CLUSTERS clusters, in one of PARTS parts of the tokens."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cluster = tl.program_id(2) * CLUSTERS + tl.arange(0, CLUSTERS)
    channel = tl.arange(0, D)
    TILES: tl.constexpr = (TOKENS + TILE - 1) // TILE
    acc = tl.zeros((CLUSTERS, D), tl.float32)
    count = tl.zeros((CLUSTERS,), tl.int32)
    for i in range(part * TILES // PARTS, (part + 1) * TILES // PARTS):
        token = i * TILE + tl.arange(0, TILE)
        exists = token < TOKENS
        which = tl.load(ids + row * TOKENS + token, mask=exists, other=CENTROIDS).to(tl.int32)
        at = x + row * (TOKENS * D) + token[:, None] * D + channel[None, :]
        tokens = tl.load(at, mask=exists[:, None], other=0.0)
        hot = cluster[:, None] == which[None, :]
        acc = tl.dot(hot.to(tokens.dtype), tokens, acc)
        count += tl.sum(hot.to(tl.int32), 1)
    place = (row * PARTS + part) * CENTROIDS + cluster
    tl.store(total + place[:, None] * D + channel[None, :], acc)
    tl.store(number + place, count.to(tl.float32))


def assign_launch(x_RTD: Array, c_RKD: Array, id_dtype: jnp.dtype) -> tuple[Launch, tuple]:
    """The kernel that assigns, and its outputs: ids and scores (R, T)."""
    (rows, tokens, d), clusters = x_RTD.shape, c_RKD.shape[1]
    assigned = _ASSIGNED if d <= 128 else 64
    launch = Launch(
        kernel=_assign,
        grid=(-(-tokens // assigned), rows),
        constants=dict(TOKENS=tokens, D=d, CENTROIDS=clusters, ASSIGNED=assigned, AT_ONCE=_AT_ONCE),
        warps=8 if d == 128 else 4,
    )
    shape = rows, tokens
    return launch, (
        jax.ShapeDtypeStruct(shape, id_dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )


def sums_launch(x_RTD: Array, clusters: int, parts: int) -> tuple[Launch, tuple]:
    """The kernel that adds up, and its outputs: (R, P, K, D) and (R, P, K)."""
    rows, tokens, d = x_RTD.shape
    launch = Launch(
        kernel=_sums,
        grid=(parts, rows, clusters // _CLUSTERS[d]),
        constants=dict(
            TOKENS=tokens, D=d, CENTROIDS=clusters, PARTS=parts, CLUSTERS=_CLUSTERS[d], TILE=TILE
        ),
        warps=8,
    )  # fmt: skip
    shape = rows, parts, clusters
    return launch, tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, d), shape))


def assign(x_RTD: Array, c_RKD: Array, bias_RK: Array, id_dtype: jnp.dtype) -> tuple[Array, Array]:
    """Nearest centroids and their scores.

    Args:
        x_RTD: tokens, bf16.
        c_RKD: 128 or 256 centroids, bf16.
        bias_RK: float32, what is added to x . c.
        id_dtype: an integer type.

    Returns:
        ids (R, T), the first one of several as good; x . c + bias (R, T).
    """
    launch, out = assign_launch(x_RTD, c_RKD, id_dtype)
    return tuple(launch(x_RTD, c_RKD, bias_RK, out=out))


def sums(x_RTD: Array, ids_RT: Array, clusters: int, parts: int) -> tuple[Array, Array]:
    """Sums (R, P, K, D) and numbers (R, P, K), float32, of the tokens of each cluster.

    Args:
        x_RTD: tokens, bf16.
        ids_RT: int32.
        clusters: K, a multiple of 128.
        parts: P, parts of the tokens that are summed apart.
    """
    launch, out = sums_launch(x_RTD, clusters, parts)
    return tuple(launch(x_RTD, ids_RT, out=out))
