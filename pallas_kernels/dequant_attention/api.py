"""Attention of a block of queries to segments of decoded keys and values, in one running softmax.

    queries = prepare(q_nQD, scale, dtype)
    state = visit(queries, k, v, valid, splits=P)            # a first segment
    refs = [jax.new_ref(x) for x in state]
    visit(queries, k, v, valid, state=refs, splits=P)        # any number of others, in place
    o_nQD = finish([r[...] for r in refs], Q)

Axes: n rows (batch and heads), Q queries of a row, T tokens, D head dim, P splits.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dequant_attention import mosaic_gpu, reference
from pallas_kernels.dequant_attention.queries import TOP, grouped
from pallas_kernels.dequant_attention.schedule import (
    BYTES_PER_NS,
    NS_PER_KEY,
    PROCESSORS,
    STATE_BYTES,
    Schedule,
)
from pallas_kernels.dequant_attention.sizes import BLOCK, TUNING, Tuning
from pallas_kernels.dequantize.types import HEAD_DIMS, PAD
from pallas_kernels.gpu.triton_launch import missing

__all__ = ["Queries", "finish", "prepare", "prepare_tokens", "splits_for", "visit"]


class Queries(NamedTuple):
    """Queries as the kernel wants them, and what makes base-2 logits of their products."""

    q_nQD: Array
    factor_nQ: Array


def prepare(q_nQD: Float[Array, "n Q D"], scale: Float[Array, ""], dtype: Any) -> Queries:
    """Pads queries to whole blocks; for e4m3 each row comes with its own unit."""
    pad = -q_nQD.shape[1] % BLOCK
    q_nQD = jnp.pad(q_nQD, ((0, 0), (0, pad), (0, 0)))
    factor_nQ = jnp.full(q_nQD.shape[:2], 1.0, jnp.float32) * (scale * math.log2(math.e))
    if jnp.dtype(dtype) == jnp.bfloat16:
        return Queries(q_nQD.astype(dtype), factor_nQ)
    q_nQD = q_nQD.astype(jnp.float32)
    largest_nQ = jnp.max(jnp.abs(q_nQD), axis=-1)
    unit_nQ = jnp.where(largest_nQ > 0, largest_nQ, 1) / TOP
    return Queries((q_nQD / unit_nQ[..., None]).astype(dtype), factor_nQ * unit_nQ)


def prepare_tokens(
    q_BTHD: Float[Array, "B T H D"],
    scale: Float[Array, ""],
    *,
    batch: int,
    heads: int,
    tables: tuple[Float[Array, "b T D/2"], Float[Array, "b T D/2"]] | None,
    pairing: str,
    narrow: bool,
    implementation: str = "mosaic",
) -> tuple[Queries, Queries]:
    """`prepare` of new tokens, rotated, for the rows of a cache: in bf16, and if `narrow` in e4m3.

    Row b h holds every query that reads head h of video b. With R = B / batch branches and G = H /
    heads query heads for each, query (r G + g) T + t of it is token t of head h G + g of r b.

    Args:
        q_BTHD: bf16 queries before RoPE.
        scale: factor of the logits.
        batch, heads: of the cache.
        tables: cosine and sine of every token; None for no rotation.
        pairing: of the rotation, as in `decode_keys`.
        narrow: whether e4m3 is wanted; otherwise both results are the same.
        implementation: "mosaic" (head_dim 64, 128 or 256) or "reference".

    Raises:
        ValueError: an unknown implementation.
    """
    if implementation == "reference":
        q_nQD = reference.grouped(q_BTHD, tables, batch, heads, pairing)
        wide = prepare(q_nQD, scale, jnp.bfloat16)
        return wide, prepare(q_nQD, scale, jnp.float8_e4m3fn) if narrow else wide
    if implementation != "mosaic":
        raise ValueError(f"implementation={implementation!r}; accepted: 'mosaic', 'reference'")
    rows, tokens, all_heads, _ = q_BTHD.shape
    size = -(-rows * tokens * all_heads // (batch * heads) // BLOCK) * BLOCK
    scale = scale * math.log2(math.e)
    wide, *more = grouped(
        q_BTHD, scale, tables, batch=batch, heads=heads, size=size, pairing=pairing, narrow=narrow
    )
    wide = Queries(wide, jnp.full(wide.shape[:2], scale, jnp.float32))
    return wide, Queries(*more) if narrow else wide


def splits_for(
    rows: int,
    queries: int,
    tokens: int,
    segments: int,
    narrow: bool,
    processors: int = PROCESSORS,
) -> int:
    """Into how many parts a segment's keys are split.

    More parts fill the last wave of blocks better, but each has a state that every segment reads
    and writes. The least of waves * keys * time per key + traffic of the state, from 1 to 16.

    Args:
        rows, queries: n and Q.
        tokens: keys of a typical segment.
        segments: how many segments there are.
        narrow: whether keys are in e4m3.
        processors: multiprocessors of the GPU.
    """
    blocks = rows * -(-queries // BLOCK)

    def nanoseconds(parts: int) -> float:
        waves = -(-blocks * parts // processors)
        busy = waves * tokens / parts * NS_PER_KEY[narrow]
        return segments * busy + 2 * (segments + 1) * blocks * parts * STATE_BYTES / BYTES_PER_NS

    return min(range(1, max(1, min(16, tokens // 1024)) + 1), key=nanoseconds)


def visit(
    queries: Queries,
    k_nTD: Array,
    v: Array,
    valid: Int[Array, ""],
    *,
    k_unit_n: Array | None = None,
    v_unit_n: Array | None = None,
    state: Any = None,
    splits: int | Schedule = 1,
    tuning: Tuning | None = None,
    implementation: str = "mosaic",
) -> tuple[Array, Array, Array] | None:
    """Merges one segment into the running softmax; see `segment` of `mosaic_gpu` and `triton`.

    Args:
        queries: from `prepare`.
        k_nTD, v: from `decode_keys` and `decode_values`, of the same dtype.
        valid: tokens that count; may be traced, may be zero.
        k_unit_n, v_unit_n: units they were decoded with; None is one.
        state: jax references to update, or None for a first segment.
        splits: P, or for "mosaic" a `Schedule`; the same for all segments of a state.
        tuning: of "mosaic"; None takes the measured one.
        implementation: "mosaic" (Hopper), or "triton" (bfloat16); both know D 64, 128 and 256.

    Raises:
        NotImplementedError: "triton" with e4m3, with another D, or not installed.
        ValueError: dtypes or shapes that do not belong together, for "mosaic" another D, or an
            unknown implementation.
    """
    if implementation == "triton":
        if isinstance(splits, Schedule):
            raise NotImplementedError(f"implementation='triton': {splits=}; it reads a number")
        return _visit_by_triton(queries, k_nTD, v, valid, k_unit_n, v_unit_n, state, splits)
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
    narrow = q_nQD.dtype != jnp.bfloat16
    want = (n, d, tokens) if narrow else (n, tokens, d)
    if q_nQD.shape[0] != n or q_nQD.shape[2] != d or v.shape != want or d not in accepted:
        raise ValueError(
            f"shapes {q_nQD.shape=}, {k_nTD.shape=}, {v.shape=}; accepted: (n, Q, D), (n, T, D) "
            f"and {'(n, D, T)' if narrow else '(n, T, D)'}, D one of {accepted}"
        )
    blocks = n * q_nQD.shape[1] // BLOCK
    if isinstance(splits, Schedule) and splits.blocks != blocks:
        raise ValueError(f"{splits=}; accepted: one of {blocks} blocks of {BLOCK} queries")
    tuning = TUNING[q_nQD.dtype.name][d] if tuning is None else tuning
    if tokens % tuning.tile or q_nQD.shape[1] % BLOCK:
        raise ValueError(
            f"T={tokens} and Q={q_nQD.shape[1]}; accepted: multiples of {tuning.tile}, {BLOCK}"
        )
    ones = jnp.ones((n,), jnp.float32)
    return mosaic_gpu.segment(
        q_nQD,
        queries.factor_nQ,
        k_nTD,
        v,
        jnp.asarray(valid, jnp.int32).reshape(1),
        ones if k_unit_n is None else k_unit_n,
        ones if v_unit_n is None else v_unit_n,
        state,
        splits=splits,
        tuning=tuning,
    )


def _visit_by_triton(queries, k_nTD, v_nTD, valid, k_unit_n, v_unit_n, state, splits):
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
    if tokens % PAD or q_nQD.shape[1] % BLOCK:
        raise ValueError(
            f"T={tokens} and Q={q_nQD.shape[1]}; accepted: multiples of {PAD}, {BLOCK}"
        )
    if (why := missing()) is not None:
        raise NotImplementedError(f"implementation='triton': {why}")
    from pallas_kernels.dequant_attention import triton

    ones = jnp.ones((n,), jnp.float32)
    units = [ones if u is None else u for u in (k_unit_n, v_unit_n)]
    control = jnp.asarray(valid, jnp.int32).reshape(1)
    return triton.segment(*queries, k_nTD, v_nTD, control, *units, state, splits=splits)


def finish(state: Any, queries: int) -> Float[Array, "n Q D"]:
    """Joins the splits: sum_p 2^(m_p - m) out_p / sum_p 2^(m_p - m) sum_p, float32."""
    acc_PnQD, top_PnQ, total_PnQ = (x[:, :, :queries] for x in state)
    weight_PnQ = jnp.exp2(top_PnQ - top_PnQ.max(axis=0, keepdims=True))
    total_nQ = jnp.sum(weight_PnQ * total_PnQ, axis=0)
    return jnp.sum(weight_PnQ[..., None] * acc_PnQD, axis=0) / total_nQ[..., None]
