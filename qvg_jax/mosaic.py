"""attend on the GPU kernels: from caches, codecs and ropes to the arrays that kernels know.

Kernels read codes and tables; codecs and ropes are functions. Which format a codec writes, and how
a rope pairs its channels, is found by trying: the reference decoder of the kernels must give what
the codec's own `decode` gives. What does not agree is left to XLA.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_kernels.dequant_attention import finish, prepare, splits_for, visit
from pallas_kernels.dequantize import Encoded, Scheme, decode_keys, decode_values, supported
from pallas_kernels.dequantize.reference import decoded
from qvg_jax.codec import Codec, IdentityPacked
from qvg_jax.layout import Layout
from qvg_jax.quantize.grid import GridPacked
from qvg_jax.quantize.integer import IntegerPacked
from qvg_jax.rope import Rope
from qvg_jax.slots import Float8Bytes
from qvg_jax.smoothing.kmeans import KMeansPacked
from qvg_jax.view import CacheView

__all__ = ["attend_kernels", "is_hopper", "unsupported"]

E4M3 = jnp.float8_e4m3fn


def is_hopper() -> bool:
    """Whether computations go to a GPU of compute capability 9."""
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        return False
    return device.platform == "gpu" and str(device.compute_capability).startswith("9.")


def unsupported(view: CacheView, q_BTHD: Array, narrow: bool) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    lay: Layout = view.cache.layout
    if lay.head_dim != 128:
        return f"head_dim={lay.head_dim}; the kernels read 128"
    for name, x in (("q", q_BTHD), ("the dense buffer", view.cache.dense_k)):
        if x.dtype != jnp.bfloat16:
            return f"{name} has dtype {x.dtype}; the kernels read bfloat16"
    if not jax.typeof(q_BTHD).sharding.mesh.empty:
        return "arrays with explicit sharding"
    if view.rope is not None and _pairing(view.rope, lay.head_dim, lay.pos_dims) is None:
        return "this rope's rotation is not one of channel pairs by a cosine and a sine"
    if not lay.max_spans:
        return None
    for name, codec in (("key", lay.key_codec), ("value", lay.value_codec)):
        scheme = _scheme(codec, lay.head_dim)
        if isinstance(scheme, str):
            return f"{name} codec {codec.name}: {scheme}"
        if narrow and scheme is None:
            return f"{name} codec {codec.name}: e4m3 attention needs a bound that codes give"
    return None


@functools.lru_cache(maxsize=64)
def _scheme(codec: Codec, head_dim: int) -> Scheme | None | str:
    """How the codec's bytes decode; None for plain bf16, a reason if the kernels cannot."""
    try:
        shape = (1, 1, 256, head_dim)
        span = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        form = jax.eval_shape(lambda x: codec.encode(x, codec.init(shape, x.dtype))[0], span)
    except ValueError as error:
        return str(error)
    parts = _parts(form)
    if isinstance(parts, str):
        return parts
    kmeans, last = parts
    if isinstance(last, IdentityPacked):
        values = last.values_BHTD
        return None if values.dtype == jnp.bfloat16 else f"values are stored in {values.dtype}"
    if last.scales_BHTG.dtype != E4M3:
        return f"scales are stored in {last.scales_BHTG.dtype}; the kernels read e4m3"
    if getattr(last, "zeros_BHTG", None) is not None:
        return "it has zero points"
    bits = 8 * last.codes_BHTC.shape[-1] // head_dim
    stages = 0 if kmeans is None else kmeans.ids_BHST.shape[2]
    group = head_dim // last.scales_BHTG.shape[-1]
    for offset in (2 ** max(bits - 1, 0) - 1, (2**bits - 1) / 2):
        scheme = Scheme(bits=bits, group=group, offset=offset, stages=stages)
        source = jax.eval_shape(_encoded, form)
        if (why := supported(source, scheme)) is not None:
            return why
        if _agrees(codec, form, scheme):
            return scheme
    return "its codes do not stand for equally spaced levels"


