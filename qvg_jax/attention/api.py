"""attend: one softmax over sink, compressed spans, window and the new block.

For a query q and keys k_t with values v_t in regions R_1, R_2, ... the output is
    o = sum_t exp(s_t - m) v_t / sum_t exp(s_t - m),   s_t = scale q . k_t,   m = max_t s_t.
Regions are visited one after another with running (m, sum, weighted values) in float32, which
is the same softmax (Milakov & Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135). So one
span is decoded at a time, and never the whole history at once. A cache with a `key_bias` adds it to the
logits of its spans.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qvg_jax.cache.key_bias import LogitBias, logit_bias
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.rope import Encodings, Rope
from qvg_jax.cache.slots import read_slot
from qvg_jax.cache.view import CacheView
from qvg_jax.capability import no_triton
from qvg_jax.devices import is_hopper

__all__ = ["IMPLEMENTATIONS", "attend"]

IMPLEMENTATIONS = ("xla", "mosaic", "mosaic_fp8", "triton")

# Tokens of sink and window that are read together. Small enough to skip most of an empty window,
# large enough for one matrix product to be worth its call.
DENSE_CHUNK_TOKENS = 512

# Keys of a decoded span, or of the new block, that meet the queries at once. The float32 logits of 12 heads, 4,680
# queries and a whole span of 37,440 keys would take 8.4 GB.
SPAN_CHUNK_TOKENS = 1024


class _Running(NamedTuple):
    """Softmax state of the keys seen so far, float32; Q counts queries per key-value head."""

    max_BHQ: Array
    sum_BHQ: Array
    out_BHQD: Array


def attend(
    q_BTHD: Float[Array, "B T Hq D"],
    cache: KVCache | CacheView,
    k_BTHD: Float[Array, "B T H D"],
    v_BTHD: Float[Array, "B T H D"],
    *,
    layer: int | Int[Array, ""] | None = None,
    positions: Float[Array, "B T P"] | Int[Array, "B T P"] | None = None,
    rope: Rope | Encodings | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T Hq D"]:
    """Attention of a new block to everything in the cache and, both ways, to itself.

        o_BTHD = attend(q_BTHD, cache, k_BTHD, v_BTHD, positions=pos_BTP, rope=rope)

    A model of many layers makes one `cache.view(positions, rope)` for all of them and passes it
    in place of the cache. `layer` may be traced, so the layers can be one `lax.scan`; packed
    spans are read where they lie, and no layer is copied. Works in q's dtype with logits, sums
    and output accumulated in float32. Not differentiable in reverse (dynamic trip count).

    The batch of q, k and v may be R times the cache's B: row r B + b reads video b. So the two
    branches of guidance share a cache, and a span is decoded once for both.

    Args:
        q_BTHD: queries before RoPE; Hq is a multiple of the cache's H, and query head j reads
            key-value head j // (Hq / H).
        cache: the cache, or a view of it that brings positions and rope along.
        k_BTHD: the new block's keys before RoPE; any number of tokens.
        v_BTHD: the new block's values.
        layer: which layer of the cache; may be left out if it has one.
        positions: positions of the new tokens; only with a cache and a rope.
        rope: rotation of Q and K, or encodings of stored K and V (then H above is all of their
            heads); only with a cache. None is none.
        scale: factor of the logits; None is 1 / sqrt(D).
        implementation: "xla", anywhere; "mosaic", kernels for Hopper GPUs that decode a span into
            a bf16 workspace; "mosaic_fp8", the same with spans in e4m3, and products of them too:
            faster, for an error small beside that of 2-bit codes; "triton", bf16 kernels for NVIDIA
            GPUs from Ampere on, which need jax_triton. None is "mosaic" on Hopper where that serves
            the call, else "xla".

    Returns:
        The attention output in q's dtype.

    Raises:
        ValueError: a shape that does not fit the cache, a missing layer, positions or rope
            beside a view, or an unknown implementation.
        NotImplementedError: a named implementation cannot serve this call; the message says why.
    """
    if isinstance(cache, CacheView):
        if positions is not None or rope is not None:
            raise ValueError("positions and rope belong to cache.view(...); leave them out here")
        view = cache
    else:
        view = cache.view(positions, rope, precompute=False)
    lay: Layout = view.cache.layout
    _check(lay, view.heads, q_BTHD, k_BTHD, v_BTHD, layer)
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    scale = jnp.float32(1 / math.sqrt(lay.head_dim) if scale is None else scale)
    chosen = _implementation(implementation, view, q_BTHD)
    return _attend(q_BTHD, view, k_BTHD, v_BTHD, layer, scale, chosen)


def _unsupported(*call: Any) -> str | None:
    """Why the kernels cannot serve a call; they are imported here, as Mosaic takes long to import."""
    from qvg_jax.attention.kernels import unsupported

    return unsupported(*call)


def _implementation(name: str | None, view: CacheView, q_BTHD: Array) -> str:
    """The implementation that serves this call; a named one is never replaced by another."""
    bias = view.cache.layout.key_bias
    if bias is not None and bias.factor and isinstance(view.rope, Encodings):
        raise NotImplementedError(
            f"key_bias factor={bias.factor}: Encodings change the norms of queries and keys; "
            "accepted: factor=0, with any offset"
        )
    if bias is not None and name is None:
        return "xla"
    if name is None:
        return "mosaic" if is_hopper() and _unsupported(view, q_BTHD, False) is None else "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is not accepted: give one of {IMPLEMENTATIONS}")
    if name != "xla":
        family = "triton" if name == "triton" else "mosaic"
        missing = _unsupported(view, q_BTHD, name == "mosaic_fp8", family)
        if family == "triton":
            missing = no_triton() or missing
        elif not is_hopper():
            missing = f"the default device is {jax.devices()[0].platform}; it must be a Hopper GPU"
        if bias is not None:
            missing = "the cache has a key_bias, which the kernels do not add"
        if missing is not None:
            raise NotImplementedError(f"implementation={name!r}: {missing}; 'xla' serves it")
    return name


@functools.partial(jax.jit, static_argnames="implementation")
def _attend(
    q_BTHD: Array,
    view: CacheView,
    k_BTHD: Array,
    v_BTHD: Array,
    layer: Array,
    scale: Array,
    implementation: str = "xla",
) -> Array:
    if implementation != "xla":
        from qvg_jax.attention.kernels import attend_kernels

        narrow = implementation == "mosaic_fp8"
        family = "triton" if implementation == "triton" else "mosaic"
        return attend_kernels(
            q_BTHD, view, k_BTHD, v_BTHD, layer, scale, narrow=narrow, implementation=family
        )
    batch = view.cache.layout.batch
    if q_BTHD.shape[0] == batch:
        return _attend_xla(q_BTHD, view, k_BTHD, v_BTHD, layer, scale)
    # Mapping over branches leaves what does not depend on them, the decoding, outside.
    branches = (x.reshape(-1, batch, *x.shape[1:]) for x in (q_BTHD, k_BTHD, v_BTHD))
    one = lambda q, k, v: _attend_xla(q, view, k, v, layer, scale)  # noqa: E731
    return jax.vmap(one)(*branches).reshape(q_BTHD.shape)


def _attend_xla(
    q_BTHD: Array, view: CacheView, k_BTHD: Array, v_BTHD: Array, layer: Array, scale: Array
) -> Array:
    lay: Layout = view.cache.layout
    q_BHTD, k_BHTD, v_BHTD = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    k_BHTD, v_BHTD = k_BHTD.astype(q_BTHD.dtype), v_BHTD.astype(q_BTHD.dtype)
    q_BHTD, k_BHTD = view.new(q_BHTD), view.new(k_BHTD)
    # Query heads that share a key-value head become more queries of that head. In two steps, for
    # explicitly sharded heads: XLA knows how to split that axis and how to merge the others.
    q_BHGTD = q_BHTD.reshape(lay.batch, view.heads, -1, *q_BHTD.shape[2:])
    q_BHQD = q_BHGTD.reshape(lay.batch, view.heads, -1, lay.head_dim)

    # The new block comes first: all of it is visible, so the maximum is finite from here on.
    run = _visit_long(_nothing(q_BHQD), q_BHQD, k_BHTD, v_BHTD, scale)
    run = _visit_dense(run, view, q_BHQD, layer, scale)
    if lay.max_spans:
        run = _visit_spans(run, view, q_BHQD, layer, scale)
    out_BHGTD = (run.out_BHQD / run.sum_BHQ[..., None]).reshape(q_BHGTD.shape)
    out_BHTD = out_BHGTD.reshape(q_BHTD.shape)
    return jnp.swapaxes(out_BHTD, 1, 2).astype(q_BTHD.dtype)


def _check(lay: Layout, heads: int, q: Array, k: Array, v: Array, layer: Any) -> None:
    if layer is None and lay.layers > 1:
        raise ValueError(f"layer=None; the cache has {lay.layers} layers: give an index below it")
    if isinstance(layer, int) and not 0 <= layer < lay.layers:
        raise ValueError(f"layer={layer} is not accepted: give 0 <= layer < {lay.layers}")
    rows, tokens = q.shape[:2] if q.ndim == 4 else (lay.batch, "T")
    for name, x in (("k", k), ("v", v)):
        want = (rows, tokens, heads, lay.head_dim)
        if x.shape != want:
            raise ValueError(f"{name} has shape {x.shape}; accepted: {want} (B, T, H, D)")
    fits = q.ndim == 4 and q.shape[0] and not q.shape[0] % lay.batch and q.shape[3] == lay.head_dim
    if not fits or q.shape[2] % heads:
        want = f"({lay.batch} or a multiple, T, a multiple of {heads}, {lay.head_dim})"
        raise ValueError(f"q has shape {q.shape}; accepted: {want} (B, T, Hq, D)")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q has dtype {q.dtype}; accepted: floating point")


def _nothing(q_BHQD: Array) -> _Running:
    """The state before any key: every key raises its maximum."""
    like = q_BHQD.astype(jnp.float32)  # keeps q's sharding
    return _Running(
        jnp.full_like(like[..., 0], -jnp.inf), jnp.zeros_like(like[..., 0]), jnp.zeros_like(like)
    )


def _visit(
    run: _Running,
    q_BHQD: Array,
    k_BHTD: Array,
    v_BHTD: Array,
    scale: Array,
    visible_T: Array | None = None,
    bias: LogitBias | None = None,
    first: Array | int = 0,
) -> _Running:
    """Merges one more set of keys into the running softmax; `visible_T` masks some of them.

    The keys are those from `first` on of the span that `bias` belongs to.
    """
    f32 = jnp.float32
    s_BHQT = jnp.einsum("bhqd,bhtd->bhqt", q_BHQD, k_BHTD, preferred_element_type=f32) * scale
    if bias is not None:
        s_BHQT = bias.added(s_BHQT, first)
    if visible_T is not None:
        s_BHQT = jnp.where(visible_T[None, None, None, :], s_BHQT, -jnp.inf)
    new_max = jnp.maximum(run.max_BHQ, s_BHQT.max(-1))
    p_BHQT = jnp.exp(s_BHQT - new_max[..., None])
    new_sum = p_BHQT.sum(-1)
    p_BHQT = p_BHQT.astype(v_BHTD.dtype)
    new_out = jnp.einsum("bhqt,bhtd->bhqd", p_BHQT, v_BHTD, preferred_element_type=f32)
    fade = jnp.exp(run.max_BHQ - new_max)
    return _Running(new_max, run.sum_BHQ * fade + new_sum, run.out_BHQD * fade[..., None] + new_out)


def _visit_dense(
    run: _Running, view: CacheView, q_BHQD: Array, layer: Array, scale: Array
) -> _Running:
    """Sink and window: chunks of the valid prefix, so an empty window costs nothing."""
    cache, lay = view.cache, view.cache.layout
    total, valid = (n * lay.block_tokens for n in (lay.dense_blocks, cache.dense_blocks))
    size = min(total, DENSE_CHUNK_TOKENS)

    def chunk(i, run):
        # The last chunk is moved back to stay inside the buffer; the mask hides what it repeats.
        start = jnp.minimum(i * size, total - size)
        token = start + jnp.arange(size)
        visible = (token >= i * size) & (token < valid)

        def read(buffer):
            corner, form = (layer, 0, 0, start, 0), (1, lay.batch, lay.heads, size, lay.head_dim)
            return lax.dynamic_slice(buffer, corner, form)[0].astype(q_BHQD.dtype)

        # A hidden value has weight zero, and zero times a NaN left there would still be NaN.
        v_BHTD = jnp.where(visible[None, None, :, None], read(cache.dense_v), 0)
        table = view.dense_table(start, size)
        k_BHTD, v_BHTD = view.keys(read(cache.dense_k), table), view.values(v_BHTD, table)
        return _visit(run, q_BHQD, k_BHTD, v_BHTD, scale, visible)

    return lax.fori_loop(0, (valid + size - 1) // size, chunk, run)


def _visit_spans(
    run: _Running, view: CacheView, q_BHQD: Array, layer: Array, scale: Array
) -> _Running:
    """The compressed history: decodes one span of K and V at a time, as many as are valid."""
    cache, lay = view.cache, view.cache.layout

    def span(i, run):
        slot = (cache.first_span + i) % lay.max_spans

        packed_k, packed_v = (read_slot(x, layer, slot) for x in (cache.span_k, cache.span_v))
        k_BHTD = lay.key_codec.decode(packed_k, q_BHQD.dtype)
        v_BHTD = lay.value_codec.decode(packed_v, q_BHQD.dtype)
        if view.rope is not None:
            table = view.span_table(slot)
            # Rotation reads each channel twice; without the barrier XLA decodes it twice.
            k_BHTD = view.keys(lax.optimization_barrier(k_BHTD), table)
            if view.heads > lay.heads:
                v_BHTD = view.values(lax.optimization_barrier(v_BHTD), table)
        bias = logit_bias(lay.key_bias, lay.key_codec, packed_k, q_BHQD, scale)
        return _visit_long(run, q_BHQD, k_BHTD, v_BHTD, scale, bias)

    return lax.fori_loop(0, cache.num_spans, span, run)


def _visit_long(
    run: _Running,
    q_BHQD: Array,
    k_BHTD: Array,
    v_BHTD: Array,
    scale: Array,
    bias: LogitBias | None = None,
) -> _Running:
    """`_visit` in pieces of at most `SPAN_CHUNK_TOKENS` keys."""
    total = k_BHTD.shape[2]
    pieces = -(-total // SPAN_CHUNK_TOKENS)
    if pieces == 1:
        return _visit(run, q_BHQD, k_BHTD, v_BHTD, scale, bias=bias)
    size = -(-total // pieces)

    def piece(i, run):
        # The last piece is moved back to stay inside the span; the mask hides what it repeats.
        start = jnp.minimum(i * size, total - size)
        k, v = (lax.dynamic_slice_in_dim(x, start, size, 2) for x in (k_BHTD, v_BHTD))
        visible = None if total % size == 0 else start + jnp.arange(size) >= i * size
        return _visit(run, q_BHQD, k, v, scale, visible, bias, start)

    return lax.fori_loop(0, pieces, piece, run)
