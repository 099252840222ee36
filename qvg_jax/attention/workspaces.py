"""Workspaces: keys and values of new tokens, sink, window and spans as attention kernels read them.

Bytes that the kernels know (`formats`) they decode, and rotate on the way; what else there is,
other codecs and `Encodings` of stored K and V, XLA brings into the workspace.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.dequantize import (
    Rotation,
    Scheme,
    Spans,
    Tokens,
    Window,
    decode_keys,
    decode_values,
    in_key_rows,
)
from pallas_kernels.dequantize.types import padded
from qvg_jax.attention.formats import E4M3, encoded, halves, scheme_of
from qvg_jax.attention.new_block import NewBlock, pairing_in, scale_of
from qvg_jax.attention.stored import NearKeys, slots_and_place
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.own_window import first_row
from qvg_jax.cache.rope import Encodings
from qvg_jax.cache.slots import read_slot
from qvg_jax.cache.view import CacheView
from qvg_jax.codecs.base import Codec

__all__ = ["by_kernels", "of_dense", "of_near", "of_spans", "of_spans_by_xla"]


@dataclasses.dataclass(frozen=True)
class _Spans:
    """Keys or values of all spans, and a bound of each row of one layer (None where spans are read in bf16)."""

    source: Any
    scheme: Scheme | None
    bound_R: Array | None

    def scale(self, first: Array, rows: int, growth: Array | float) -> Array:
        """The scales of some rows in e4m3, if they grow by so much when they are read."""
        if self.bound_R is None:
            return jnp.ones((rows,), jnp.float32)
        return scale_of(lax.dynamic_slice_in_dim(self.bound_R, first, rows) * growth)


def _spans(view: CacheView, slots: Any, codec: Codec, place: Array, fp8: bool) -> _Spans:
    """Keys or values of all spans in the slots of some layers, and bounds of the rows of one of these.

    Args:
        view: whose heads they are.
        slots, codec: of keys or of values, see `slots_and_place`.
        place: the layer's place in the slots.
        fp8: whether bounds are needed.
    """
    lay = view.cache.layout
    source, scheme = encoded(slots), scheme_of(codec, lay.head_dim, 1)
    rows = lay.max_spans * lay.batch * view.stored_heads
    if not fp8:
        return _Spans(source, scheme, None)
    pick = lambda x: lax.dynamic_slice_in_dim(x, place * rows, rows, 0)  # noqa: E731
    # Positive e4m3 numbers are ordered as their bytes.
    largest = pick(source.scales_RTG).max(axis=(1, 2))
    bound = lax.bitcast_convert_type(largest, E4M3).astype(jnp.float32)
    if source.exponents_R is not None:
        bound *= jnp.exp2(pick(source.exponents_R).astype(jnp.float32))
    bound *= scheme.reach
    if scheme.zero_points:
        largest = (pick(source.zeros_RTG) & 127).max(axis=(1, 2))
        zero = lax.bitcast_convert_type(largest, E4M3).astype(jnp.float32)
        if source.exponents_R is not None:
            zero *= jnp.exp2(pick(source.exponents_R).astype(jnp.float32))
        bound += zero
    if scheme.deviations:
        bound = bound[:, None] * pick(source.deviations_RD).astype(jnp.float32)
        if scheme.stages:
            bound += jnp.abs(source.centroids(place * rows, rows)).max(axis=2).sum(1)
        bound = bound.max(axis=1)
    elif scheme.stages:
        bound += jnp.abs(source.centroids(place * rows, rows)).max(axis=(2, 3)).sum(1)
    return _Spans(source, scheme, bound)


def by_kernels(view: CacheView) -> bool:
    """Whether the kernels turn stored bytes into what attention reads, and XLA nothing of it."""
    return _decoded_by_kernels(view.cache.layout) and _rotated_by_kernels(view)


def _decoded_by_kernels(lay: Layout) -> bool:
    codecs = (lay.key_codec, lay.value_codec) if lay.max_spans else ()
    schemes = [scheme_of(c, lay.head_dim, 1) for c in codecs]
    return not any(isinstance(s, str) for s in schemes)


def _rotated_by_kernels(view: CacheView) -> bool:
    if isinstance(view.rope, Encodings):
        return False
    return view.rope is None or pairing_in(view) is not None


def _through_xla(encode: Callable[[Array, Any], Array], x_BHTD: Array, table: Any) -> Array:
    """Keys or values, padded to a workspace and encoded by XLA, as rows of all heads that attention sees."""
    more = padded(x_BHTD.shape[2]) - x_BHTD.shape[2]
    x_BHTD = jnp.pad(x_BHTD, ((0, 0), (0, 0), (0, more), (0, 0)))

    def pad(t):
        return jnp.pad(t, ((0, 0), (0, x_BHTD.shape[2] - t.shape[1])) + ((0, 0),) * (t.ndim - 2))

    y_BCTD = encode(x_BHTD, jax.tree.map(pad, table))
    return y_BCTD.reshape(-1, *y_BCTD.shape[2:])


def _of_rows(
    k_nTD: Array, v_nTD: Array, tokens: int, dtype: Any, implementation: str
) -> tuple[Any, Array, Array]:
    """The scales of keys and of values, and keys and values in e4m3, from bf16 ones."""
    scales = [scale_of(jnp.abs(x).max(axis=(1, 2))) for x in (k_nTD, v_nTD)]
    here = dict(valid=tokens, dtype=dtype, implementation=implementation)
    k, v = (Tokens(x, 0, x.shape[0]) for x in (k_nTD, v_nTD))
    k = decode_keys(k, **here, scale_n=scales[0])
    return scales, k, decode_values(v, **here, scale_n=scales[1])


def of_dense(
    view: CacheView, layer: Array, valid: Array, part: tuple[int, int], implementation: str
) -> tuple[Array, Array]:
    """Workspaces of a part (first token, how many) of sink and window, in bf16.

    Args:
        view, layer: what is read.
        valid: tokens of the part that count.
        part: all of the buffer, or with "mosaic" some of it.
        implementation: of the kernels.
    """
    cache, lay = view.cache, view.cache.layout
    rows, total = lay.batch * lay.heads, cache.dense_pos.shape[1]

    def source(x: Array) -> Tokens | Window:
        x_RTD = x.reshape(-1, *x.shape[-2:])
        if view.only is None:
            tokens = Tokens(x_RTD, layer * rows, rows)
        else:
            row_n = _rows(view, layer)
            some = 0, row_n.shape[0]
            listed = implementation != "triton"  # which reads rows that follow one another
            tokens = Tokens(x_RTD, *some, row_n) if listed else Tokens(x_RTD[row_n], *some)
        return tokens if part == (0, total) else Window(tokens, *part)

    tables = view.dense_table(0, total), lambda: view.dense_table(*part)
    return _plain(
        view, [source(x) for x in (cache.dense_k, cache.dense_v)], valid, tables, implementation
    )


def _rows(view: CacheView, layer: Array) -> Array:
    """Rows of sink and window of the heads with a history that a view is narrowed to, videos first."""
    lay, only = view.cache.layout, view.only
    if not lay.own_window:
        return layer * (lay.batch * lay.heads) + only.rows(lay.batch, lay.heads)
    head_h = first_row(lay, layer, True) + jnp.arange(only.count)
    return (jnp.arange(lay.batch)[:, None] + head_h[None] * lay.batch).reshape(-1)


def of_near(view: CacheView, near: NearKeys, implementation: str) -> tuple[Array, Array]:
    """Workspaces of what local heads read of sink and window, in bf16.

    Args:
        view: narrowed to local heads of a cache without padding.
        near: its near keys.
        implementation: of the kernels.
    """
    sides = (x.reshape(-1, *x.shape[-2:]) for x in (near.k_BHTD, near.v_BHTD))
    sources = [Tokens(x_RTD, 0, x_RTD.shape[0]) for x_RTD in sides]
    return _plain(view, sources, near.valid, (near.table, lambda: near.table), implementation)


def _plain(
    view: CacheView,
    sources: list[Any],
    valid: Array,
    tables: tuple[Any, Callable[[], Any]],
    implementation: str,
) -> tuple[Array, Array]:
    """Workspaces of bf16 keys and values that no span holds.

    Args:
        view: whose rope or encodings they get.
        sources: keys and values.
        valid: tokens that count.
        tables: the rope table of all tokens of the rows, and what returns that of those in the workspace.
        implementation: of the kernels.
    """
    lay = view.cache.layout
    here = dict(valid=valid, dtype=jnp.bfloat16, implementation=implementation)
    rotated, rotation = _rotated_by_kernels(view), None
    if rotated and tables[0] is not None:
        rotation = Rotation(tables[0], pairing_in(view), lay.batch)
    k_nWD = decode_keys(sources[0], **here, rotation=rotation)
    v_nWD = decode_values(sources[1], **here)
    if rotated:
        return k_nWD, v_nWD
    heads = lambda x: x.reshape(lay.batch, -1, *x.shape[1:])  # noqa: E731
    table = tables[1]()
    k_nWD = _through_xla(view.keys, heads(k_nWD), table)
    return k_nWD, _through_xla(view.values, heads(v_nWD), table)


def of_spans(view: CacheView, layer: Array, dtype: Any, implementation: str) -> Callable[..., Any]:
    """The function that decodes and rotates spans by kernels: `read(slot, valid, new=None, width=None)`.

    It returns the scales of keys and values, and their workspaces.

    Given several slots, their spans lie behind each other, and their scales are those of all spans.
    With a `NewBlock` its tokens lie behind the valid ones, a multiple of 16. A width is that of
    `decode_keys`.
    """
    cache, lay, fp8 = view.cache, view.cache.layout, dtype != jnp.bfloat16
    rows, rotated = lay.batch * view.stored_heads, view.rope is not None
    sides = (lay.key_codec, cache.span_k), (lay.value_codec, cache.span_v)
    # Layers share slots of keys and slots of values alike: their place in both is the same.
    (_, place), *_ = found = [slots_and_place(view, *side, layer) for side in sides]
    keys, values = (
        _spans(view, slots, codec, place, fp8)
        for (codec, _), (slots, _) in zip(sides, found, strict=True)
    )
    flat = lambda x: x.reshape(-1, *x.shape[-2:])  # noqa: E731

    def scale(x: _Spans, slot: Array, growth: float) -> Array:
        if not slot.ndim:
            return x.scale(slot * rows, rows, growth)
        age_N = (jnp.arange(lay.max_spans) - cache.first_span) % lay.max_spans
        scale_Nn = x.scale(0, lay.max_spans * rows, growth).reshape(lay.max_spans, rows)
        most_n = jnp.where((age_N < cache.num_spans)[:, None], scale_Nn, 0).max(axis=0)
        return jnp.where(most_n > 0, most_n, 1)

    def rotation(slot: Array) -> Rotation | None:
        if not rotated:
            return None
        first = 0
        if view.table_spans is not None:
            cos_sin, first = jax.tree.map(flat, view.table_spans), slot * lay.batch
        elif not slot.ndim:
            cos_sin = view.span_table(slot)
        else:
            cos_sin = jax.tree.map(flat, view.table_of(cache.span_pos[slot]))
            first = jnp.arange(slot.shape[0]) * lay.batch
        return Rotation(cos_sin, pairing_in(view), lay.batch, first)

    def read(slot: Array, valid: Any, new: NewBlock | None = None, width: int | None = None) -> Any:
        here = dict(valid=valid, dtype=dtype, width=width, implementation=implementation)
        first_row = (place * lay.max_spans + slot) * rows
        scales = [scale(keys, slot, math.sqrt(2) if rotated else 1), scale(values, slot, 1)]
        if new is not None:
            scales = [jnp.maximum(*both) for both in zip(scales, new.scales, strict=True)]
            here |= dict(room=new.tokens)
        k, v = (Spans(x.source, x.scheme, first_row, rows) for x in (keys, values))
        k_nWD = decode_keys(k, **here, scale_n=scales[0], rotation=rotation(slot))
        v = decode_values(v, **here, scale_n=scales[1])
        return scales, *((k_nWD, v) if new is None else new.workspace(scales, (k_nWD, v, valid)))

    return read


def of_spans_by_xla(
    view: CacheView, layer: Array, dtype: Any, implementation: str
) -> Callable[[Array, int], Any]:
    """The function that brings a span into workspaces with the help of XLA: `read(slot, valid)`.

    For codecs that the kernels do not decode, and for encodings that they do not apply.
    """
    cache, lay = view.cache, view.cache.layout
    rows, spans = lay.batch * view.stored_heads, None
    sides = [
        (codec, *slots_and_place(view, codec, slots, layer))
        for codec, slots in ((lay.key_codec, cache.span_k), (lay.value_codec, cache.span_v))
    ]
    bounded = isinstance(view.rope, Encodings) and view.rope.growth is not None
    if dtype != jnp.bfloat16 and bounded and _decoded_by_kernels(lay):
        spans = [_spans(view, slots, codec, place, True) for codec, slots, place in sides]

    def stored(codec, slots, place, decode, slot):
        of = lambda joined: scheme_of(codec, lay.head_dim, joined)  # noqa: E731
        scheme, first = of(1), (place * lay.max_spans + slot) * rows
        if not isinstance(scheme, str):
            source = encoded(slots)
        else:
            packed, scheme = read_slot(slots, place, slot), of(2)
            if isinstance(scheme, str):
                return codec.decode(packed, jnp.bfloat16)
            source, first = halves(packed), 0
        x_nWD = decode(
            Spans(source, scheme, first, rows), valid=lay.span_tokens, dtype=jnp.bfloat16,
            implementation=implementation,
        )  # fmt: skip
        return x_nWD.reshape(lay.batch, view.stored_heads, *x_nWD.shape[1:])

    def read(slot: Array, valid: int) -> Any:
        table = view.span_table(slot)
        k_BHTD = stored(*sides[0], decode_keys, slot)
        v_BHTD = stored(*sides[1], decode_values, slot)
        # An encoding reads each channel more than once; without the barrier XLA decodes it again.
        k_BHTD, v_BHTD = lax.optimization_barrier((k_BHTD, v_BHTD))
        k_nWD = _through_xla(view.keys, k_BHTD, table)
        v_nWD = _through_xla(view.values, v_BHTD, table)
        if spans is not None:
            growths = view.rope.growth(table)
            scales = [
                jnp.repeat(x.scale(slot * rows, rows, g), view.rope.copies)
                for x, g in zip(spans, growths, strict=True)
            ]
            k_nWD, v_nWD = (
                jnp.clip(x / scale_n[:, None, None], -448, 448).astype(dtype)
                for x, scale_n in zip((k_nWD, v_nWD), scales, strict=True)
            )
            return scales, in_key_rows(k_nWD), jnp.swapaxes(v_nWD, 1, 2)
        if dtype != jnp.bfloat16:
            return _of_rows(k_nWD, v_nWD, valid, dtype, implementation)
        ones = jnp.ones((k_nWD.shape[0],), jnp.float32)
        return (ones, ones), k_nWD, v_nWD

    return read
