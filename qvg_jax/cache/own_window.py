"""Rows of sink and window in a cache whose local heads have a window of their own (`HeadHistory.own_window`).

Without that, sink and window hold all heads of all layers, [L, B, H, T, D]. With it, what holds them is in two
parts, each with one row for a head of a layer, behind each other in the order of layers and heads:

    dense  [n, B, 1, T, D]         heads with a history: sink and the whole window
    near   [L H - n, B, 1, T', D]  local heads: sink and a ring of the newest `local_blocks` blocks

So axes of both kinds of cache mean the same, and tokens are the fourth. Positions of the near tokens are kept beside
them: the window need not hold as many blocks as the ring.
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qvg_jax.cache.layout import Layout

if TYPE_CHECKING:
    from qvg_jax.cache.state import KVCache

__all__ = [
    "by_head",
    "dense_shape",
    "first_row",
    "near_order",
    "near_place",
    "near_shape",
    "read_rows",
    "rows_of",
    "write_rows",
]


def dense_shape(lay: Layout) -> tuple[int, ...]:
    """Shape of the buffer of K or V of sink and window, without the near one."""
    tokens = lay.dense_blocks * lay.block_tokens
    if not lay.own_window:
        return lay.layers, lay.batch, lay.heads, tokens, lay.head_dim
    return lay.history.full, lay.batch, 1, tokens, lay.head_dim


def near_shape(lay: Layout) -> tuple[int, ...]:
    """Shape of the buffer of K or V of local heads with a window of their own."""
    rows, tokens = lay.layers * lay.heads - lay.history.full, lay.near_blocks * lay.block_tokens
    return rows, lay.batch, 1, tokens, lay.head_dim


def rows_of(lay: Layout, x_LBHTD: Array, history: bool) -> Array:
    """The rows of new tokens, (n, B, 1, T, D), whose heads have a history, or of the local heads."""
    layer_n, head_n = np.nonzero(np.asarray(lay.history.table) == history)
    return jnp.swapaxes(x_LBHTD, 1, 2)[layer_n, head_n][:, :, None]


def first_row(lay: Layout, layer: Array, history: bool) -> Array:
    """The row of a layer's first head with a history, or of its first local head; `layer` may be traced."""
    counts = np.asarray(lay.history.counts)
    counts = counts if history else lay.heads - counts
    return jnp.asarray(np.cumsum(counts) - counts, jnp.int32)[layer]


def read_rows(
    lay: Layout,
    buffer: Array,
    layer: Array,
    rows: int | None,
    start: Array | int,
    size: int,
    *,
    history: bool = True,
) -> Array:
    """Some tokens of a layer in a buffer: (1, B, H, size, D), or with own windows (rows, B, 1, size, D).

    Args:
        lay: of the cache.
        buffer: of K or V.
        layer: which layer; may be traced.
        rows: how many heads of the layer the buffer has; not read without own windows.
        start, size: of the tokens.
        history: whether it is the buffer of heads with a history.
    """
    corner, front = _corner(lay, layer, start, history), (1, lay.batch, lay.heads)
    if lay.own_window:
        front = rows, lay.batch, 1
    return lax.dynamic_slice(buffer, corner, (*front, size, lay.head_dim))


def write_rows(lay: Layout, buffer: Array, layer: Array, start: Array | int, x: Array) -> Array:
    """The buffer of heads with a history with what `read_rows` returned, or its like, from token `start` on."""
    return lax.dynamic_update_slice(buffer, x, _corner(lay, layer, start, True))


def by_head(lay: Layout, x: Array) -> Array:
    """What `read_rows` returned as (B, H, size, D)."""
    return jnp.swapaxes(x[:, :, 0], 0, 1) if lay.own_window else x[0]


def _corner(lay: Layout, layer: Array, start: Array | int, history: bool) -> list[Array]:
    """Where tokens of a layer begin, all indices of one dtype: with `jax_enable_x64` numbers are int64."""
    row = first_row(lay, layer, history) if lay.own_window else layer
    return [jnp.asarray(i, jnp.int32) for i in (row, 0, 0, start, 0)]


def near_place(cache: "KVCache") -> tuple[Array, Array]:
    """The first token of the near buffer to which the next block goes, and whether it is kept there at all."""
    lay = cache.layout
    number = cache.seen_blocks - cache.rejected_blocks
    in_ring = lay.sink_blocks + _ring_block(lay, number - lay.sink_blocks)
    block = jnp.where(number < lay.sink_blocks, number, in_ring)
    kept = (number < lay.sink_blocks) | (lay.history.local_blocks > 0)
    return jnp.minimum(block, lay.near_blocks - 1) * lay.block_tokens, kept


def near_order(cache: "KVCache") -> tuple[Array, Array]:
    """Tokens of the near buffer in the order of the video, and how many of them there are."""
    lay, size, ring = cache.layout, cache.layout.block_tokens, cache.layout.history.local_blocks
    number = cache.seen_blocks - cache.rejected_blocks
    in_window = jnp.maximum(number - lay.sink_blocks, 0)
    first = jnp.maximum(in_window - ring, 0)
    block = lay.sink_blocks + _ring_block(lay, first + jnp.arange(ring))
    ring_T = (block[:, None] * size + jnp.arange(size)[None]).reshape(-1)
    valid = (jnp.minimum(number, lay.sink_blocks) + jnp.minimum(in_window, ring)) * size
    return jnp.concatenate([jnp.arange(lay.sink_blocks * size), ring_T]), valid


def _ring_block(lay: Layout, number: Array) -> Array:
    """The place in the ring of a block of the window, by its number."""
    return number % max(1, lay.history.local_blocks)
