"""Workspaces: keys and values of new tokens, sink, window and spans as attention kernels read them.

Bytes that the kernels know (`kernel_formats`) they decode, and rotate on the way; what else there is,
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

from pallas_kernels.dequantize import Scheme, decode_keys, decode_values, in_key_rows
from pallas_kernels.dequantize.types import padded
from qvg_jax.codec import Codec
from qvg_jax.kernel_formats import E4M3, encoded, halves, pairing_of, scheme_of
from qvg_jax.layout import Layout
from qvg_jax.rope import Encodings, Rope
from qvg_jax.slots import read_slot
from qvg_jax.view import CacheView

__all__ = [
    "NewBlock",
    "by_kernels",
    "new_block",
    "of_dense",
    "of_spans",
    "of_spans_by_xla",
    "turning",
]


@dataclasses.dataclass(frozen=True)
class _Spans:
    """Keys or values of all spans, and bounds of one layer's rows; None in bf16."""

    source: Any
    scheme: Scheme | None
    bound_R: Array | None

    def unit(self, first: Array, rows: int, growth: Array | float) -> Array:
        """The units of some rows in e4m3, if they grow by so much when they are read."""
        if self.bound_R is None:
            return jnp.ones((rows,), jnp.float32)
        return _unit(lax.dynamic_slice_in_dim(self.bound_R, first, rows) * growth)


def _spans(slots: Any, codec: Codec, lay: Layout, layer: Array, narrow: bool, by: str) -> _Spans:
    source, scheme = encoded(slots), scheme_of(codec, lay.head_dim, 1, by)
    rows = lay.max_spans * lay.batch * lay.heads
    if not narrow:
        return _Spans(source, scheme, None)
    pick = lambda x: lax.dynamic_slice_in_dim(x, layer * rows, rows, 0)  # noqa: E731
    # Positive e4m3 numbers are ordered as their bytes.
    largest = pick(source.scales_RTG).max(axis=(1, 2))
    bound = lax.bitcast_convert_type(largest, E4M3).astype(jnp.float32)
    if source.exponents_R is not None:
        bound *= jnp.exp2(pick(source.exponents_R).astype(jnp.float32))
    bound *= max(scheme.offset, 2**scheme.bits - 1 - scheme.offset)
    if scheme.stages:
        bound += jnp.abs(source.tables(layer * rows, rows)).max(axis=(2, 3)).sum(1)
    return _Spans(source, scheme, bound)


def _unit(bound: Array) -> Array:
    """The least power of two by which values up to `bound` may be divided for e4m3."""
    bound = bound.astype(jnp.float32) / 448
    return jnp.exp2(jnp.ceil(jnp.log2(jnp.where(bound > 0, bound, 1))))


def by_kernels(view: CacheView, implementation: str) -> bool:
    """Whether the kernels turn stored bytes into what attention reads, and XLA nothing of it."""
    return _decoded_by_kernels(view.cache.layout, implementation) and _turned_by_kernels(view)


def _decoded_by_kernels(lay: Layout, implementation: str) -> bool:
    codecs = (lay.key_codec, lay.value_codec) if lay.max_spans else ()
    schemes = [scheme_of(c, lay.head_dim, 1, implementation) for c in codecs]
    return not any(isinstance(s, str) for s in schemes)


def _turned_by_kernels(view: CacheView) -> bool:
    if isinstance(view.rope, Encodings):
        return False
    return view.rope is None or _pairing(view) is not None


def _pairing(view: CacheView) -> str | None:
    lay: Layout = view.cache.layout
    if not isinstance(view.rope, Rope):
        return "half"
    return pairing_of(view.rope, lay.head_dim, lay.pos_dims)


def _through_xla(encode: Callable[[Array, Any], Array], x_BHTD: Array, table: Any) -> Array:
    """Keys or values, padded to a workspace, through an encoding: rows of all its heads."""
    more = padded(x_BHTD.shape[2]) - x_BHTD.shape[2]
    x_BHTD = jnp.pad(x_BHTD, ((0, 0), (0, 0), (0, more), (0, 0)))

    def pad(t):
        return jnp.pad(t, ((0, 0), (0, x_BHTD.shape[2] - t.shape[1])) + ((0, 0),) * (t.ndim - 2))

    y_BCTD = encode(x_BHTD, jax.tree.map(pad, table))
    return y_BCTD.reshape(-1, *y_BCTD.shape[2:])


def turning(view: CacheView, x_BTHD: Array) -> tuple[Array, dict[str, Any]]:
    """New queries or keys, and what turns them on their way; XLA turns what the kernels cannot."""
    still = dict(tables=None, pairing="half")
    if not isinstance(view.rope, Rope):
        return x_BTHD, still
    if (pairing := _pairing(view)) is None:
        turned = view.new(jnp.swapaxes(x_BTHD, 1, 2))
        return jnp.swapaxes(turned, 1, 2), still
    branches = x_BTHD.shape[0] // view.cache.layout.batch
    tables = view.table_new
    if branches > 1:
        tables = tuple(jnp.concatenate([t] * branches) for t in tables)
    return x_BTHD, dict(tables=tables, pairing=pairing)


