"""Flash attention of a block of queries over one workspace of decoded keys and values, on Hopper.

Two warpgroups compute, 64 queries each, and one loads; in bf16 a block of the GPU does one piece after
another, and the next one's keys are loaded while the last one's result is written. Keys are visited
in tiles, with a running maximum and sum in base 2 and the weighted values in float32, which start from
what earlier segments left and are left for the next, in e4m3 as bf16: the history is one softmax however
many segments it comes in. A segment's tiles can be split among blocks, each with its own running state;
`combine_splits` puts them together.

Here is what a block of the GPU does as a whole, and the state. `tasks.py` says which keys and queries it
has, `loading.py` and `computing.py` what its warpgroups do with them, `memory.py` what they share.

Measured on an H100, 12 heads, 4,736 queries, 37,440 keys in two parts: e4m3 880 TFLOP/s (743 without
turns, 826 at tiles of 128), bf16 594 (564 without turns). Issuing the logits of a tile together
with the values of the one before it, and computing the softmax while the latter are multiplied,
was slower: 704 and 573. All of it at 128 channels a head.

Source: Dao et al., FlashAttention (arXiv 2205.14135), algorithm 1; Shah et al., FlashAttention-3
(arXiv 2407.08608), sections 3.1 and 3.3, for warp specialisation and 8-bit operands.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dequant_attention.computing import Computing
from pallas_kernels.dequant_attention.loading import load, load_queries
from pallas_kernels.dequant_attention.memory import Arrays, scratch
from pallas_kernels.dequant_attention.reference import FAR
from pallas_kernels.dequant_attention.schedule import Schedule
from pallas_kernels.dequant_attention.sizes import ROWS, Form, Tuning
from pallas_kernels.dequant_attention.tasks import Tasks
from pallas_kernels.gpu.registers import constant, over_columns, row_of

__all__ = ["segment"]


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
        q_nQD: rotated queries, bf16 or e4m3; Q a multiple of `Q_TILE`, D 64, 128 or 256.
        factor_nQ: what turns q . k into base-2 logits.
        k_mTD: keys as `decode_keys` gives them, of q's dtype; T a multiple of the tile.
        v: values as `decode_values` gives them.
        control: int32 [1], valid keys.
        k_unit_m, v_unit_m: units of the rows of k and v.
        state: running weighted values (P, n, Q, D), maximum and sum (P, n, Q) of P splits, or
            (pieces, Q_TILE, D) and (pieces, Q_TILE) of a schedule, as jax references that are
            updated; None for a first segment.
        splits: P, or a schedule of all blocks of queries.
        tuning: sizes.

    Returns:
        The state after a first segment; otherwise nothing.
    """
    (n, queries, d), dtype = q_nQD.shape, q_nQD.dtype
    narrow, scheduled = dtype != jnp.bfloat16, isinstance(splits, Schedule)
    # In e4m3 every other way to spend the registers was slower on an H100: one task after another,
    # although the compiler then spills less, and queries from the loading warpgroup.
    form = Form(d, dtype, alone=narrow or not scheduled, tuning=tuning)
    tasks = Tasks(form, splits, n, queries)

    def body(*refs, here):
        there = Arrays(*refs)
        wg, valid = lax.axis_index("wg"), there.control[0]
        computing = Computing(wg, form, there, here)

        def attend(mine, done):
            @pl.when(mine.count > 0)
            def _():
                if form.alone:
                    load_queries(mine, wg, there, here)
                plgpu.barrier_wait(here.q_full.at[wg])
                found = computing.attend(mine, done, valid)
                _store(form, there, mine.own, *found, merge=state is not None)

            if state is None:

                @pl.when(mine.count == 0)
                def _():
                    nothing = constant((ROWS, form.held), 0.0)
                    nothing = [nothing] * form.accumulators
                    top, total = (constant((ROWS,), x) for x in (FAR, 0.0))
                    _store(form, there, mine.own, nothing, top, total)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(tuning.registers[0], action="increase")
            tasks.each(attend, wg, valid)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(tuning.registers[1], action="decrease")
            tasks.each(lambda mine, done: load(mine, done, form, there, here), wg, valid)

    f32 = jnp.float32
    out = (
        ((*tasks.state, d), jnp.bfloat16 if narrow else f32),
        (tasks.state, f32),
        (tasks.state, f32),
    )
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*x) for x in out] if state is None else (),
        grid=tasks.grid,
        grid_names=tasks.axes,
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(here=scratch(form)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_segment",
    )
    out = kernel(q_nQD, factor_nQ, k_mTD, v, control, k_unit_m, v_unit_m, *(state or ()))
    return tuple(out) if state is None else None


def _store(
    form: Form,
    there: Arrays,
    own: Any,
    parts: list[Array],
    top: Array,
    total: Array,
    merge: bool = False,
) -> None:
    """What was found for the queries of a warpgroup into its state, or merged with what is there."""

    def of_part(c):
        return own if form.accumulators == 1 else (*own, pl.ds(c * form.held, form.held))

    if merge:
        old_top = row_of(there.top.at[own])
        new_top = jnp.maximum(old_top, top)
        old, new = jnp.exp2(old_top - new_top), jnp.exp2(top - new_top)
        total = total * new + row_of(there.total.at[own]) * old
        for c, acc in enumerate(parts):
            acc_g = there.acc.at[of_part(c)]
            before = plgpu.load(acc_g, layout=plgpu.Layout.WGMMA, optimized=False)
            before = before.astype(jnp.float32)
            acc = acc * over_columns(new, acc.shape)
            parts[c] = acc + before * over_columns(old, acc.shape)
        top = new_top
    for c, part in enumerate(parts):
        there.acc.at[of_part(c)][...] = part.astype(there.acc.dtype)
    there.top.at[own][...] = top
    there.total.at[own][...] = total
