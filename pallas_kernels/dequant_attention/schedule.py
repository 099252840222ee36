"""How an attention is spread over the multiprocessors: splits of the keys, schedules, tasks of a CTA.

CTAs run in waves, one on each multiprocessor, and a last wave that is nearly empty costs as much as
a full one. So the query tiles of all full waves keep their keys to themselves, and only those of the
last wave are split: each of them has several pieces, and each piece its own running softmax. A split
query tile has more state to write and to combine, so there are few of them.

Source of the idea to split only what is left of the last wave: Osama et al., Stream-K (arXiv
2301.03598), section 4.2, there for matrix products.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dequant_attention.tuning import Q_TILE, ROWS, Config

__all__ = [
    "NUM_SMS",
    "Schedule",
    "Task",
    "Tasks",
    "combine_splits",
    "log_sum_exp",
    "schedule_for",
    "splits_for",
]

# Measured on an H100 SXM with 128 channels a head. With other head dims the times of keys and of
# states grow alike, and the balance hardly moves.
NUM_SMS = 132
_NS_PER_KEY = {
    True: 8.4,
    False: 14.1,
}  # time of a CTA for one key, by whether it is in fp8, then on an H200
_NS_PER_PIECE = 4e3  # time to start and to end a piece
_BYTES_PER_NS = 2.7e3  # rate at which states are written and read
_STATE_BYTES = 128 * 128 * 4  # state of a query tile
_MOST_SPLITS = 16


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Query tiles whose keys are split, and those whose keys are not.

    Attributes:
        query_tiles: query tiles of all rows.
        whole: how many of them, the first ones, are one piece each.
        splits: pieces of each of the others.
        num_sms: multiprocessors of the GPU; the CTA on each takes one piece after another.
    """

    query_tiles: int
    whole: int
    splits: int
    num_sms: int = NUM_SMS

    @property
    def shared(self) -> int:
        """Query tiles of several pieces."""
        return self.query_tiles - self.whole

    @property
    def pieces(self) -> int:
        """All pieces: first the whole ones, then a first split of each of the others, and so on."""
        return self.whole + self.shared * self.splits

    @property
    def ctas(self) -> int:
        """CTAs of the grid: CTA i does the pieces i, i + ctas, i + 2 ctas, ..."""
        return min(self.pieces, self.num_sms)

    def place(self, piece: Any) -> tuple[Any, Any, Any]:
        """(query tile, split of its keys, of how many splits) of a piece."""
        if not self.whole:
            return lax.rem(piece, self.shared), lax.div(piece, self.shared), self.splits
        if not self.shared:
            return piece, 0, 1
        alone, more = piece < self.whole, jnp.maximum(piece - self.whole, 0)
        return (
            jnp.where(alone, piece, self.whole + lax.rem(more, self.shared)),
            jnp.where(alone, 0, lax.div(more, self.shared)),
            jnp.where(alone, 1, self.splits),
        )


