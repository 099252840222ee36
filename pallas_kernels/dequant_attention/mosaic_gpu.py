"""Flash attention of a block of queries over one workspace of decoded keys and values, on Hopper.

Two warpgroups compute, 64 queries each, and one loads; in bf16 a block of the GPU does one piece after
another, and the next one's keys are loaded while the last one's result is written. Keys are visited
in tiles, with a running maximum and sum in base 2 and the weighted values in float32, which start from
what earlier segments left and are left for the next, in e4m3 as bf16: the history is one softmax however
many segments it comes in. A segment's tiles can be split among blocks, each with its own running state;
`finish` and `join` put them together.

In e4m3 the second product starts from zero at every tile and is added in float32. The 8-bit tensor
cores of Hopper keep about 14 bits of their accumulator: accumulating 18,720 values of mean 0.5 in
it came out 12 % short on an H100, this way 0.1 %. The probabilities are scaled by 2 ** 8, into the
middle of e4m3's range.

Measured there, 12 heads, 4,736 queries, 37,440 keys in two parts: e4m3 880 TFLOP/s (743 without
turns, 826 at tiles of 128), bf16 594 (564 without turns). Issuing the logits of a tile together
with the values of the one before it, and computing the softmax while the latter are multiplied,
was slower: 704 and 573. All of it at 128 channels a head.

At 256 channels the weighted values of a query are 128 registers of a thread. In bf16 a tile has 64 keys
then, and its product is added where they are. In e4m3 each tile's product needs registers of its own,
so it comes in two halves of the channels; the compiler still moves about a quarter of the registers
through local memory in every step.

Source: Dao et al., FlashAttention (arXiv 2205.14135), algorithm 1; Shah et al., FlashAttention-3
(arXiv 2407.08608), sections 3.1 and 3.3, for warp specialisation and 8-bit operands; accumulation
precision: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dequant_attention.registers import (
    as_words,
    fold,
    left_operand,
    over_columns,
    product,
)
from pallas_kernels.dequant_attention.schedule import Schedule
from pallas_kernels.dequant_attention.shared import scratch

__all__ = ["Tuning", "segment"]

ROWS = 64  # queries of a computing warpgroup
BLOCK = 2 * ROWS  # queries of a block
_MOST_BESIDE = 128  # channels of weighted values beside which a product of as many fits
FAR = -1e30  # maximum before any key: finite, so that differences never are NaN

_W = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result beyond rounding.

    Attributes:
        tile: keys that meet the queries at once, at most 256.
        stages: tiles of K and of V in flight.
        registers: of a computing and of a loading thread; twice the first and once the second are
            at most 504, which is what three warpgroups start with.
    """

    tile: int
    stages: int
    registers: tuple[int, int] = (232, 40)


class _Task(NamedTuple):
    """Some tiles of keys for a block of queries."""

    head: Any
    query: Any  # the first one
    own: Any  # where its state is, for this warpgroup
    last: Any  # tile after the last one
    count: Any  # tiles