def _agrees(codec: Codec, form: Any, scheme: Scheme) -> bool:
    """Whether random bytes mean the same to the codec and to the kernels' reference."""
    rng = np.random.default_rng(0)

    def fill(x: Any) -> Array:
        if x.dtype == E4M3:
            return jnp.asarray(rng.uniform(0.5, 2.0, x.shape), jnp.float32).astype(E4M3)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(x.shape), jnp.float32).astype(x.dtype)
        low, high = (-2, 2) if x.dtype == jnp.int8 else (0, 255)
        return jnp.asarray(rng.integers(low, high, x.shape)).astype(x.dtype)

    with jax.ensure_compile_time_eval():
        packed = jax.tree.map(fill, form)
        if (kmeans := _parts(packed)[0]) is not None:
            ids = kmeans.ids_BHST % kmeans.centroids_BHSKD.shape[3]
            at = next(i for i, node in enumerate(packed) if node is kmeans)
            packed = (*packed[:at], kmeans._replace(ids_BHST=ids), *packed[at + 1 :])
        theirs = codec.decode(packed, jnp.float32)[0]
        ours = decoded(_encoded(packed), scheme, jnp.int32(0), 1)
        return bool(jnp.allclose(ours, theirs, rtol=1e-5, atol=1e-5))


def _parts(packed: Any) -> tuple[KMeansPacked | None, Any] | str:
    """The one or two nodes of a packed span that the kernels know."""
    nodes = packed if type(packed) is tuple else (packed,)
    *before, last = nodes
    known = isinstance(last, IntegerPacked | GridPacked) and all(
        isinstance(b, KMeansPacked) for b in before
    )
    if isinstance(last, IdentityPacked) and not before:
        return None, last
    if not known or len(before) > 1:
        names = " > ".join(type(n).__name__ for n in nodes)
        return f"{names}; the kernels read k-means (once) and integer or grid codes"
    return (before[0] if before else None), last


def _encoded(packed: Any) -> Encoded | Array:
    """Arrays with all leading axes in one; float8 as bytes."""
    kmeans, last = _parts(packed)
    flat = lambda x, keep: x.reshape(-1, *x.shape[x.ndim - keep :])  # noqa: E731
    if isinstance(last, IdentityPacked):
        return flat(last.values_BHTD, 2)
    exponents = getattr(last, "exponents_BH", None)
    steps = None if kmeans is None else kmeans.steps_BHS
    return Encoded(
        codes_RTC=flat(last.codes_BHTC, 2),
        scales_RTG=flat(_bytes(last.scales_BHTG), 2),
        ids_RST=None if kmeans is None else flat(kmeans.ids_BHST, 2),
        centroids_RSKD=None if kmeans is None else flat(_bytes(kmeans.centroids_BHSKD), 3),
        exponents_R=None if exponents is None else exponents.reshape(-1),
        steps_RS=None if steps is None else flat(steps, 1 if steps.dtype == jnp.int8 else 2),
    )


def _bytes(x: Any) -> Array:
    """The array, or the bytes of a float8 one, in a slot or not."""
    if isinstance(x, Float8Bytes):
        return x.bytes_x
    return lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == E4M3 else x


