"""Flash attention of query tiles over one workspace of decoded keys and values, on Hopper.

Two warpgroups of a CTA compute, 64 queries each, and one loads. In bf16 with a schedule the kernel is
persistent: a CTA does one piece after another, and the next one's keys are loaded while the last one's
result is written.

Keys are visited in tiles, with a running maximum m and sum l in base 2 and an accumulator in float32.
They start from what earlier segments left and are left for the next one, the accumulator in e4m3 kernels
as bf16; so the history is one softmax however many segments it comes in. A segment's tiles can be split
among CTAs, each with its own running state; `combine_splits` puts them together.

`schedule.py` says which keys and queries a CTA has, `warpgroups.py` what its warpgroups do with them.

| e4m3 and bf16, TFLOP/s | e4m3 | bf16 |
|---|---|---|
| this kernel | 880 | 594 |
| without a schedule barrier | 743 | 564 |
| tiles of 128 keys | 826 | |
| logits of a tile and values of the one before it issued together | 704 | 573 |

Measured on an H100, 12 heads of 128 channels, 4,736 queries, 37,440 keys in two splits. In the last row the
softmax is computed while the values are multiplied. In e4m3 all powers of two came from the units for them then; as
`probabilities.py` has it now, the kernel is at 980 to 1,020 on an H200.

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

from pallas_kernels.dequant_attention.reference import MASK_VALUE
from pallas_kernels.dequant_attention.schedule import Schedule, Task, Tasks
from pallas_kernels.dequant_attention.tuning import ROWS, Config, Tuning
from pallas_kernels.dequant_attention.warpgroups import (
    Compute,
    Gmem,
    load,
    load_queries,
    smem_types,
)
from pallas_kernels.gpu.registers import constant, over_columns, row_of

__all__ = ["segment"]


def segment(
    q_nQD: Array,
    logits_scale_nQ: Array,
    k_nTD: Array,
    v: Array,
    valid: Array,
    k_scale_n: Array,
    v_scale_n: Array,
    state: tuple[Any, Any, Any] | None,
    *,
    splits: int | Schedule,
    tuning: Tuning,
) -> tuple[Array, Array, Array] | None:
    """Visits the first `valid[0]` keys of a workspace.

    Args:
        q_nQD: rotated queries, bf16 or e4m3; Q a multiple of `Q_TILE`, D 64, 128 or 256.
        logits_scale_nQ: factor from q . k to base-2 logits.
        k_nTD: keys as `decode_keys` gives them, of q's dtype; T a multiple of the tile.
        v: values as `decode_values` gives them.
        valid: int32 [1], valid keys.
        k_scale_n, v_scale_n: scales of the rows of k and v.
        state: acc (P, n, Q, D), m and l (P, n, Q) of P splits, or (pieces, Q_TILE, D) and
            (pieces, Q_TILE) of a schedule, as jax references that are updated; None for a first
            segment.
        splits: P, or a schedule of all query tiles.
        tuning: sizes.

    Returns:
        The state after a first segment; otherwise nothing.
    """
    (n, queries, d), dtype = q_nQD.shape, q_nQD.dtype
    fp8, scheduled = dtype != jnp.bfloat16, isinstance(splits, Schedule)
    # In e4m3 every other way to spend the registers was slower on an H100: a persistent kernel, although
    # the compiler then spills less, and queries from the loading warpgroup.
    config = Config(d, dtype, persistent=scheduled and not fp8, tuning=tuning)
    tasks = Tasks(config, splits, n, queries)
    operands = q_nQD, logits_scale_nQ, k_nTD, v, valid, k_scale_n, v_scale_n
    if config.ones:
        operands += (jnp.ones((config.ones, tuning.tile), dtype),)

    def body(*refs, smem):
        given, state_refs = refs[: len(operands)], refs[len(operands) :]
        gmem = Gmem(*given, *(() if config.ones else (None,)), *state_refs)
        wg, valid = lax.axis_index("wg"), gmem.valid[0]
        compute = Compute(wg, config, gmem, smem)

        def attend(task, tiles_done):
            @pl.when(task.num_tiles > 0)
            def _():
                if not config.persistent:
                    load_queries(task, wg, gmem, smem)
                plgpu.barrier_wait(smem.q_full.at[wg])
                found = compute.attend(task, tiles_done, valid)
                _store(config, gmem, task, *found, merge=state is not None)

            if state is None:

                @pl.when(task.num_tiles == 0)
                def _():
                    zeros = constant((ROWS, config.acc_channels), 0.0)
                    accs = [zeros] * config.num_accs
                    m, l = (constant((ROWS,), x) for x in (MASK_VALUE, 0.0))
                    _store(config, gmem, task, accs, m, l)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(tuning.registers[0], action="increase")
            tasks.each(attend, wg, valid)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(tuning.registers[1], action="decrease")
            tasks.each(lambda task, done: load(task, done, config, gmem, smem), wg, valid)

    f32 = jnp.float32
    out = (
        ((*tasks.state_shape, d), jnp.bfloat16 if fp8 else f32),
        (tasks.state_shape, f32),
        (tasks.state_shape, f32),
    )
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*x) for x in out] if state is None else (),
        grid=tasks.grid,
        grid_names=tasks.axes,
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(smem=smem_types(config)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_segment",
    )
    out = kernel(*operands, *(state or ()))
    return tuple(out) if state is None else None


def _store(
    config: Config,
    gmem: Gmem,
    task: Task,
    accs: list[Array],
    m: Array,
    l: Array,
    merge: bool = False,
) -> None:
    """Writes acc, m and l of a warpgroup's queries to the state, or merges them into the state."""
    rows = *task.state, pl.ds(task.state_row, ROWS)

    def of_acc(c):
        if config.num_accs == 1:
            return rows
        return (*rows, pl.ds(c * config.acc_channels, config.acc_channels))

    if merge:
        m_old = row_of(gmem.m.at[rows])
        m_new = jnp.maximum(m_old, m)
        alpha_old, alpha = jnp.exp2(m_old - m_new), jnp.exp2(m - m_new)
        l = l * alpha + row_of(gmem.l.at[rows]) * alpha_old
        for c, acc in enumerate(accs):
            acc_gmem = gmem.acc.at[of_acc(c)]
            acc_old = plgpu.load(acc_gmem, layout=plgpu.Layout.WGMMA, optimized=False)
            acc_old = acc_old.astype(jnp.float32)
            acc = acc * over_columns(alpha, acc.shape)
            accs[c] = acc + acc_old * over_columns(alpha_old, acc.shape)
        m = m_new
    for c, acc in enumerate(accs):
        gmem.acc.at[of_acc(c)][...] = acc.astype(gmem.acc.dtype)
    gmem.m.at[rows][...] = m
    gmem.l.at[rows][...] = l
