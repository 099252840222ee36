"""Flash attention of query tiles over one workspace, in Triton, for GPUs from Ampere on.

A program keeps a query tile, walks over its share of the keys in tiles, and holds m, l and acc in float32
all the while: they are read from where the segment before left them, and written for the next one.

Decoding is another kernel. A program has 128 queries of some thousands, so that dozens of programs would
decode the same keys again, and the workspace of a span fits or nearly fits into the second-level cache of
these GPUs.

Sizes are chosen so that tiles of keys and values in flight fit into 99 KiB, what a program may have on
GeForce and workstation cards (CUDA programming guide, table of technical specifications).

Source: Dao, FlashAttention-2 (arXiv 2307.08691), section 3.1; the running softmax: Milakov and
Gimelshein (arXiv 1805.02867).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array

from pallas_kernels.dequant_attention.reference import MASK_VALUE
from pallas_kernels.gpu.triton_launch import Launch

__all__ = ["TUNING", "Tuning", "launch_for", "segment"]

_MASK_VALUE = tl.constexpr(MASK_VALUE)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result beyond rounding.

    Attributes:
        q_tile: queries of a program.
        tile: keys that meet them at once.
        warps: warps of a program.
        stages: tiles of K and of V in flight.
    """

    q_tile: int
    tile: int
    warps: int
    stages: int


# By head_dim.
TUNING = {
    64: Tuning(q_tile=128, tile=64, warps=4, stages=3),
    128: Tuning(q_tile=128, tile=64, warps=8, stages=2),
    256: Tuning(q_tile=32, tile=32, warps=4, stages=2),
}


@triton.jit
def _visit(q, scale, k, v, token, valid, acc, m, l, MASKED: tl.constexpr, D: tl.constexpr):
    """Merges one tile of keys into the running softmax."""
    channel = tl.arange(0, D)
    at = token.to(tl.int64)[:, None] * D + channel[None, :]
    counts = token < valid
    if MASKED:
        keys = tl.load(k + at, mask=counts[:, None], other=0.0)
        values = tl.load(v + at, mask=counts[:, None], other=0.0)
    else:
        keys, values = tl.load(k + at), tl.load(v + at)
    s = tl.dot(q, tl.trans(keys))
    if MASKED:
        s = tl.where(counts[None, :], s, _MASK_VALUE)
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale[:, None] - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None])
    return acc, m_new, l


@triton.jit
def _segment(
    control, q, logits_scale, k, v, k_scale, v_scale, acc_state, m_state, l_state,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, FIRST: tl.constexpr, Q_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A query tile of a head, and one of SPLITS parts of the valid keys, whose number is `control`."""
    head, split = tl.program_id(1), tl.program_id(2)
    query = tl.program_id(0) * Q_TILE + tl.arange(0, Q_TILE)
    channel = tl.arange(0, D)
    valid = tl.load(control)
    tiles = (valid + TILE - 1) // TILE
    first, end = split * tiles // SPLITS, (split + 1) * tiles // SPLITS

    row = (split * ROWS + head).to(tl.int64) * QUERIES + query
    cell = row[:, None] * D + channel[None, :]
    scale_v = tl.load(v_scale + head)
    if FIRST:
        m = tl.full((Q_TILE,), _MASK_VALUE, tl.float32)
        l = tl.zeros((Q_TILE,), tl.float32)
        acc = tl.zeros((Q_TILE, D), tl.float32)
    else:
        m = tl.load(m_state + row)
        l = tl.load(l_state + row)
        acc = tl.load(acc_state + cell) / scale_v

    q_row = head.to(tl.int64) * QUERIES + query
    queries = tl.load(q + q_row[:, None] * D + channel[None, :])
    scale = tl.load(logits_scale + q_row) * tl.load(k_scale + head)
    k += head.to(tl.int64) * (TOKENS * D)
    v += head.to(tl.int64) * (TOKENS * D)

    # Only the very last tile can be partial.
    whole = tl.minimum(end, valid // TILE)
    for i in range(first, whole):
        token = i * TILE + tl.arange(0, TILE)
        acc, m, l = _visit(queries, scale, k, v, token, valid, acc, m, l, False, D)
    if whole < end:
        token = whole * TILE + tl.arange(0, TILE)
        acc, m, l = _visit(queries, scale, k, v, token, valid, acc, m, l, True, D)

    tl.store(acc_state + cell, acc * scale_v)
    tl.store(m_state + row, m)
    tl.store(l_state + row, l)


def launch_for(
    q_nQD: Array, k_nTD: Array, *, splits: int, first: bool, tuning: Tuning | None = None
) -> tuple[Launch, tuple[jax.ShapeDtypeStruct, ...]]:
    """The kernel and its outputs for a first segment, which are arguments of the others."""
    (rows, queries, d), tokens = q_nQD.shape, k_nTD.shape[1]
    tuning = TUNING[d] if tuning is None else tuning
    launch = Launch(
        kernel=_segment,
        grid=(queries // tuning.q_tile, rows, splits),
        constants=dict(
            ROWS=rows, QUERIES=queries, TOKENS=tokens, D=d, SPLITS=splits, FIRST=first,
            Q_TILE=tuning.q_tile, TILE=tuning.tile,
        ),
        warps=tuning.warps,
        stages=tuning.stages,
    )  # fmt: skip
    shape = (splits, rows, queries)
    shapes = ((*shape, d), shape, shape)
    return launch, tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)


def segment(
    q_nQD: Array,
    logits_scale_nQ: Array,
    k_nTD: Array,
    v_nTD: Array,
    valid: Array,
    k_scale_n: Array,
    v_scale_n: Array,
    state: Any,
    *,
    splits: int,
    tuning: Tuning | None = None,
) -> tuple[Array, Array, Array] | None:
    """Visits the first `valid[0]` keys of a workspace.

    Args:
        q_nQD: rotated queries, bf16; Q a multiple of the query tile.
        logits_scale_nQ: factor from q . k to base-2 logits; positive.
        k_nTD, v_nTD: keys and values, bf16; T a multiple of the tile. Tokens behind the valid ones are
            not read.
        valid: int32 [1], valid keys.
        k_scale_n, v_scale_n: scales of the rows of k and v.
        state: acc (P, n, Q, D), m and l (P, n, Q) of P splits, as jax references that are updated; None
            for a first segment.
        splits: P.
        tuning: sizes; None takes those for the head dim.

    Returns:
        The state after a first segment; otherwise nothing.
    """
    operands = (valid, q_nQD, logits_scale_nQ, k_nTD, v_nTD, k_scale_n, v_scale_n)
    launch, out = launch_for(q_nQD, k_nTD, splits=splits, first=state is None, tuning=tuning)
    if state is None:
        return tuple(launch(*operands, out=out))
    launch(*operands, *state, out=())
    return None
