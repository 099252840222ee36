"""What the loading warpgroup does: queries and tiles of keys and values into shared memory, ahead."""

from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dequant_attention.memory import Arrays, Shared
from pallas_kernels.dequant_attention.sizes import ROWS, Form
from pallas_kernels.dequant_attention.tasks import Task

__all__ = ["load", "load_queries"]


def load_queries(mine: Task, wg: Any, there: Arrays, here: Shared) -> None:
    """Those of a warpgroup."""
    rows = pl.ds(mine.query + wg * ROWS, ROWS)
    plgpu.copy_gmem_to_smem(there.q.at[mine.head, rows], here.q.at[wg], here.q_full.at[wg])


def load(mine: Task, done: Any, form: Form, there: Arrays, here: Shared) -> None:
    """The tiles of a task as slots become free, from the last to the first.

    Queries are loaded after the first keys, unless blocks are alone: then those who compute do it.
    `done` tiles were loaded for tasks before, and slots and phases of barriers go on from there.
    """
    stages, tile = form.stages, form.tile

    def queries_when_free():
        for w in range(2):

            @pl.when(done > 0)
            def _(w=w):
                plgpu.barrier_wait(here.q_empty.at[w])

            load_queries(mine, w, there, here)

    @pl.loop(0, mine.count)
    def _(i):
        slot = lax.rem(done + i, stages)
        keys = pl.ds((mine.last - 1 - i) * tile, tile)

        @pl.when(done + i >= stages)
        def _():
            plgpu.barrier_wait(here.k_empty.at[slot])

        plgpu.copy_gmem_to_smem(there.k.at[mine.head, keys], here.k.at[slot], here.k_full.at[slot])

        if not form.alone:

            @pl.when(i == 0)
            def _():
                queries_when_free()

        @pl.when(done + i >= stages)
        def _():
            plgpu.barrier_wait(here.v_empty.at[slot])

        v_at = there.v.at[mine.head, :, keys] if form.narrow else there.v.at[mine.head, keys]
        plgpu.copy_gmem_to_smem(v_at, here.v.at[slot], here.v_full.at[slot])
