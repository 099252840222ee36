"""attend on the GPU kernels: from caches, codecs and ropes to the arrays that kernels know.

Spans are decoded one at a time into a workspace, which one kernel attends to. Bytes that the
kernels know (`kernel_formats`) they decode, and rotate on the way; what else there is, other codecs
and `Encodings` of stored K and V, XLA brings into the workspace.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.dequant_attention import finish, prepare, splits_for, visit
from pallas_kernels.dequantize import Scheme, decode_keys, decode_values
from pallas_kernels.dequantize.types import padded
from qvg_jax.capability import processors
from qvg_jax.codec import Codec
from qvg_jax.devices import is_hopper, on_several_devices
from qvg_jax.kernel_formats import E4M3, encoded, halves, pairing_of, scheme_of
from qvg_jax.layout import Layout
from qvg_jax.rope import Encodings, Rope
from qvg_jax.slots import read_slot
from qvg_jax.view import CacheView

__all__ = ["attend_kernels", "is_hopper", "unsupported"]


_HEAD_DIMS = {"mosaic": (128,), "triton": (64, 128, 256)}


def unsupported(
    view: CacheView, q_BTHD: Array, narrow: bool, implementation: str = "mosaic"
) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    lay: Layout = view.cache.layout
    accepted = _HEAD_DIMS[implementation]
    if lay.head_dim not in accepted:
        return f"head_dim={lay.head_dim}; the kernels read {', '.join(map(str, accepted))}"
    for name, x in (("q", q_BTHD), ("the dense buffer", view.cache.dense_k)):
        if x.dtype != jnp.bfloat16:
            return f"{name} has dtype {x.dtype}; the kernels read bfloat16"
    if (why := on_several_devices(q_BTHD)) is not None:
        return why
    for name, codec in (("key", lay.key_codec), ("value", lay.value_codec)):
        if narrow and lay.max_spans and scheme_of(codec, lay.head_dim) is None:
            return f"{name} codec {codec.name}: e4m3 attention needs a bound that codes give"
    return None


@dataclasses.dataclass(frozen=True)
class _Spans:
    """Keys or values of all spans, and of one layer the units of its rows in e4m3."""

    source: Any
    scheme: Scheme | None
    unit_R: Array


def _spans(
    slots: Any, codec: Codec, lay: Layout, layer: Array, turned: bool, narrow: bool, by: str
) -> _Spans:
    source, scheme = encoded(slots), scheme_of(codec, lay.head_dim, 1, by)
    rows = lay.max_spans * lay.batch * lay.heads
    if not narrow:
        return _Spans(source, scheme, jnp.ones((rows,), jnp.float32))
    pick = lambda x: lax.dynamic_slice_in_dim(x, layer * rows, rows, 0)  # noqa: E731
    # Positive e4m3 numbers are ordered as their bytes.
    largest = pick(source.scales_RTG).max(axis=(1, 2))
    bound = lax.bitcast_convert_type(largest, E4M3).astype(jnp.float32)
    if source.exponents_R is not None:
        bound *= jnp.exp2(pick(source.exponents_R).astype(jnp.float32))
    bound *= max(scheme.offset, 2**scheme.bits - 1 - scheme.offset)
    if scheme.stages:
        bound += jnp.abs(source.tables(layer * rows, rows)).max(axis=(2, 3)).sum(1)
    return _Spans(source, scheme, _unit(bound * (math.sqrt(2) if turned else 1)))


def _unit(bound: Array) -> Array:
    """The least power of two by which values up to `bound` may be divided for e4m3."""
    bound = bound.astype(jnp.float32) / 448
    return jnp.exp2(jnp.ceil(jnp.log2(jnp.where(bound > 0, bound, 1))))


def _by_kernels(view: CacheView, implementation: str) -> bool:
    """Whether the kernels turn stored bytes into what attention reads, and XLA nothing of it."""
    lay: Layout = view.cache.layout
    codecs = (lay.key_codec, lay.value_codec) if lay.max_spans else ()
    schemes = [scheme_of(c, lay.head_dim, 1, implementation) for c in codecs]
    known = not any(isinstance(s, str) for s in schemes)
    return known and _turned_by_kernels(view)


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


def attend_kernels(
    q_BTHD: Array,
    view: CacheView,
    k_BTHD: Array,
    v_BTHD: Array,
    layer: Array,
    scale: Array,
    *,
    narrow: bool,
    implementation: str = "mosaic",
) -> Array:
    """`attend` for what is not `unsupported`, by the kernels of `implementation`.

    Spans are decoded one at a time into a workspace and merged into one running softmax. If
    `narrow`, they and the new block are attended in e4m3; sink and window always in bf16, as
    nothing bounds their values but a pass over them.
    """
    cache, lay = view.cache, view.cache.layout
    rows, bf16 = lay.batch * view.heads, jnp.bfloat16
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    q, k = view.new(q), view.new(k.astype(bf16))
    group, branches = q.shape[1] // view.heads, q.shape[0] // lay.batch
    own_mQD = q.reshape(branches * rows, -1, lay.head_dim)
    q_nQD = _joined(own_mQD, branches)
    queries = q_nQD.shape[1]
    wide = prepare(q_nQD, scale, bf16)
    asked = prepare(q_nQD, scale, E4M3) if narrow else wide
    dtype = asked.q_nQD.dtype
    typical = lay.span_tokens if lay.max_spans else k.shape[2]
    splits = splits_for(rows, queries, typical, max(1, lay.max_spans), narrow, processors())
    by = dict(splits=splits, implementation=implementation)
    flat = lambda x: x.reshape(-1, *x.shape[-2:])  # noqa: E731
    units, k_new, v_new = _workspace(
        flat(k), flat(v.astype(bf16)), k.shape[2], dtype, implementation
    )
    state = visit(
        asked if branches == 1 else prepare(own_mQD, scale, dtype),
        k_new, v_new, k.shape[2], k_unit_n=units[0], v_unit_n=units[1], **by,
    )  # fmt: skip
    if branches > 1:  # each had a block of its own; all read the same cache
        state = [_joined(x[:, :, : own_mQD.shape[1]], branches, 1) for x in state]
        more = asked.q_nQD.shape[1] - queries
        state = [jnp.pad(x, ((0, 0), (0, 0), (0, more)) + ((0, 0),) * (x.ndim - 3)) for x in state]
    refs = [jax.new_ref(x) for x in state]

    valid = cache.dense_blocks * lay.block_tokens
    k_dense, v_dense = _dense(view, layer, valid, implementation)
    visit(wide, k_dense, v_dense, valid, state=refs, **by)

    if lay.max_spans:
        reader = _span_reader if _by_kernels(view, implementation) else _xla_span_reader
        read = reader(view, layer, dtype, implementation)

        def span(i, done):
            units, k_span, v_span = read((cache.first_span + i) % lay.max_spans)
            visit(
                asked, k_span, v_span, lay.span_tokens, k_unit_n=units[0], v_unit_n=units[1],
                state=refs, **by,
            )  # fmt: skip
            return done

        lax.fori_loop(0, cache.num_spans, span, jnp.int32(0))
    out_nQD = finish([r[...] for r in refs], queries)
    out = out_nQD.reshape(lay.batch, view.heads, branches, group, -1, lay.head_dim)
    out_BTHD = jnp.transpose(out, (2, 0, 4, 1, 3, 5))
    return out_BTHD.reshape(q_BTHD.shape).astype(q_BTHD.dtype)


def _joined(x: Array, branches: int, axis: int = 0) -> Array:
    """Rows of all branches as more queries of a branch's rows: (R n, Q) to (n, R Q) at `axis`."""
    *before, _, queries = x.shape[: axis + 2]
    apart = x.reshape(*before, branches, -1, queries, *x.shape[axis + 2 :])
    rows = apart.shape[axis + 1]
    return jnp.swapaxes(apart, axis, axis + 1).reshape(*before, rows, -1, *x.shape[axis + 2 :])


