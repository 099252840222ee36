"""Keys and values of a view as they are stored: of sink and window, of a span, and near ones of local heads.

All of a layer's heads, or those that the view is narrowed to (`CacheView.only`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qvg_jax.cache.layer_codecs import groups_of, parts_of
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.own_window import by_head, near_order, read_rows
from qvg_jax.cache.slots import decode_slot, read_slot
from qvg_jax.cache.view import CacheView
from qvg_jax.codecs.base import Codec, Packed

__all__ = ["NearKeys", "decoded_span", "near_keys", "packed_keys", "read_dense", "slots_and_place"]


def read_dense(view: CacheView, buffer: Array, layer: Array, start: Array, size: int) -> Array:
    """Tokens `start` to `start` + `size` of the dense buffer of K or V in one layer, (B, H, size, D)."""
    lay: Layout = view.cache.layout
    rows = None if view.only is None else view.only.count
    x_BHTD = by_head(lay, read_rows(lay, buffer, layer, rows, start, size))
    return x_BHTD if view.only is None or lay.own_window else view.only.of(x_BHTD)


def decoded_span(view: CacheView, layer: Array, slot: Array, dtype: Any) -> tuple[Array, Array]:
    """K and V of the span in one slot, decoded."""
    cache, lay = view.cache, view.cache.layout
    heads = None if view.only is None else view.only.count
    k_BHTD, v_BHTD = (
        decode_slot(slots, codec, lay, layer, slot, dtype, heads)
        for slots, codec in ((cache.span_k, lay.key_codec), (cache.span_v, lay.value_codec))
    )
    return k_BHTD, v_BHTD


def slots_and_place(view: CacheView, codec: Codec, slots: Any, layer: Array) -> tuple[Any, Array]:
    """The slots in which the spans of a layer lie, and its place in them, in a cache of one codec for all layers.

    Args:
        view: of all heads, or of those of the layer with a history.
        codec, slots: of keys or of values.
        layer: which one; may be traced.
    """
    if view.only is None:
        return slots, layer
    lay = view.cache.layout
    groups = groups_of(codec, lay)
    (g,) = (g for g, group in enumerate(groups) if group.shape[1] == view.only.count)
    index_L = np.zeros(lay.layers, np.int32)
    index_L[list(groups[g].layers)] = np.arange(len(groups[g].layers))
    return parts_of(codec, lay, slots)[g], jnp.asarray(index_L)[layer]


def packed_keys(view: CacheView, layer: Array, slot: Array) -> Packed:
    """The keys of the span in one slot as they are packed, in a cache of one codec for all layers."""
    cache = view.cache
    return read_slot(*slots_and_place(view, cache.layout.key_codec, cache.span_k, layer), slot)


class NearKeys(NamedTuple):
    """What a local head reads of the cache: the sink, then the newest blocks.

    Attributes:
        k_BHTD, v_BHTD: as they are stored; values that do not count are zero.
        table: their rope table; None without rope.
        counts_BT: bool, which tokens count; B is 1 where all rows are alike. Without padding those are
            the first ones.
    """

    k_BHTD: Array
    v_BHTD: Array
    table: Any
    counts_BT: Array

    @property
    def valid(self) -> Array:
        """The number of tokens that count, in a cache without padding."""
        return self.counts_BT[0].sum(dtype=jnp.int32)


def near_keys(view: CacheView, layer: Array, dtype: Any) -> NearKeys:
    """The near keys of the local heads that a view is narrowed to."""
    cache, lay = view.cache, view.cache.layout
    if lay.own_window:
        return _near_of_own(view, layer, dtype)
    size, valid = lay.block_tokens, cache.dense_tokens
    sink, recent = lay.sink_blocks * size, lay.history.local_blocks * size
    # The window may hold more blocks than these, which wait to be compressed.
    newest = jnp.clip(valid - recent, sink, lay.dense_blocks * size - recent)
    parts = [(jnp.zeros_like(newest), sink), (newest, recent)]

    def joined(read: Any, axis: int) -> Any:
        found = [read(start, length) for start, length in parts]
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis), *found)

    counts_BT = joined(lambda start, n: (start + jnp.arange(n) < valid)[None], 1)
    if cache.dense_valid is not None:
        cut = lambda start, n: lax.dynamic_slice_in_dim(cache.dense_valid, start, n, 1)  # noqa: E731
        counts_BT = counts_BT & joined(cut, 1)
    k_BHTD, v_BHTD = (
        joined(lambda start, n, x=x: read_dense(view, x, layer, start, n).astype(dtype), 2)
        for x in (cache.dense_k, cache.dense_v)
    )
    # A hidden value has weight zero, and zero times a NaN left there would still be NaN.
    v_BHTD = jnp.where(counts_BT[:, None, :, None], v_BHTD, 0)
    table = None if view.rope is None else joined(view.dense_table, 1)
    return NearKeys(k_BHTD, v_BHTD, table, counts_BT)


def _near_of_own(view: CacheView, layer: Array, dtype: Any) -> NearKeys:
    """The near keys of local heads that have a window of their own."""
    cache, lay = view.cache, view.cache.layout
    order_T, valid = near_order(cache)
    tokens = order_T.shape[0]
    counts_T = jnp.arange(tokens) < valid

    def read(buffer: Array) -> Array:
        rows = read_rows(lay, buffer, layer, view.only.count, 0, tokens, history=False)
        return by_head(lay, rows).take(order_T, 2).astype(dtype)

    k_BHTD, v_BHTD = read(cache.near_k), read(cache.near_v)
    # A hidden value has weight zero, and zero times a NaN left there would still be NaN.
    v_BHTD = jnp.where(counts_T[None, None, :, None], v_BHTD, 0)
    table = None
    if view.rope is not None:
        in_sink_T = jnp.arange(tokens) < lay.sink_blocks * lay.block_tokens
        table = view.table_of(cache.near_pos.take(order_T, 1), in_sink_T)
    return NearKeys(k_BHTD, v_BHTD, table, counts_T[None])