def _of_rows(
    k_nTD: Array, v_nTD: Array, tokens: int, dtype: Any, implementation: str
) -> tuple[Any, Array, Array]:
    """((unit of keys, of values), keys, values) of bf16 ones; units are 1 in bf16."""
    narrow, rows = dtype != jnp.bfloat16, k_nTD.shape[0]
    units = [
        _unit(jnp.abs(x).max(axis=(1, 2))) if narrow else jnp.ones((rows,), jnp.float32)
        for x in (k_nTD, v_nTD)
    ]
    here = dict(first_row=0, rows=rows, valid=tokens, dtype=dtype, implementation=implementation)
    k = decode_keys(k_nTD, None, **here, unit_n=units[0])
    return units, k, decode_values(v_nTD, None, **here, unit_n=units[1])


@dataclasses.dataclass(frozen=True)
class NewBlock:
    """Keys and values of the new tokens on their way into a workspace.

    Attributes:
        k, v: bf16, as the kernels read them: (B, T, H, D), or rows.
        batch, rows, tokens: sizes.
        turn: of the keys, see `turning`.
        units: of the rows of keys and of values in e4m3; 1 in bf16.
        dtype, implementation: of the workspace, of the kernels.
    """

    k: Array
    v: Array
    batch: int
    rows: int
    tokens: int
    turn: dict[str, Any]
    units: list[Array]
    dtype: Any
    implementation: str

    def workspace(self, units: list[Array], behind: Any = None) -> tuple[Array, Array]:
        """Keys and values in workspaces of their own, or in (keys, values) from token `at` on.

        Args:
            units: of the rows.
            behind: (keys, values, at), or None.
        """
        here = dict(first_row=0, rows=self.rows, valid=self.tokens, dtype=self.dtype)
        here |= dict(implementation=self.implementation)
        into = [{}, {}] if behind is None else [dict(into=(w, behind[2])) for w in behind[:2]]
        keys = here | self.turn | dict(batch=self.batch, unit_n=units[0]) | into[0]
        values = here | dict(unit_n=units[1]) | into[1]
        return decode_keys(self.k, None, **keys), decode_values(self.v, None, **values)


def new_block(
    view: CacheView, k_BTHD: Array, v_BTHD: Array, dtype: Any, implementation: str
) -> NewBlock:
    """Of what `attend` is given; its batch may be a multiple of the cache's."""
    batch, tokens, heads, d = k_BTHD.shape
    rows, narrow = batch * heads, dtype != jnp.bfloat16
    k_BTHD, v_BTHD = k_BTHD.astype(jnp.bfloat16), v_BTHD.astype(jnp.bfloat16)
    k_BTHD, turn = turning(view, k_BTHD)
    # A rotation lets the largest number grow by no more than the root of two.
    growths = (1.0 if turn["tables"] is None else math.sqrt(2), 1.0)
    units = [
        _unit(jnp.abs(x).max(axis=(1, 3)).reshape(-1) * growth)
        if narrow
        else jnp.ones((rows,), jnp.float32)
        for x, growth in zip((k_BTHD, v_BTHD), growths, strict=True)
    ]
    k, v = k_BTHD, v_BTHD
    if implementation != "mosaic":
        k, v = (jnp.swapaxes(x, 1, 2).reshape(rows, tokens, d) for x in (k, v))
    return NewBlock(k, v, batch, rows, tokens, turn, units, dtype, implementation)


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
    here = dict(first_row=layer * rows, rows=rows, valid=valid, dtype=jnp.bfloat16)
    here |= dict(unit_n=jnp.ones((rows,), jnp.float32), implementation=implementation)
    if part != (0, total):
        here |= dict(window=(jnp.int32(part[0]), part[1]))
    flat = lambda x: x.reshape(-1, *x.shape[-2:])  # noqa: E731
    turned = _turned_by_kernels(view)
    tables = {}
    if turned:
        tables = dict(tables=view.dense_table(0, total), pairing=_pairing(view))
    k_nWD = decode_keys(flat(cache.dense_k), None, **here, **tables, batch=lay.batch)
    v_nWD = decode_values(flat(cache.dense_v), None, **here)
    if turned:
        return k_nWD, v_nWD
    heads = lambda x: x.reshape(lay.batch, lay.heads, *x.shape[1:])  # noqa: E731
    table = view.dense_table(*part)
    k_nWD = _through_xla(view.keys, heads(k_nWD), table)
    return k_nWD, _through_xla(view.values, heads(v_nWD), table)


