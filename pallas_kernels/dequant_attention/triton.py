"""Flash attention of a block of queries over one workspace, in Triton, for GPUs from Ampere on.

A program keeps a block of queries, walks over its share of the keys in tiles, and holds maximum,
sum and weighted values in float32 all the while: read from where the segment before left them,
written for the next one. Decoding is another kernel and not part of this one: a program has 128
queries of some thousands, so that it would be repeated for every one of dozens of blocks, and the
workspace of a span fits or nearly fits into the second-level cache of these GPUs.

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

from pallas_kernels.dequant_attention.reference import FAR
from pallas_kernels.gpu.triton_launch import Launch

__all__ = ["TUNING", "Tuning", "launch_for", "segment"]

_FAR = tl.constexpr(FAR)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result beyond rounding.

    Attributes:
        block: queries of a program.
        tile: keys that meet them at once.
        warps: of a program.
        stages: tiles of K and of V in flight.
    """

    block: int
    tile: int
    warps: int
    stages: int


# By head_dim.
TUNING = {
    64: Tuning(block=128, tile=64, warps=4, stages=3),
    128: Tuning(block=128, tile=64, warps=8, stages=2),
    256: Tuning(block=32, tile=32, warps=4, stages=2),
}


@triton.jit
def _visit(q, factor, k, v, token, valid, acc, top, total, MASKED: tl.constexpr, D: tl.constexpr):
    """One tile of keys merged into the running softmax."""
    channel = tl.arange(0, D)
    at = token.to(tl.int64)[:, None] * D + channel[None, :]
    there = token < valid
    if MASKED:
        keys = tl.load(k + at, mask=there[:, None], other=0.0)
        values = tl.load(v + at, mask=there[:, None], other=0.0)
    else:
        keys, values = tl.load(k + at), tl.load(v + at)
    s = tl.dot(q, tl.trans(keys))
    if MASKED:
        s = tl.where(there[None, :], s, _FAR)
    new_top = tl.maximum(top, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor[:, None] - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None])
    return acc, new_top, total


@triton.jit
def _segment(
    control, q, factor, k, v, k_unit, v_unit, acc_state, top_state, total_state,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A block of queries of a head, and one of SPLITS parts of the valid keys."""
    head, part = tl.program_id(1), tl.program_id(2)
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    valid = tl.load(control)
    tiles = (valid + TILE - 1) // TILE
    first, last = part * tiles // SPLITS, (part + 1) * tiles // SPLITS

    row = (part * ROWS + head).to(tl.int64) * QUERIES + query
    cell = row[:, None] * D + channel[None, :]
    unit = tl.load(v_unit + head)
    if FIRST:
        top = tl.full((BLOCK,), _FAR, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        acc = tl.zeros((BLOCK, D), tl.float32)
    else:
        top = tl.load(top_state + row)
        total = tl.load(total_state + row)
        acc = tl.load(acc_state + cell) / unit

    mine = head.to(tl.int64) * QUERIES + query
    queries = tl.load(q + mine[:, None] * D + channel[None, :])
    scale = tl.load(factor + mine) * tl.load(k_unit + head)
    k += head.to(tl.int64) * (TOKENS * D)
    v += head.to(tl.int64) * (TOKENS * D)

    # Only the very last tile can be partial.
    whole = tl.minimum(last, valid // TILE)
    for i in range(first, whole):
        token = i * TILE + tl.arange(0, TILE)
        acc, top, total = _visit(queries, scale, k, v, token, valid, acc, top, total, False, D)
    if whole < last:
        token = whole * TILE + tl.arange(0, TILE)
        acc, top, total = _visit(queries, scale, k, v, token, valid, acc, top, total, True, D)

    tl.store(acc_state + cell, acc * unit)
    tl.store(top_state + row, top)
    tl.store(total_state + row, total)


def launch_for(
    q_nQD: Array, k_nTD: Array, *, splits: int, first: bool, tuning: Tuning | None = None
) -> tuple[Launch, tuple[jax.ShapeDtypeStruct, ...]]:
    """The kernel and its outputs for a first segment, which are arguments of the others."""
    (rows, queries, d), tokens = q_nQD.shape, k_nTD.shape[1]
    tuning = TUNING[d] if tuning is None else tuning
    launch = Launch(
        kernel=_segment,
        grid=(queries // tuning.block, rows, splits),
        constants=dict(
            ROWS=rows, QUERIES=queries, TOKENS=tokens, D=d, SPLITS=splits, FIRST=first,
            BLOCK=tuning.block, TILE=tuning.tile,
        ),
        warps=tuning.warps,
        stages=tuning.stages,
    )  # fmt: skip
    form = (splits, rows, queries)
    shapes = ((*form, d), form, form)
    return launch, tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)


def segment(
    q_nQD: Array,
    factor_nQ: Array,
    k_nTD: Array,
    v_nTD: Array,
    control: Array,
    k_unit_n: Array,
    v_unit_n: Array,
    state: Any,
    *,
    splits: int,
    tuning: Tuning | None = None,
) -> tuple[Array, Array, Array] | None:
    """Visits the first `control[0]` keys of a workspace.

    Args:
        q_nQD: rotated queries, bf16; Q a multiple of the block.
        factor_nQ: what turns q . k into base-2 logits; positive.
        k_nTD, v_nTD: keys and values, bf16; T a multiple of the tile. What lies behind the valid
            tokens is not read.
        control: int32 [1], valid keys.
        k_unit_n, v_unit_n: units of the rows of k and v.
        state: running weighted values (P, n, Q, D), maximum and sum (P, n, Q) of P splits, as
            jax references that are updated; None for a first segment.
        splits: P.
        tuning: sizes; None takes those for the head_dim.

    Returns:
        The state after a first segment; otherwise nothing.
    """
    operands = (control, q_nQD, factor_nQ, k_nTD, v_nTD, k_unit_n, v_unit_n)
    launch, out = launch_for(q_nQD, k_nTD, splits=splits, first=state is None, tuning=tuning)
    if state is None:
        return tuple(launch(*operands, out=out))
    launch(*operands, *state, out=())
    return None