def segment(
    q_nQD: Array,
    factor_nQ: Array,
    k_mTD: Array,
    v: Array,
    control: Array,
    k_unit_m: Array,
    v_unit_m: Array,
    state: tuple[Any, Any, Any] | None,
    *,
    splits: int | Schedule,
    tuning: Tuning,
) -> tuple[Array, Array, Array] | None:
    """Visits the first `control[0]` keys of a workspace.

    Args:
        q_nQD: rotated queries, bf16 or e4m3; Q a multiple of `BLOCK`, D 64, 128 or 256.
        factor_nQ: what turns q . k into base-2 logits.
        k_mTD: keys as `decode_keys` gives them, of q's dtype; T a multiple of the tile.
        v: values as `decode_values` gives them.
        control: int32 [1], valid keys.
        k_unit_m, v_unit_m: units of the rows of k and v.
        state: running weighted values (P, n, Q, D), maximum and sum (P, n, Q) of P splits, or
            (pieces, BLOCK, D) and (pieces, BLOCK) of a schedule, as jax references that are
            updated; None for a first segment.
        splits: P, or a schedule of all blocks of queries.
        tuning: sizes.

    Returns:
        The state after a first segment; otherwise nothing.
    """
    n, queries, d = q_nQD.shape
    narrow, scheduled = q_nQD.dtype != jnp.bfloat16, isinstance(splits, Schedule)
    # In e4m3 every other way to spend the registers was slower: one task after another without a
    # spill 5 to 9 %, queries from the loading warpgroup 3 %.
    alone = narrow or not scheduled
    tile, stages = tuning.tile, tuning.stages
    shift = 8.0 if narrow else 0.0
    held = min(d, _MOST_BESIDE) if narrow else d  # channels of an accumulator

    def body(
        *refs, q_s, k_s, v_s, q_full, q_empty, k_full, v_full, k_empty, v_empty, turn
    ):  # fmt: skip
        q_g, factor_g, k_g, v_g, control_g, ku_g, vu_g, acc_g, max_g, sum_g = refs
        wg, valid = lax.axis_index("wg"), control_g[0]
        row = lambda ref: plgpu.load(ref, layout=_W.reduce(1), optimized=False)  # noqa: E731

        def task(piece):
            """What is to be done at once: queries of a head and some tiles of its keys."""
            if scheduled:
                block, part, parts = splits.place(piece)
                head, block = lax.div(block, queries // BLOCK), lax.rem(block, queries // BLOCK)
                own = (piece, pl.ds(wg * ROWS, ROWS))  # in the state
            else:
                part, head, block = (lax.axis_index(a) for a in ("part", "head", "block"))
                own, parts = (part, head, pl.ds(block * BLOCK + wg * ROWS, ROWS)), splits
            tiles = (valid + (tile - 1)) // tile
            first, last = part * tiles // parts, (part + 1) * tiles // parts
            return _Task(head, block * BLOCK, own, last, last - first)

        def each(do):
            """do(task, tiles of the tasks before it), for one task after another."""
            start = lax.axis_index("program") if scheduled else None
            if alone:
                do(task(start), 0)
                return
            programs = splits.programs

            def one(i, done):
                mine = task(start + i * programs)
                do(mine, done)
                return done + mine.count

            some = lax.div(splits.pieces - start + (programs - 1), programs)
            lax.fori_loop(0, some, one, jnp.int32(0))

        def compute(mine, done):
            """Tiles from the last to the first: only the last can be partial."""
            head, last, count = mine.head, mine.last, mine.count
            rows = pl.ds(mine.query + wg * ROWS, ROWS)
            factor = row(factor_g.at[head, rows]) * ku_g[head]

            def weights(s, top):
                largest = fold(s, jnp.maximum, 8).max(axis=1)
                new_top = jnp.maximum(top, largest * factor - shift)
                p = jnp.exp2(s * over_columns(factor, s.shape) - over_columns(new_top, s.shape))
                total, p = fold(p, jnp.add, 8), p.astype(q_nQD.dtype)
                return as_words(p) if narrow else p, total, new_top

            def filled(i):
                """The slot of tile i of the values, when they are there."""
                slot = lax.rem(done + i, stages)
                plgpu.barrier_wait(v_full.at[slot])
                return slot

            def values(slot, c):
                """Those of the channels that accumulator c holds."""
                if not narrow:
                    return v_s.at[slot]
                right = v_s.at[slot] if held == d else v_s.at[slot, pl.ds(c * held, held)]
                return right.T

            def left(p):
                return left_operand(p, q_nQD.dtype) if narrow else p

            # The warpgroups take turns at the matrix units: one computes its softmax while the
            # other multiplies. Left alone they fall into step and wait for the same unit.
            def my_turn():
                plgpu.barrier_wait(turn.at[wg])

            def your_turn():
                plgpu.barrier_arrive(turn.at[1 - wg])

            @pl.when((wg == 1) & (done == 0))
            def _():
                your_turn()

            def first_logits(acc_s):
                slot = 0 if alone else lax.rem(done, stages)
                plgpu.barrier_wait(k_full.at[slot])
                my_turn()
                plgpu.wgmma(acc_s, q_s.at[wg], k_s.at[slot].T)
                your_turn()
                s = acc_s[...]
                plgpu.barrier_arrive(k_empty.at[slot])
                return s

            s = pl.run_scoped(first_logits, plgpu.ACC((ROWS, tile), jnp.float32))
            column = plgpu.broadcasted_iota(jnp.int32, (ROWS, tile), 1, layout=_W)
            if narrow:  # the inverse of key_row_of_token
                inside = ((column & 6) << 1) | ((column >> 2) & 2) | (column & 1)
                column = (column & -16) | inside
            s = jnp.where(column + (last - 1) * tile < valid, s, FAR)
            top = plgpu.layout_cast(jnp.full((ROWS,), FAR, jnp.float32), _W.reduce(1))
            p, total, top = weights(s, top)
            accs = tuple(
                plgpu.layout_cast(jnp.zeros((ROWS, held), jnp.float32), _W)
                for _ in range(d // held)
            )
            fade = plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), _W.reduce(1))

            def added(acc, fade, p, right):
                """acc fade + p right"""
                faded = acc * over_columns(fade, acc.shape)
                if narrow:
                    return faded + product(left(p), right, acc.shape)
                multiply = pl.run_state(lambda acc_o: plgpu.wgmma(acc_o, left(p), right))
                return multiply(plgpu.ACC.init(faded))

            def step(i, carry):
                """Weighted values of tile i - 1, then logits of tile i."""
                accs, p, total, top, fade = carry
                slot = lax.rem(done + i, stages)
                before = filled(i - 1)
                plgpu.barrier_wait(k_full.at[slot])
                my_turn()
                accs = tuple(added(acc, fade, p, values(before, c)) for c, acc in enumerate(accs))
                plgpu.barrier_arrive(v_empty.at[before])
                s = product(q_s.at[wg], k_s.at[slot].T, (ROWS, tile))
                your_turn()
                plgpu.barrier_arrive(k_empty.at[slot])
                p, part_total, new_top = weights(s, top)
                fade = jnp.exp2(top - new_top)
                total = total * over_columns(fade, total.shape) + part_total
                return accs, p, total, new_top, fade

            accs, p, total, top, fade = lax.fori_loop(1, count, step, (accs, p, total, top, fade))
            if not alone:
                plgpu.barrier_arrive(q_empty.at[wg])

            def last_values(acc_o, c):
                slot = filled(count - 1) if c == 0 else lax.rem(done + count - 1, stages)
                plgpu.wgmma(acc_o, left(p), values(slot, c))
                new = acc_o[...]
                if c == len(accs) - 1:
                    plgpu.barrier_arrive(v_empty.at[slot])
                return new

            parts = []
            for c, acc in enumerate(accs):
                if held > _MOST_BESIDE:
                    slot = filled(count - 1)
                    acc = added(acc, fade, p, values(slot, c))
                    plgpu.barrier_arrive(v_empty.at[slot])
                else:
                    run = functools.partial(last_values, c=c)
                    new = pl.run_scoped(run, plgpu.ACC(acc.shape, jnp.float32))
                    acc = acc * over_columns(fade, acc.shape) + new
                parts.append(acc * vu_g[head])
            return parts, top, total.sum(axis=1)

        def of_part(own, c):
            """Where accumulator c is in the state."""
            return own if held == d else (*own, pl.ds(c * held, held))

        def store(own, parts, top, total):
            for c, part in enumerate(parts):
                acc_g.at[of_part(own, c)][...] = part.astype(acc_g.dtype)
            max_g.at[own][...] = top
            sum_g.at[own][...] = total

        def finish(own, parts, top, total):
            if state is not None:
                old_top = row(max_g.at[own])
                new_top = jnp.maximum(old_top, top)
                old, new = jnp.exp2(old_top - new_top), jnp.exp2(top - new_top)
                total = total * new + row(sum_g.at[own]) * old
                for c, acc in enumerate(parts):
                    before = plgpu.load(acc_g.at[of_part(own, c)], layout=_W, optimized=False)
                    before = before.astype(jnp.float32)
                    acc = acc * over_columns(new, acc.shape)
                    parts[c] = acc + before * over_columns(old, acc.shape)
                top = new_top
            store(own, parts, top, total)

        def attend(mine, done):
            @pl.when(mine.count > 0)
            def _():
                if alone:
                    rows = pl.ds(mine.query + wg * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q_g.at[mine.head, rows], q_s.at[wg], q_full.at[wg])
                plgpu.barrier_wait(q_full.at[wg])
                finish(mine.own, *compute(mine, done))

            if state is None:

                @pl.when(mine.count == 0)
                def _():
                    fill = lambda x: plgpu.layout_cast(  # noqa: E731
                        jnp.full((ROWS,), x, jnp.float32), _W.reduce(1)
                    )
                    zeros = plgpu.layout_cast(jnp.zeros((ROWS, held), jnp.float32), _W)
                    store(mine.own, [zeros] * (d // held), fill(FAR), fill(0.0))

        def fetch_queries(mine, done):
            for w in range(2):

                @pl.when(done > 0)
                def _(w=w):
                    plgpu.barrier_wait(q_empty.at[w])

                rows = pl.ds(mine.query + w * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_g.at[mine.head, rows], q_s.at[w], q_full.at[w])

        def fetch(mine, done):
            """The tiles of a task as slots become free; queries are loaded after the first keys."""

            @pl.loop(0, mine.count)
            def _(i):
                slot = lax.rem(done + i, stages)
                keys = pl.ds((mine.last - 1 - i) * tile, tile)

                @pl.when(done + i >= stages)
                def _():
                    plgpu.barrier_wait(k_empty.at[slot])

                plgpu.copy_gmem_to_smem(k_g.at[mine.head, keys], k_s.at[slot], k_full.at[slot])

                if not alone:

                    @pl.when(i == 0)
                    def _():
                        fetch_queries(mine, done)

                @pl.when(done + i >= stages)
                def _():
                    plgpu.barrier_wait(v_empty.at[slot])

                v_at = v_g.at[mine.head, :, keys] if narrow else v_g.at[mine.head, keys]
                plgpu.copy_gmem_to_smem(v_at, v_s.at[slot], v_full.at[slot])

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(tuning.registers[0], action="increase")

            each(attend)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(tuning.registers[1], action="decrease")
            each(fetch)

    f32 = jnp.float32
    form = (splits.pieces, BLOCK) if scheduled else (splits, n, queries)
    form = ((*form, d), jnp.bfloat16 if narrow else f32), (form, f32), (form, f32)
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*s) for s in form] if state is None else (),
        grid=(splits.pieces if alone else splits.programs,)
        if scheduled
        else (splits, n, queries // BLOCK),
        grid_names=("program",) if scheduled else ("part", "head", "block"),
        num_threads=3,
        thread_name="wg",
        scratch_types=scratch(ROWS, tile, stages, d, q_nQD.dtype),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_segment",
    )
    out = kernel(q_nQD, factor_nQ, k_mTD, v, control, k_unit_m, v_unit_m, *(state or ()))
    return tuple(out) if state is None else None
