"""What attention reads: a cache, the rope tables of its tokens, and those of the new tokens."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from qvg_jax.cache.devices import span_tables_of
from qvg_jax.cache.head_history import HeadSet
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.relative import Moves, RelativeTime
from qvg_jax.cache.rope import Encodings, Rope, Table
from qvg_jax.errors import wrong_kind

if TYPE_CHECKING:
    from qvg_jax.cache.state import KVCache

__all__ = ["CacheView", "checked_lengths", "checked_positions", "known", "view_of"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheView:
    """A cache with rope tables; shared by all layers of one forward pass. See `KVCache.view`."""

    cache: "KVCache"
    table_new: Table  # of the new tokens, leaves [B, T, ...]; None if they are not to be rotated
    table_dense: Table  # of sink and window, leaves [B, T, ...]; None if not precomputed
    table_spans: Table  # of all slots, leaves [N, B, T, ...]; None if not precomputed
    rope: Rope | Encodings | None = dataclasses.field(metadata=dict(static=True))
    moves: Moves | None = None  # how far times move; None if they are the stored ones
    relative: RelativeTime | None = dataclasses.field(default=None, metadata=dict(static=True))
    only: HeadSet | None = None  # heads of one layer that it is narrowed to; None for all

    @property
    def stored_heads(self) -> int:
        """Key-value heads of the cache that the view reads."""
        return self.cache.layout.heads if self.only is None else self.only.count

    @property
    def copies(self) -> int:
        """Heads that attention sees for each one that is stored."""
        return self.rope.copies if isinstance(self.rope, Encodings) else 1

    @property
    def heads(self) -> int:
        """Key-value heads that attention sees."""
        return self.copies * self.stored_heads

    @property
    def reads_spans(self) -> bool:
        """Whether there are spans for these heads."""
        some = self.only is None or self.only.history
        return self.cache.layout.max_spans > 0 and some

    def new(self, x_BHTD: Array) -> Array:
        """Queries or keys of the new tokens as attention multiplies them."""
        if not isinstance(self.rope, Rope) or self.table_new is None:
            return x_BHTD
        return self.rope.rotate(x_BHTD, self.new_table(x_BHTD.shape[0]))

    def new_table(self, batch: int) -> Any:
        """Rope table of the new tokens for a multiple of the cache's batch."""
        again = batch // self.cache.layout.batch
        repeat = lambda t: jnp.concatenate([t] * again) if again > 1 else t  # noqa: E731
        return jax.tree.map(repeat, self.table_new)

    def keys(self, k_BHTD: Array, table: Any) -> Array:
        """Stored keys as attention reads them."""
        if self.rope is None:
            return k_BHTD
        turn = self.rope.keys if isinstance(self.rope, Encodings) else self.rope.rotate
        return turn(k_BHTD, table)

    def values(self, v_BHTD: Array, table: Any) -> Array:
        """Stored values as attention reads them."""
        if not isinstance(self.rope, Encodings):
            return v_BHTD
        return self.rope.values(v_BHTD, table)

    def dense_table(self, start: Array | int, size: int) -> Any:
        """Rope table of `size` tokens of the dense buffer; None without rope."""
        if self.rope is None:
            return None
        pick = lambda x: lax.dynamic_slice_in_dim(x, start, size, 1)  # noqa: E731
        if self.table_dense is not None:
            return jax.tree.map(pick, self.table_dense)
        return self.table_of(pick(self.cache.dense_pos), self._in_sink(start + jnp.arange(size)))

    def span_table(self, slot: Array) -> Any:
        """Rope table of the span in `slot`; None without rope."""
        if self.rope is None:
            return None
        pick = lambda x: lax.dynamic_slice_in_dim(x, slot, 1, 0)  # noqa: E731
        table = self.table_spans
        if table is not None:
            table = jax.tree.map(pick, table)
        else:
            table = self.table_of(pick(self.cache.span_pos))
        return jax.tree.map(lambda t: t[0], table)

    def table_of(self, pos_xBTP: Array, in_sink_T: Array | None = None) -> Any:
        """Rope table of stored positions, `in_sink_T` of which are the sink's."""
        if self.relative is not None:
            pos_xBTP = self.relative.stored(pos_xBTP, self.moves, in_sink_T)
        return self.rope.table(pos_xBTP)

    def _in_sink(self, token_T: Array) -> Array:
        """Whether tokens of the dense buffer are the sink's, also where devices have parts of blocks."""
        lay = self.cache.layout
        part = None if lay.plan is None else lay.plan.part
        shares = part.devices if part is not None and part.splits_blocks else 1
        own = token_T % (lay.dense_blocks * lay.block_tokens // shares)
        return own < lay.sink_blocks * lay.block_tokens // shares


def checked_positions(lay: Layout, positions_BTP: Array | None, tokens: int) -> Array:
    """Positions of a block as float32 (B, tokens, P), or a ValueError that says what is wrong."""
    want = (lay.batch, tokens, lay.pos_dims)
    if positions_BTP is None:
        if lay.pos_dims:
            raise ValueError(f"positions=None; the cache has pos_dims={lay.pos_dims}: give {want}")
        return jnp.zeros(want, jnp.float32)
    positions_BTP = jnp.asarray(positions_BTP)
    if positions_BTP.shape != want:
        raise ValueError(f"positions have shape {positions_BTP.shape}; accepted: {want} (B, T, P)")
    return positions_BTP.astype(jnp.float32)


def known(x: Any) -> np.ndarray | None:
    """The numbers of an argument if they are known while a program is traced, None otherwise."""
    return None if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) else np.asarray(x)


