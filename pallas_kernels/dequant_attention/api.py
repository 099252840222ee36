"""Attention of queries to segments of decoded keys and values, in one running softmax.

    queries = prepare(q_nQD, logits_scale, dtype)
    state = visit(queries, k, v, valid, splits=P)            # a first segment
    refs = [jax.new_ref(x) for x in state]
    visit(queries, k, v, valid, state=refs, splits=P)        # any number of others, in place
    o_nQD = combine_splits([r[...] for r in refs], Q)

Axes: n rows (batch and heads), Q queries of a row, T tokens, D head dim, P splits.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dequant_attention import reference
from pallas_kernels.dequant_attention.schedule import Schedule
from pallas_kernels.dequant_attention.tuning import Q_TILE, TUNING, Tuning, largest_query
from pallas_kernels.dequantize.types import HEAD_DIMS, PAD, Rotation
from pallas_kernels.gpu.triton_launch import missing

__all__ = ["Queries", "prepare", "prepare_tokens", "visit"]


class Queries(NamedTuple):
    """Queries as the kernel reads them, and the factor from q . k to base-2 logits."""

    q_nQD: Array
    logits_scale_nQ: Array


def prepare(q_nQD: Float[Array, "n Q D"], logits_scale: Float[Array, ""], dtype: Any) -> Queries:
    """Queries padded to whole query tiles, in bf16, or in e4m3 with a scale for every query."""
    pad = -q_nQD.shape[1] % Q_TILE
    q_nQD = jnp.pad(q_nQD, ((0, 0), (0, pad), (0, 0)))
    logits_scale_nQ = jnp.full(q_nQD.shape[:2], 1.0, jnp.float32)
    logits_scale_nQ *= logits_scale * math.log2(math.e)
    if jnp.dtype(dtype) == jnp.bfloat16:
        return Queries(q_nQD.astype(dtype), logits_scale_nQ)
    q_nQD = q_nQD.astype(jnp.float32)
    largest_nQ = jnp.max(jnp.abs(q_nQD), axis=-1)
    scale_nQ = jnp.where(largest_nQ > 0, largest_nQ, 1) / largest_query(q_nQD.shape[-1])
    return Queries((q_nQD / scale_nQ[..., None]).astype(dtype), logits_scale_nQ * scale_nQ)


def prepare_tokens(
    q_BTHD: Float[Array, "B T H D"],
    logits_scale: Float[Array, ""],
    *,
    batch: int,
    heads: int,
    rotation: Rotation | None,
    fp8: bool,
    implementation: str = "mosaic",
) -> tuple[Queries, Queries]:
    """`prepare` of new tokens, rotated, for the rows of a cache: in bf16, and if `fp8` in e4m3.

    Row b h holds every query that reads head h of video b. With R = B / batch branches and G = H /
    heads query heads for each, query (r G + g) T + t of it is token t of head h G + g of r b.

    Args:
        q_BTHD: bf16 queries before RoPE.
        logits_scale: factor of the logits.
        batch, heads: sizes of the cache.
        rotation: RoPE of the queries, a row of cosines and sines for every video of the cache; or None.
        fp8: whether e4m3 is wanted; otherwise both results are the same.
        implementation: "mosaic" (head_dim 64, 128 or 256) or "reference".

    Raises:
        ValueError: an unknown implementation, or a rotation of another batch.
    """
    if implementation not in ("mosaic", "reference"):
        raise ValueError(f"implementation={implementation!r}; accepted: 'mosaic', 'reference'")
    if rotation is not None and rotation.batch != batch:
        raise ValueError(f"rotation.batch={rotation.batch}; accepted: {batch=}, the cache's")
    if implementation == "reference":
        q_nQD = reference.grouped(q_BTHD, rotation, batch, heads)
        wide = prepare(q_nQD, logits_scale, jnp.bfloat16)
        return wide, prepare(q_nQD, logits_scale, jnp.float8_e4m3fn) if fp8 else wide
    from pallas_kernels.dequant_attention.queries import grouped

    rows, tokens, all_heads, _ = q_BTHD.shape
    size = -(-rows * tokens * all_heads // (batch * heads) // Q_TILE) * Q_TILE
    logits_scale = logits_scale * math.log2(math.e)
    wide, *more = grouped(
        q_BTHD, logits_scale, rotation, batch=batch, heads=heads, size=size, fp8=fp8
    )
    wide = Queries(wide, jnp.full(wide.shape[:2], logits_scale, jnp.float32))
    return wide, Queries(*more) if fp8 else wide


def visit(
    queries: Queries,
    k_nTD: Array,
    v: Array,
    valid: Int[Array, ""],
    *,
    k_scale_n: Array | None = None,
    v_scale_n: Array | None = None,
    state: Any = None,
    splits: int | Schedule = 1,
    tuning: Tuning | None = None,
    implementation: str = "mosaic",
) -> tuple[Array, Array, Array] | None:
    """Merges one segment into the running softmax (acc, m, l); see `segment` of `mosaic_gpu` and `triton`.

    Args:
        queries: from `prepare`.
        k_nTD, v: from `decode_keys` and `decode_values`, of the same dtype.
        valid: keys that count; may be traced, may be zero.
        k_scale_n, v_scale_n: scales of the rows they were decoded with; None is one.
        state: jax references to update, or None for a first segment.
        splits: P, or for "mosaic" a `Schedule`; the same for all segments of a state.
        tuning: sizes for "mosaic"; None takes the measured ones.
        implementation: "mosaic" (Hopper), or "triton" (bfloat16); both know D 64, 128 and 256.

    Raises:
        NotImplementedError: "triton" with e4m3, with another D, or not installed.
        ValueError: dtypes or shapes that do not belong together, for "mosaic" another D, or an
            unknown implementation.
    """
    if implementation == "triton":
        if isinstance(splits, Schedule):
            raise NotImplementedError(f"implementation='triton': {splits=}; it reads a number")
        return _visit_by_triton(queries, k_nTD, v, valid, k_scale_n, v_scale_n, state, splits)
    if implementation != "mosaic":
        raise ValueError(f"implementation={implementation!r}; accepted: 'mosaic', 'triton'")
    q_nQD = queries.q_nQD
    if not q_nQD.dtype == k_nTD.dtype == v.dtype or q_nQD.dtype.name not in TUNING:
        raise ValueError(
            f"q, k, v have dtypes {q_nQD.dtype}, {k_nTD.dtype}, {v.dtype}; accepted: bfloat16 or "
            "float8_e4m3fn for all three"
        )
    accepted = tuple(TUNING[q_nQD.dtype.name])
    n, tokens, d = k_nTD.shape
    fp8 = q_nQD.dtype != jnp.bfloat16
    want = (n, d, tokens) if fp8 else (n, tokens, d)
    if q_nQD.shape[0] != n or q_nQD.shape[2] != d or v.shape != want or d not in accepted:
        raise ValueError(
            f"shapes {q_nQD.shape=}, {k_nTD.shape=}, {v.shape=}; accepted: (n, Q, D), (n, T, D) "
            f"and {'(n, D, T)' if fp8 else '(n, T, D)'}, D one of {accepted}"
        )
    query_tiles = n * q_nQD.shape[1] // Q_TILE
    if isinstance(splits, Schedule) and splits.query_tiles != query_tiles:
        raise ValueError(f"{splits=}; accepted: one of {query_tiles} query tiles of {Q_TILE}")
    tuning = TUNING[q_nQD.dtype.name][d] if tuning is None else tuning
    if tokens % tuning.tile or q_nQD.shape[1] % Q_TILE:
        raise ValueError(
            f"T={tokens} and Q={q_nQD.shape[1]}; accepted: multiples of {tuning.tile}, {Q_TILE}"
        )
    from pallas_kernels.dequant_attention import mosaic_gpu

    ones = jnp.ones((n,), jnp.float32)
    return mosaic_gpu.segment(
        q_nQD,
        queries.logits_scale_nQ,
        k_nTD,
        v,
        jnp.asarray(valid, jnp.int32).reshape(1),
        ones if k_scale_n is None else k_scale_n,
        ones if v_scale_n is None else v_scale_n,
        state,
        splits=splits,
        tuning=tuning,
    )


def _visit_by_triton(queries, k_nTD, v_nTD, valid, k_scale_n, v_scale_n, state, splits):
    q_nQD, (n, tokens, d) = queries.q_nQD, k_nTD.shape
    if q_nQD.shape[0] != n or q_nQD.shape[2] != d or v_nTD.shape != k_nTD.shape:
        raise ValueError(
            f"shapes {q_nQD.shape=}, {k_nTD.shape=}, {v_nTD.shape=}; accepted: (n, Q, D) and "
            "twice (n, T, D)"
        )
    types = {x.dtype.name for x in (q_nQD, k_nTD, v_nTD)}
    if types != {"bfloat16"} or d not in HEAD_DIMS:
        raise NotImplementedError(
            f"implementation='triton': dtypes {sorted(types)}, head_dim={d}; the kernel reads "
            "bfloat16 with head_dim 64, 128 or 256"
        )
    if tokens % PAD or q_nQD.shape[1] % Q_TILE:
        raise ValueError(
            f"T={tokens} and Q={q_nQD.shape[1]}; accepted: multiples of {PAD}, {Q_TILE}"
        )
    if (why := missing()) is not None:
        raise NotImplementedError(f"implementation='triton': {why}")
    from pallas_kernels.dequant_attention import triton

    ones = jnp.ones((n,), jnp.float32)
    scales = [ones if s is None else s for s in (k_scale_n, v_scale_n)]
    valid = jnp.asarray(valid, jnp.int32).reshape(1)
    return triton.segment(*queries, k_nTD, v_nTD, valid, *scales, state, splits=splits)