@functools.lru_cache(maxsize=64)
def _pairing(rope: Rope, head_dim: int, pos_dims: int) -> str | None:
    """Which channels the rope turns together, or None if its tables are something else."""
    form = jax.eval_shape(rope.table, jax.ShapeDtypeStruct((1, 4, pos_dims), jnp.float32))
    want = jax.ShapeDtypeStruct((1, 4, head_dim // 2), jnp.float32)
    if (
        not isinstance(form, tuple)
        or [(f.shape, f.dtype) for f in form] != [(want.shape, want.dtype)] * 2
    ):
        return None
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    with jax.ensure_compile_time_eval():
        x, tables = draw(1, 1, 4, head_dim), (draw(1, 4, head_dim // 2), draw(1, 4, head_dim // 2))
        theirs = rope.rotate(x, tables)[0]
        for pairing in ("half", "interleaved"):
            ours = decode_keys(
                x[0].astype(jnp.float32), None, first_row=0, rows=1, valid=4, dtype=jnp.bfloat16,
                unit_n=jnp.ones(1), tables=tables, pairing=pairing, implementation="reference",
            )  # fmt: skip
            if bool(jnp.allclose(ours[:, :4].astype(jnp.float32), theirs, rtol=1e-2, atol=2e-2)):
                return pairing
    return None


@dataclasses.dataclass(frozen=True)
class _Spans:
    """Keys or values of all spans, and of one layer the units of its rows in e4m3."""

    source: Any
    scheme: Scheme | None
    unit_R: Array


def _spans(
    slots: Any, codec: Codec, lay: Layout, layer: Array, turned: bool, narrow: bool
) -> _Spans:
    source, scheme = _encoded(slots), _scheme(codec, lay.head_dim)
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


def attend_kernels(
    q_BTHD: Array,
    view: CacheView,
    k_BTHD: Array,
    v_BTHD: Array,
    layer: Array,
    scale: Array,
    *,
    narrow: bool,
) -> Array:
    """`attend` for what is not `unsupported`.

    Spans are decoded one at a time into a workspace and merged into one running softmax. If
    `narrow`, they and the new block are attended in e4m3; sink and window always in bf16, as
    nothing bounds their values but a pass over them.
    """
    cache, lay = view.cache, view.cache.layout
    rows, bf16 = lay.batch * lay.heads, jnp.bfloat16
    pairing = _pairing(view.rope, lay.head_dim, lay.pos_dims) if view.rope is not None else "half"
    turn = lambda x, t: x if view.rope is None else view.rope.rotate(x, t)  # noqa: E731
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    q, k = turn(q, view.table_new), turn(k.astype(bf16), view.table_new)
    group = q.shape[1] // lay.heads
    q_nQD = q.reshape(rows, -1, lay.head_dim)
    queries = q_nQD.shape[1]
    wide = prepare(q_nQD, scale, bf16)
    asked = prepare(q_nQD, scale, E4M3) if narrow else wide
    dtype = asked.q_nQD.dtype
    typical = lay.span_tokens if lay.max_spans else k.shape[2]
    splits = splits_for(rows, queries, typical, max(1, lay.max_spans), narrow)
    ones = jnp.ones((rows,), jnp.float32)

    flat = lambda x: x.reshape(-1, *x.shape[-2:])  # noqa: E731
    k_nTD, v_nTD = flat(k), flat(v.astype(bf16))
    units = [_unit(jnp.abs(x).max(axis=(1, 2))) if narrow else ones for x in (k_nTD, v_nTD)]
    here = dict(first_row=0, rows=rows, valid=k.shape[2], dtype=dtype)
    k_new = decode_keys(k_nTD, None, **here, unit_n=units[0], batch=lay.batch)
    v_new = decode_values(v_nTD, None, **here, unit_n=units[1])
    state = visit(
        asked, k_new, v_new, k.shape[2], k_unit_n=units[0], v_unit_n=units[1], splits=splits
    )
    refs = [jax.new_ref(x) for x in state]

    valid = cache.dense_blocks * lay.block_tokens
    here = dict(first_row=layer * rows, rows=rows, valid=valid, dtype=bf16, unit_n=ones)
    tables = view.dense_table(0, cache.dense_pos.shape[1])
    k_dense = decode_keys(
        flat(cache.dense_k), None, **here, tables=tables, batch=lay.batch, pairing=pairing
    )
    v_dense = decode_values(flat(cache.dense_v), None, **here)
    visit(wide, k_dense, v_dense, valid, state=refs, splits=splits)

    if lay.max_spans:
        turned = view.rope is not None
        keys = _spans(cache.span_k, lay.key_codec, lay, layer, turned, narrow)
        values = _spans(cache.span_v, lay.value_codec, lay, layer, False, narrow)

        def span(i, done):
            slot = (cache.first_span + i) % lay.max_spans
            here = dict(rows=rows, valid=lay.span_tokens, dtype=dtype)
            here |= dict(first_row=(layer * lay.max_spans + slot) * rows)
            unit_k, unit_v = (
                lax.dynamic_slice_in_dim(x.unit_R, slot * rows, rows) for x in (keys, values)
            )
            tables, first = None, 0
            if turned and view.table_spans is None:
                tables = view.span_table(slot)
            elif turned:
                tables, first = jax.tree.map(flat, view.table_spans), slot * lay.batch
            k_span = decode_keys(
                keys.source, keys.scheme, **here, unit_n=unit_k, tables=tables,
                first_table=first, batch=lay.batch, pairing=pairing,
            )  # fmt: skip
            v_span = decode_values(values.source, values.scheme, **here, unit_n=unit_v)
            visit(
                asked, k_span, v_span, lay.span_tokens, k_unit_n=unit_k, v_unit_n=unit_v,
                state=refs, splits=splits,
            )  # fmt: skip
            return done

        lax.fori_loop(0, cache.num_spans, span, jnp.int32(0))
    out_nQD = finish([r[...] for r in refs], queries)
    out = out_nQD.reshape(lay.batch, lay.heads * group, -1, lay.head_dim)
    return jnp.swapaxes(out, 1, 2).astype(q_BTHD.dtype)