def checked_lengths(lengths: Int[Array, " B"], rows: int, tokens: int) -> Array:
    """Lengths of rows as int32 (B,), or a ValueError that says what is wrong."""
    found = jnp.asarray(lengths)
    if found.shape != (rows,) or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(
            f"lengths have shape {found.shape} and dtype {found.dtype}; accepted: ({rows},) integers"
        )
    numbers = known(lengths)
    if numbers is not None and numbers.size and not (0 <= numbers.min() <= numbers.max() <= tokens):
        raise ValueError(
            f"lengths={numbers.tolist()} are not accepted: give 0 to {tokens}, the tokens of the block"
        )
    return found.astype(jnp.int32)


def view_of(
    cache: "KVCache",
    positions_BTP: Array | None,
    rope: Rope | Encodings | Literal[False] | None,
    precompute: bool,
    relative: RelativeTime | None = None,
) -> CacheView:
    """The view behind `KVCache.view`, which documents the arguments."""
    lay = cache.layout
    if not (rope is None or rope is False or isinstance(rope, Rope | Encodings)):
        accepted = (
            "a Rope, as axial_rope makes it, Encodings, False for keys as they are stored, or None"
        )
        raise wrong_kind("rope", rope, accepted)
    rope = lay.rope if rope is None else rope
    if rope is None and lay.pos_dims:
        raise ValueError(
            f"rope=None; the cache has positions (pos_dims={lay.pos_dims}) and keys before RoPE: give "
            "a rope, or rope=False to read keys as they are stored"
        )
    if not rope and positions_BTP is not None:
        raise ValueError(f"positions with rope={rope}: nothing is rotated by them; leave them out")
    if relative is not None and not isinstance(relative, RelativeTime):
        raise wrong_kind("relative", relative, "a RelativeTime, or None")
    if relative is not None and not isinstance(rope, Rope):
        raise ValueError(
            f"relative={relative} with rope={rope}: times move in the positions that a Rope turns by; "
            "accepted: a Rope, or relative=None"
        )
    if not rope:
        rope = None
        return CacheView(cache=cache, table_new=None, table_dense=None, table_spans=None, rope=None)
    if not lay.pos_dims:
        raise ValueError("pos_dims=0: the cache stores no positions, so nothing can be rotated")
    table_new = moves = None
    if isinstance(rope, Rope):
        if positions_BTP is None:
            raise ValueError(
                "positions=None with a rope: give the positions (B, T, P) of the new tokens"
            )
        positions_BTP = jnp.asarray(positions_BTP)
        tokens = positions_BTP.shape[1] if positions_BTP.ndim == 3 else lay.block_tokens
        positions_BTP = checked_positions(lay, positions_BTP, tokens)
        if relative is not None:
            moves = _moves(cache, relative, positions_BTP)
            positions_BTP = relative.new(positions_BTP, moves)
        table_new = rope.table(positions_BTP)
    elif positions_BTP is not None:
        raise ValueError("positions with Encodings: new tokens come encoded; leave them out")
    view = CacheView(
        cache=cache,
        table_new=table_new,
        table_dense=None,
        table_spans=None,
        rope=rope,
        moves=moves,
        relative=relative,
    )
    if rope == lay.rope and relative is None:
        dense, spans = cache.dense_table, cache.span_table if lay.max_spans else None
    elif not precompute:
        return view
    else:
        dense = view.dense_table(0, cache.dense_pos.shape[1])
        spans = span_tables_of(cache, lambda c: _span_tables(c, view)) if lay.max_spans else None
    return dataclasses.replace(view, table_dense=dense, table_spans=spans)


def _moves(cache: "KVCache", relative: RelativeTime, new_BTP: Array) -> Moves:
    """How far times move for new tokens, or a ValueError that says why they cannot."""
    lay = cache.layout
    if not 0 <= relative.component < lay.pos_dims:
        raise ValueError(
            f"relative component={relative.component} is not accepted: the cache has "
            f"pos_dims={lay.pos_dims}"
        )
    if not new_BTP.shape[1]:
        raise ValueError("relative with no new tokens: time counts back from the first of them")
    if (numbers := known(new_BTP)) is not None:
        time_BT = numbers[..., relative.component]
        relative.check(float((time_BT.max(1) - time_BT.min(1)).max()))
    return relative.moves(new_BTP, cache.dense_pos[:, 0] if lay.sink_blocks else None)


def _span_tables(cache: "KVCache", view: CacheView) -> Any:
    """Tables of the valid spans, leaves [N, B, T, ...].

    A loop over the valid ones: sine and cosine of empty slots would cost as much as full ones.
    """
    form = jax.eval_shape(view.table_of, cache.span_pos)
    slots = cache.layout.max_spans

    def one(i, tables):
        slot = (cache.first_span + i) % slots
        new = view.table_of(lax.dynamic_slice_in_dim(cache.span_pos, slot, 1, 0))
        return jax.tree.map(
            lambda t, x: lax.dynamic_update_slice_in_dim(t, x, slot, 0), tables, new
        )

    zeros = jax.tree.map(lambda f: jnp.zeros(f.shape, f.dtype), form)
    return lax.fori_loop(0, cache.num_spans, one, zeros)