def _workspace(
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


def _dense(view: CacheView, layer: Array, valid: Array, implementation: str) -> tuple[Array, Array]:
    """Workspaces of sink and window, in bf16."""
    cache, lay = view.cache, view.cache.layout
    rows = lay.batch * lay.heads
    here = dict(first_row=layer * rows, rows=rows, valid=valid, dtype=jnp.bfloat16)
    here |= dict(unit_n=jnp.ones((rows,), jnp.float32), implementation=implementation)
    flat = lambda x: x.reshape(-1, *x.shape[-2:])  # noqa: E731
    table = view.dense_table(0, cache.dense_pos.shape[1])
    turned = _turned_by_kernels(view)
    tables = dict(tables=table, pairing=_pairing(view)) if turned else {}
    k_nWD = decode_keys(flat(cache.dense_k), None, **here, **tables, batch=lay.batch)
    v_nWD = decode_values(flat(cache.dense_v), None, **here)
    if turned:
        return k_nWD, v_nWD
    heads = lambda x: x.reshape(lay.batch, lay.heads, *x.shape[1:])  # noqa: E731
    k_nWD = _through_xla(view.keys, heads(k_nWD), table)
    return k_nWD, _through_xla(view.values, heads(v_nWD), table)


def _span_reader(
    view: CacheView, layer: Array, dtype: Any, implementation: str
) -> Callable[[Array], Any]:
    """read(slot): units and workspaces of a span, decoded and rotated by the kernels."""
    cache, lay, narrow = view.cache, view.cache.layout, dtype != jnp.bfloat16
    rows, turned = lay.batch * lay.heads, view.rope is not None
    about = (narrow, implementation)
    keys = _spans(cache.span_k, lay.key_codec, lay, layer, turned, *about)
    values = _spans(cache.span_v, lay.value_codec, lay, layer, False, *about)

    def read(slot):
        here = dict(rows=rows, valid=lay.span_tokens, dtype=dtype, implementation=implementation)
        here |= dict(first_row=(layer * lay.max_spans + slot) * rows)
        units = [lax.dynamic_slice_in_dim(x.unit_R, slot * rows, rows) for x in (keys, values)]
        tables, first = None, 0
        if turned and view.table_spans is None:
            tables = view.span_table(slot)
        elif turned:
            flat = lambda x: x.reshape(-1, *x.shape[-2:])  # noqa: E731
            tables, first = jax.tree.map(flat, view.table_spans), slot * lay.batch
        k_span = decode_keys(
            keys.source, keys.scheme, **here, unit_n=units[0], tables=tables,
            first_table=first, batch=lay.batch, pairing=_pairing(view),
        )  # fmt: skip
        return units, k_span, decode_values(values.source, values.scheme, **here, unit_n=units[1])

    return read


def _xla_span_reader(
    view: CacheView, layer: Array, dtype: Any, implementation: str
) -> Callable[[Array], Any]:
    """The same for other codecs and encodings: what the kernels cannot do, XLA does."""
    cache, lay = view.cache, view.cache.layout
    rows = lay.batch * lay.heads

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

    def read(slot):
        table = view.span_table(slot)
        k_BHTD = stored(lay.key_codec, cache.span_k, decode_keys, slot)
        v_BHTD = stored(lay.value_codec, cache.span_v, decode_values, slot)
        # An encoding reads each channel more than once; without the barrier XLA decodes it again.
        k_BHTD, v_BHTD = lax.optimization_barrier((k_BHTD, v_BHTD))
        k_nWD = _through_xla(view.keys, k_BHTD, table)
        v_nWD = _through_xla(view.values, v_BHTD, table)
        if dtype != jnp.bfloat16:
            return _workspace(k_nWD, v_nWD, lay.span_tokens, dtype, implementation)
        ones = jnp.ones((k_nWD.shape[0],), jnp.float32)
        return (ones, ones), k_nWD, v_nWD

    return read