def of_spans(view: CacheView, layer: Array, dtype: Any, implementation: str) -> Callable[..., Any]:
    """read(slot, valid, new=None): units and workspaces of a span, decoded and rotated by the kernels.

    Given several slots, their spans lie behind each other, and their units are those of all spans.
    With a `NewBlock` its tokens lie behind the valid ones, a multiple of 16.
    """
    cache, lay, narrow = view.cache, view.cache.layout, dtype != jnp.bfloat16
    rows, turned = lay.batch * lay.heads, view.rope is not None
    about = (narrow, implementation)
    keys = _spans(cache.span_k, lay.key_codec, lay, layer, *about)
    values = _spans(cache.span_v, lay.value_codec, lay, layer, *about)
    flat = lambda x: x.reshape(-1, *x.shape[-2:])  # noqa: E731

    def unit(x: _Spans, slot: Array, growth: float) -> Array:
        if not slot.ndim:
            return x.unit(slot * rows, rows, growth)
        age_N = (jnp.arange(lay.max_spans) - cache.first_span) % lay.max_spans
        unit_Nn = x.unit(0, lay.max_spans * rows, growth).reshape(lay.max_spans, rows)
        most_n = jnp.where((age_N < cache.num_spans)[:, None], unit_Nn, 0).max(axis=0)
        return jnp.where(most_n > 0, most_n, 1)

    def turns(slot: Array) -> dict[str, Any]:
        if not turned:
            return {}
        if view.table_spans is not None:
            return dict(tables=jax.tree.map(flat, view.table_spans), first_table=slot * lay.batch)
        if not slot.ndim:
            return dict(tables=view.span_table(slot))
        tables = jax.tree.map(flat, view.rope.table(cache.span_pos[slot]))
        return dict(tables=tables, first_table=jnp.arange(slot.shape[0]) * lay.batch)

    def read(slot: Array, valid: Any, new: NewBlock | None = None) -> Any:
        here = dict(rows=rows, valid=valid, dtype=dtype, implementation=implementation)
        here |= dict(first_row=(layer * lay.max_spans + slot) * rows)
        units = [unit(keys, slot, math.sqrt(2) if turned else 1), unit(values, slot, 1)]
        if new is not None:
            units = [jnp.maximum(*both) for both in zip(units, new.units, strict=True)]
            here |= dict(room=new.tokens)
        k_nWD = decode_keys(
            keys.source, keys.scheme, **here, unit_n=units[0], batch=lay.batch,
            pairing=_pairing(view), **turns(slot),
        )  # fmt: skip
        v = decode_values(values.source, values.scheme, **here, unit_n=units[1])
        return units, *((k_nWD, v) if new is None else new.workspace(units, (k_nWD, v, valid)))

    return read


def of_spans_by_xla(
    view: CacheView, layer: Array, dtype: Any, implementation: str
) -> Callable[[Array, int], Any]:
    """read(slot, valid) for other codecs and encodings: what the kernels cannot do, XLA does."""
    cache, lay = view.cache, view.cache.layout
    rows, spans = lay.batch * lay.heads, None
    bounded = isinstance(view.rope, Encodings) and view.rope.growth is not None
    if dtype != jnp.bfloat16 and bounded and _decoded_by_kernels(lay, implementation):
        sides = (cache.span_k, lay.key_codec), (cache.span_v, lay.value_codec)
        spans = [_spans(*side, lay, layer, True, implementation) for side in sides]

    def stored(codec, slots, decode, slot):
        of = lambda joined: scheme_of(codec, lay.head_dim, joined, implementation)  # noqa: E731
        scheme, first = of(1), (layer * lay.max_spans + slot) * rows
        if not isinstance(scheme, str):
            source = encoded(slots)
        else:
            packed, scheme = read_slot(slots, layer, slot), of(2)
            if isinstance(scheme, str):
                return codec.decode(packed, jnp.bfloat16)
            source, first = halves(packed), 0
        x_nWD = decode(
            source, scheme, first_row=first, rows=rows, valid=lay.span_tokens, dtype=jnp.bfloat16,
            unit_n=jnp.ones((rows,), jnp.float32), implementation=implementation,
        )  # fmt: skip
        return x_nWD.reshape(lay.batch, lay.heads, *x_nWD.shape[1:])

    def read(slot: Array, valid: int) -> Any:
        table = view.span_table(slot)
        k_BHTD = stored(lay.key_codec, cache.span_k, decode_keys, slot)
        v_BHTD = stored(lay.value_codec, cache.span_v, decode_values, slot)
        # An encoding reads each channel more than once; without the barrier XLA decodes it again.
        k_BHTD, v_BHTD = lax.optimization_barrier((k_BHTD, v_BHTD))
        k_nWD = _through_xla(view.keys, k_BHTD, table)
        v_nWD = _through_xla(view.values, v_BHTD, table)
        if spans is not None:
            growths = view.rope.growth(table)
            units = [
                jnp.repeat(x.unit(slot * rows, rows, g), view.rope.copies)
                for x, g in zip(spans, growths, strict=True)
            ]
            k_nWD, v_nWD = (
                jnp.clip(x / unit_n[:, None, None], -448, 448).astype(dtype)
                for x, unit_n in zip((k_nWD, v_nWD), units, strict=True)
            )
            return units, in_key_rows(k_nWD), jnp.swapaxes(v_nWD, 1, 2)
        if dtype != jnp.bfloat16:
            return _of_rows(k_nWD, v_nWD, valid, dtype, implementation)
        ones = jnp.ones((k_nWD.shape[0],), jnp.float32)
        return (ones, ones), k_nWD, v_nWD

    return read
