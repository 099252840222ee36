"""Heads with a history and heads without: a table that says which heads of a cache read compressed spans.

A head *with a history* reads all of the cache. A *local* head reads the sink and the newest blocks, so no
span of it is stored. Spans of a layer hold its heads with a history only, one behind the other; layers
with as many of them share slots, see `layer_codecs`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Int

if TYPE_CHECKING:
    from qvg_jax.cache.layout import Layout

__all__ = ["HeadHistory", "HeadSet", "history_of", "repeated"]


@dataclasses.dataclass(frozen=True, repr=False)
class HeadHistory:
    """Which key-value heads of each layer have a history, and what the others read; hashable.

    Attributes:
        table: bool, [layers][heads]: whether a head has a history. Any array or nested list of bools.
        local_blocks: newest blocks that a local head reads beside the sink. It never reads more of
            them, also while more of them wait to be compressed. Without `own_window` they are at most
            `keep_recent` of the cache.
        own_window: whether local heads keep what they read and no more: the sink and a small ring of
            blocks, in place of the cache's window. Attention gives the same bits. Such a cache has
            blocks="whole", and `truncate` refuses it.

    Raises:
        ValueError: a table that is not bool or not of two axes, a number below 0, or `own_window` not bool.
    """

    table: tuple[tuple[bool, ...], ...]
    local_blocks: int
    own_window: bool = False

    def __post_init__(self):
        try:
            found = np.asarray(self.table)
        except ValueError as error:
            raise ValueError(
                "history table has rows of unequal length; accepted: bool (layers, heads)"
            ) from error
        if found.ndim != 2 or not found.size or found.dtype != np.bool_:
            raise ValueError(
                f"history table has shape {found.shape} and dtype {found.dtype}; accepted: bool "
                "(layers, heads), True for a head with a history"
            )
        object.__setattr__(self, "table", tuple(tuple(row) for row in found.tolist()))
        number = self.local_blocks
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 0:
            raise ValueError(f"local_blocks={number!r} is not accepted: give an integer >= 0")
        if not isinstance(self.own_window, bool):
            raise ValueError(f"own_window={self.own_window!r} is not accepted: give True or False")

    @property
    def layers(self) -> int:
        """Layers of the table."""
        return len(self.table)

    @property
    def heads(self) -> int:
        """Key-value heads of a layer."""
        return len(self.table[0])

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of heads with a history in each layer."""
        return tuple(sum(row) for row in self.table)

    @property
    def full(self) -> int:
        """The number of heads with a history in all layers together."""
        return sum(self.counts)

    def rounded(self, multiple: int) -> "HeadHistory":
        """The same history with every layer's number of heads with a history raised to a multiple.

        The first local heads of a layer get a history then: nothing is lost, but what those store and
        read is paid for. `attend` and `compress` compile a program for every such number that layers
        have, so with multiples there are fewer programs.

        Args:
            multiple: at least 1; a layer with fewer heads than the next multiple gets all of them.

        Raises:
            ValueError: `multiple` is no integer or below 1.
        """
        if isinstance(multiple, bool) or not isinstance(multiple, Integral) or multiple < 1:
            raise ValueError(f"multiple={multiple!r} is not accepted: give an integer >= 1")
        table = np.array(self.table)
        for row in table:
            row[np.flatnonzero(~row)[: -row.sum() % multiple]] = True
        return dataclasses.replace(self, table=table)

    def indices(self, count: int, has: bool) -> Int[np.ndarray, "L h"]:
        """Heads of each layer, with a history or local; zeros for layers of another count.

        Args:
            count: heads with a history in a layer.
            has: whether those are meant, or the local ones.
        """
        size = count if has else self.heads - count
        found = np.zeros((self.layers, size), np.int32)
        for l, row in enumerate(self.table):
            if self.counts[l] == count:
                found[l] = [h for h, full in enumerate(row) if full == has]
        return found

    def check(self, lay: "Layout") -> None:
        """Raises ValueError if a cache of this layout cannot have this history."""
        if (self.layers, self.heads) != (lay.layers, lay.heads):
            raise ValueError(
                f"history has a table of {self.layers} layers and {self.heads} heads; accepted: "
                f"({lay.layers}, {lay.heads}), those of the cache"
            )
        if not lay.max_spans:
            raise ValueError(
                "history with max_spans=0: there are no spans that a head could go without; accepted: "
                "None, or slots for spans"
            )
        if self.local_blocks > lay.keep_recent and not self.own_window:
            raise ValueError(
                f"history local_blocks={self.local_blocks} with keep_recent={lay.keep_recent}: the "
                "window always holds the newest keep_recent blocks, and no more; accepted: at most that, or "
                "own_window=True"
            )
        if self.own_window and lay.blocks != "whole":
            raise ValueError(
                f"history own_window=True with blocks={lay.blocks!r}: the windows of local heads are rings of "
                "whole blocks; accepted: blocks='whole', or own_window=False"
            )

    def __repr__(self) -> str:
        """The classes as one hexadecimal number a layer, its last head in the lowest bit."""
        digits = -(-self.heads // 4)
        rows = (sum(full << i for i, full in enumerate(reversed(row))) for row in self.table)
        own = "own_window, " if self.own_window else ""
        by_layer = ".".join(f"{row:0{digits}x}" for row in rows)
        return (
            f"HeadHistory({self.full} of {self.layers * self.heads} heads, "
            f"local_blocks={self.local_blocks}, {own}table {by_layer})"
        )


def history_of(value: Any, layers: int, heads: int) -> HeadHistory | None:
    """The history that a caller gave; None where every head has one, as in a cache without a table.

    Raises:
        ValueError: not a `HeadHistory`.
    """
    if value is not None and not isinstance(value, HeadHistory):
        raise ValueError(
            f"history={type(value).__name__} is not accepted: give None or a HeadHistory"
        )
    everything = value is not None and value.full == layers * heads
    fits = value is not None and (value.layers, value.heads) == (layers, heads)
    return None if everything and fits else value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSet:
    """Some heads of one layer, which a view is narrowed to: all with a history, or all local.

    Attributes:
        index_h: int32, which key-value heads of the cache.
        history: whether they have one.
    """

    index_h: Array
    history: bool = dataclasses.field(metadata=dict(static=True))

    @property
    def count(self) -> int:
        """Their number."""
        return self.index_h.shape[0]

    def of(self, x_BHTD: Array, axis: int = 1) -> Array:
        """The heads' part of an array of all heads."""
        return x_BHTD.take(self.index_h, axis)

    def rows(self, batch: int, heads: int) -> Array:
        """Rows of the heads among those of all videos and heads of a layer, videos first."""
        return (np.arange(batch, dtype=np.int32)[:, None] * heads + self.index_h[None]).reshape(-1)


def repeated(index_h: Array, times: Sequence[int]) -> Array:
    """Indices of query heads or encodings, of which each head of `index_h` has so many next to each other."""
    for n in times:
        index_h = (index_h[:, None] * n + np.arange(n, dtype=np.int32)[None]).reshape(-1)
    return index_h