def schedule_for(
    query_tiles: int, tokens: int, segments: int, fp8: bool, num_sms: int = NUM_SMS
) -> Schedule:
    """The quickest schedule by a model of waves, starts and traffic of the states.

    Args:
        query_tiles: query tiles of all rows.
        tokens: keys of a typical segment.
        segments: how many segments there are.
        fp8: whether keys are in e4m3.
        num_sms: multiprocessors of the GPU.
    """
    full = query_tiles // num_sms * num_sms
    most = _most_splits(tokens)

    def nanoseconds(s: Schedule) -> float:
        alone, shared = -(-s.whole // num_sms), -(-s.shared * s.splits // num_sms)
        busy = (alone + shared / s.splits) * tokens * _NS_PER_KEY[fp8]
        busy += (alone + shared) * _NS_PER_PIECE
        return segments * busy + _traffic_ns(segments, s.pieces)

    options = [Schedule(query_tiles, 0, splits, num_sms) for splits in range(1, most + 1)]
    if full:
        options += [Schedule(query_tiles, full, splits, num_sms) for splits in range(1, most + 1)]
    return min(options, key=nanoseconds)


def splits_for(
    rows: int, queries: int, tokens: int, segments: int, fp8: bool, num_sms: int = NUM_SMS
) -> int:
    """The number of splits of a segment's keys, the same for all query tiles.

    More splits fill the last wave better, but each has a state that every segment reads and writes.
    The result has the least sum of waves * keys * time per key and traffic of the state.

    Args:
        rows, queries: n and Q.
        tokens: keys of a typical segment.
        segments: how many segments there are.
        fp8: whether keys are in e4m3.
        num_sms: multiprocessors of the GPU.
    """
    query_tiles = rows * -(-queries // Q_TILE)

    def nanoseconds(splits: int) -> float:
        waves = -(-query_tiles * splits // num_sms)
        busy = waves * tokens / splits * _NS_PER_KEY[fp8]
        return segments * busy + _traffic_ns(segments, query_tiles * splits)

    return min(range(1, _most_splits(tokens) + 1), key=nanoseconds)


def _most_splits(tokens: int) -> int:
    return max(1, min(_MOST_SPLITS, tokens // 1024))


def _traffic_ns(segments: int, pieces: int) -> float:
    """Time in which all segments and the combination read and write the states."""
    return 2 * (segments + 1) * pieces * _STATE_BYTES / _BYTES_PER_NS


def combine_splits(
    state: tuple[Array, Array, Array], queries: int, schedule: Schedule | None = None
) -> Float[Array, "n Q D"]:
    """The attention output: sum_p 2^(m_p - m) acc_p / sum_p 2^(m_p - m) l_p, float32.

    Args:
        state: running acc, m and l: (P, n, Q, D) and (P, n, Q) of P splits, or of a schedule
            (pieces, Q_TILE, D) and (pieces, Q_TILE).
        queries: Q without padding.
        schedule: the schedule that left the state, or None for P splits.
    """
    if schedule is None:
        return _combined(*(x[:, :, :queries] for x in state))
    acc, _, l = state
    whole, out = schedule.whole, []
    if whole:
        out.append(acc[:whole] / l[:whole, :, None])
    if schedule.shared:
        apart = (schedule.splits, schedule.shared)
        out.append(_combined(*(x[whole:].reshape(*apart, *x.shape[1:]) for x in state)))
    out = out[0] if len(out) == 1 else jnp.concatenate(out)
    rows = schedule.query_tiles // -(-queries // Q_TILE)
    return out.reshape(rows, -1, out.shape[-1])[:, :queries]


def log_sum_exp(
    state: tuple[Array, Array, Array], queries: int, schedule: Schedule | None = None
) -> Float[Array, "n Q"]:
    """The natural logarithm of the softmax's denominator: ln sum_p 2^(m_p) l_p, float32.

    Args:
        state, queries, schedule: as for `combine_splits`.
    """
    _, m, l = state
    if schedule is None:
        lse = _log2_sum(m[:, :, :queries], l[:, :, :queries])
    else:
        whole, apart = schedule.whole, (schedule.splits, schedule.shared)
        parts = [m[:whole] + jnp.log2(l[:whole])]
        parts.append(_log2_sum(*(x[whole:].reshape(*apart, *x.shape[1:]) for x in (m, l))))
        rows = schedule.query_tiles // -(-queries // Q_TILE)
        lse = jnp.concatenate(parts).reshape(rows, -1)[:, :queries]
    return lse * math.log(2)


def _log2_sum(m: Array, l: Array) -> Array:
    most = m.max(axis=0, keepdims=True)
    return most[0] + jnp.log2(jnp.sum(jnp.exp2(m - most) * l, axis=0))


def _combined(acc: Array, m: Array, l: Array) -> Array:
    alpha = jnp.exp2(m - m.max(axis=0, keepdims=True))
    l = jnp.sum(alpha * l, axis=0)
    return jnp.sum(alpha[..., None] * acc, axis=0) / l[..., None]


class Task(NamedTuple):
    """Some tiles of keys for a query tile, as a warpgroup sees them."""

    head: Any
    query: Any  # the first query of the query tile
    state: tuple[Any, ...]  # leading indices of the state
    state_row: Any  # the row of the state at which this warpgroup's queries begin
    end: Any  # the tile after the last one
    num_tiles: Any


@dataclasses.dataclass(frozen=True)
class Tasks:
    """All tasks of a kernel, and its grid.

    With a number of splits every CTA has one task. With a schedule a CTA of a persistent kernel has one
    piece after another, and a CTA of another kernel one piece.

    Attributes:
        config: properties of the kernel.
        splits: number of splits of the keys, or a schedule.
        rows, queries: n and Q.
    """

    config: Config
    splits: int | Schedule
    rows: int
    queries: int

    @property
    def scheduled(self) -> bool:
        """Whether a schedule says which tasks there are."""
        return isinstance(self.splits, Schedule)

    @property
    def grid(self) -> tuple[int, ...]:
        """Sizes of the grid of CTAs."""
        if self.scheduled:
            return (self.splits.ctas if self.config.persistent else self.splits.pieces,)
        return self.splits, self.rows, self.queries // Q_TILE

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of the grid."""
        return ("cta",) if self.scheduled else ("split", "head", "query_tile")

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of m and l of all queries."""
        if self.scheduled:
            return self.splits.pieces, Q_TILE
        return self.splits, self.rows, self.queries

    def task(self, piece: Any, wg: Any, valid: Any) -> Task:
        """A task of this CTA.

        Args:
            piece: the piece of a schedule; without one, the CTA's place in the grid is the task.
            wg: the warpgroup that asks.
            valid: keys that count.
        """
        if self.scheduled:
            tile, split, splits = self.splits.place(piece)
            query_tiles = self.queries // Q_TILE
            head, tile = lax.div(tile, query_tiles), lax.rem(tile, query_tiles)
            state, state_row = (piece,), wg * ROWS
        else:
            split, head, tile = (lax.axis_index(a) for a in self.axes)
            state, splits = (split, head), self.splits
            state_row = tile * Q_TILE + wg * ROWS
        size = self.config.tile
        tiles = (valid + (size - 1)) // size
        first, end = split * tiles // splits, (split + 1) * tiles // splits
        return Task(head, tile * Q_TILE, state, state_row, end, end - first)

    def each(self, do: Callable[[Task, Any], None], wg: Any, valid: Any) -> None:
        """Calls do(task, tiles of the tasks before it) for one task of this CTA after another."""
        cta = lax.axis_index("cta") if self.scheduled else None
        if not self.config.persistent:
            do(self.task(cta, wg, valid), 0)
            return
        ctas = self.splits.ctas

        def one(i, tiles_done):
            task = self.task(cta + i * ctas, wg, valid)
            do(task, tiles_done)
            return tiles_done + task.num_tiles

        some = lax.div(self.splits.pieces - cta + (ctas - 1), ctas)
        lax.fori_loop(0, some, one, jnp.int32(0))
