"""Which queries of which head a block of the GPU attends with, to which tiles of its keys.

With a number of splits every block has one task. With a schedule it has one piece after another, or in
kernels whose blocks are alone, one piece.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.dequant_attention.schedule import Schedule
from pallas_kernels.dequant_attention.sizes import Q_TILE, ROWS, Form

__all__ = ["Task", "Tasks"]


class Task(NamedTuple):
    """Some tiles of keys for a block of queries."""

    head: Any
    query: Any  # the first one
    own: Any  # where its state is, for this warpgroup
    last: Any  # tile after the last one
    count: Any  # tiles


@dataclasses.dataclass(frozen=True)
class Tasks:
    """All that a kernel has to do.

    Attributes:
        form: of the kernel.
        splits: parts of the keys, or a schedule.
        rows, queries: n and Q.
    """

    form: Form
    splits: int | Schedule
    rows: int
    queries: int

    @property
    def scheduled(self) -> bool:
        return isinstance(self.splits, Schedule)

    @property
    def grid(self) -> tuple[int, ...]:
        """Blocks of the GPU."""
        if self.scheduled:
            return (self.splits.pieces if self.form.alone else self.splits.ctas,)
        return self.splits, self.rows, self.queries // Q_TILE

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of the grid."""
        return ("program",) if self.scheduled else ("part", "head", "block")

    @property
    def state(self) -> tuple[int, ...]:
        """Shape of the maxima and sums of all queries."""
        if self.scheduled:
            return self.splits.pieces, Q_TILE
        return self.splits, self.rows, self.queries

    def task(self, piece: Any, wg: Any, valid: Any) -> Task:
        """What is to be done at once: queries of a head and some tiles of its keys.

        Args:
            piece: of the schedule; without one the place in the grid says what to do.
            wg: the warpgroup that asks.
            valid: keys that count.
        """
        if self.scheduled:
            block, part, parts = self.splits.place(piece)
            blocks = self.queries // Q_TILE
            head, block = lax.div(block, blocks), lax.rem(block, blocks)
            own = (piece, pl.ds(wg * ROWS, ROWS))
        else:
            part, head, block = (lax.axis_index(a) for a in self.axes)
            own, parts = (part, head, pl.ds(block * Q_TILE + wg * ROWS, ROWS)), self.splits
        tile = self.form.tile
        tiles = (valid + (tile - 1)) // tile
        first, last = part * tiles // parts, (part + 1) * tiles // parts
        return Task(head, block * Q_TILE, own, last, last - first)

    def each(self, do: Callable[[Task, Any], None], wg: Any, valid: Any) -> None:
        """do(task, tiles of the tasks before it), for one task of this block after another."""
        start = lax.axis_index("program") if self.scheduled else None
        if self.form.alone:
            do(self.task(start, wg, valid), 0)
            return
        programs = self.splits.ctas

        def one(i, done):
            mine = self.task(start + i * programs, wg, valid)
            do(mine, done)
            return done + mine.count

        some = lax.div(self.splits.pieces - start + (programs - 1), programs)
        lax.fori_loop(0, some, one, jnp.int32(0))
