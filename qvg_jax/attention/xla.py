"""attend on plain XLA: one softmax over the new block, sink, window and compressed spans, anywhere.

For a query q and keys k_t with values v_t in regions R_1, R_2, ... the output is
    o = sum_t exp(s_t - m) v_t / sum_t exp(s_t - m),   s_t = scale q . k_t,   m = max_t s_t.
Regions are visited one after another with a running state (m, l, acc) in float32: the largest logit,
the sum of the weights and the weighted sum of the values. That is the same softmax (Milakov & Gimelshein,
arXiv 1805.02867; Dao et al., arXiv 2205.14135). So one span is decoded at a time, and never the whole
history at once. A cache with a `key_bias` adds it to the logits of its spans.

A soft-cap c turns a logit s into c tanh(s / c), and a key that a query does not see has a logit of -inf.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qvg_jax.attention.features import PLAIN, Features
from qvg_jax.attention.stored import decoded_span, near_keys, packed_keys, read_dense
from qvg_jax.cache.key_bias import LogitBias, logit_bias
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.rope import Encodings
from qvg_jax.cache.view import CacheView

__all__ = ["attend_new_block", "attend_xla", "unsupported"]

# Tokens of sink and window that are read together. Small enough to skip most of an empty window,
# large enough for one matrix product to be worth its call.
DENSE_CHUNK_TOKENS = 512

# Keys of a decoded span, or of the new block, that meet the queries at once. The float32 logits of 12 heads, 4,680
# queries and a whole span of 37,440 keys would take 8.4 GB.
SPAN_CHUNK_TOKENS = 1024


class _Running(NamedTuple):
    """The running softmax of the keys so far, float32; Q counts the queries of a key-value head."""

    m_BHQ: Array  # the largest logit
    l_BHQ: Array  # sum of exp(logit - m)
    acc_BHQD: Array  # sum of exp(logit - m) v


class _Rules(NamedTuple):
    """How a product of a query and a key becomes a logit.

    `guarded` says that a query may have seen no key yet, whose running maximum is -inf.
    """

    scale: Array
    softcap: float | None = None
    guarded: bool = False


def unsupported(view: CacheView, features: Features = PLAIN) -> str | None:
    """Returns the reason why XLA cannot serve a call, or None if it can."""
    bias = view.cache.layout.key_bias
    if bias is not None and bias.factor and features.softcap is not None:
        return (
            f"key_bias factor={bias.factor}: it is derived for logits without softcap; accepted: "
            "factor=0, with any offset"
        )
    if bias is not None and bias.factor and isinstance(view.rope, Encodings):
        return (
            f"key_bias factor={bias.factor}: Encodings change the norms of queries and keys; "
            "accepted: factor=0, with any offset"
        )
    return None


def attend_xla(
    q_BTHD: Array,
    view: CacheView,
    k_BTHD: Array,
    v_BTHD: Array,
    layer: Array,
    scale: Array,
    features: Features = PLAIN,
) -> tuple[Array, Array | None]:
    """Returns output and log-sum-exp of `attend`, the latter if the features need it; the products are in q's dtype.

    Args:
        q_BTHD, view, k_BTHD, v_BTHD, layer, scale: as in `attend`; `layer` and `scale` are arrays.
        features: of the call.
    """
    batch = view.cache.layout.batch
    if q_BTHD.shape[0] == batch:
        return _attend_branch(q_BTHD, view, k_BTHD, v_BTHD, layer, scale, features)
    # Mapping over branches leaves the decoding, which does not depend on them, outside.
    count = q_BTHD.shape[0] // batch
    branches = (x.reshape(count, batch, *x.shape[1:]) for x in (q_BTHD, k_BTHD, v_BTHD))
    features, axes = features.of_branches(batch)
    one = lambda q, k, v, features: _attend_branch(  # noqa: E731
        q, view, k, v, layer, scale, features
    )
    out, lse = jax.vmap(one, (0, 0, 0, axes))(*branches, features)
    return out.reshape(q_BTHD.shape), None if lse is None else lse.reshape(q_BTHD.shape[:3])


def _attend_branch(
    q_BTHD: Array,
    view: CacheView,
    k_BTHD: Array,
    v_BTHD: Array,
    layer: Array,
    scale: Array,
    features: Features,
) -> tuple[Array, Array | None]:
    """Returns output and log-sum-exp for a batch of the cache's size."""
    lay: Layout = view.cache.layout
    q_BHTD, k_BHTD, v_BHTD = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    k_BHTD, v_BHTD = k_BHTD.astype(q_BTHD.dtype), v_BHTD.astype(q_BTHD.dtype)
    q_BHTD = view.new(q_BHTD)
    if k_BHTD.shape[2]:
        k_BHTD = view.new(k_BHTD)
    # Query heads that share a key-value head become more queries of that head. In two steps, for
    # explicitly sharded heads: XLA knows how to split that axis and how to merge the others.
    q_BHGTD = q_BHTD.reshape(lay.batch, view.heads, -1, *q_BHTD.shape[2:])
    q_BHQD = q_BHGTD.reshape(lay.batch, view.heads, -1, lay.head_dim)

    # Plainly all of the new block is visible, and it comes first: the maximum is finite from here on.
    guarded = features.hides or not k_BHTD.shape[2]
    rules = _Rules(scale, features.softcap, guarded)
    run = _visit_new(_nothing(q_BHQD), q_BHQD, k_BHTD, v_BHTD, rules, features)
    run = _visit_dense(run, view, q_BHQD, layer, rules)
    if view.reads_spans:
        run = _visit_spans(run, view, q_BHQD, layer, rules)
    out_BHQD, lse_BHQ = _result(run, rules, features.needs_lse)
    out_BHTD = out_BHQD.reshape(q_BHGTD.shape).reshape(q_BHTD.shape)
    out_BTHD = jnp.swapaxes(out_BHTD, 1, 2)
    lse_BTH = None if lse_BHQ is None else jnp.swapaxes(lse_BHQ.reshape(q_BHTD.shape[:3]), 1, 2)
    out_BTHD, lse_BTH = features.finished(out_BTHD, lse_BTH)
    return out_BTHD.astype(q_BTHD.dtype), lse_BTH


def attend_new_block(
    q_BHQD: Array, k_BHTD: Array, v_BHTD: Array, scale: Array, features: Features
) -> tuple[Array, Array]:
    """Returns attention to the new block alone: output (B, H, Q, D) and log-sum-exp (B, H, Q), float32.

    A query that sees no key has an output of zero and a log-sum-exp of -inf.
    """
    rules = _Rules(scale, features.softcap, True)
    run = _visit_new(_nothing(q_BHQD), q_BHQD, k_BHTD, v_BHTD, rules, features)
    return _result(run, rules, True)


def _result(run: _Running, rules: _Rules, needs_lse: bool) -> tuple[Array, Array | None]:
    """Returns the output of a running softmax, and the log-sum-exp of its logits if it is needed."""
    l_BHQ = jnp.where(run.l_BHQ > 0, run.l_BHQ, 1) if rules.guarded else run.l_BHQ
    lse_BHQ = None
    if needs_lse:
        lse_BHQ = run.m_BHQ + jnp.log(l_BHQ)
    return run.acc_BHQD / l_BHQ[..., None], lse_BHQ


def _nothing(q_BHQD: Array) -> _Running:
    """Returns the running softmax of no keys: m is -inf, l and acc are zero."""
    like = q_BHQD.astype(jnp.float32)  # keeps q's sharding
    return _Running(
        jnp.full_like(like[..., 0], -jnp.inf), jnp.zeros_like(like[..., 0]), jnp.zeros_like(like)
    )


def _visit(
    run: _Running,
    q_BHQD: Array,
    k_BHTD: Array,
    v_BHTD: Array,
    rules: _Rules,
    visible: Array | None = None,
    bias: LogitBias | None = None,
    first: Array | int = 0,
) -> _Running:
    """Returns the running softmax with one more set of keys; those where `visible` is false are masked.

    `visible` is (T,), or (B, H, Q, T) with any of the first three axes 1. With a `bias` the keys are
    those of its span from token `first` on.
    """
    f32 = jnp.float32
    s_BHQT = jnp.einsum("bhqd,bhtd->bhqt", q_BHQD, k_BHTD, preferred_element_type=f32) * rules.scale
    if rules.softcap is not None:
        s_BHQT = rules.softcap * jnp.tanh(s_BHQT / rules.softcap)
    if bias is not None:
        s_BHQT = bias.added(s_BHQT, first)
    if visible is not None:
        seen = visible[None, None, None, :] if visible.ndim == 1 else visible
        s_BHQT = jnp.where(seen, s_BHQT, -jnp.inf)
    m_BHQ = jnp.maximum(run.m_BHQ, s_BHQT.max(-1))
    # While a query has seen nothing its maximum is -inf, and -inf - -inf would be NaN.
    at_BHQ = jnp.where(m_BHQ > -jnp.inf, m_BHQ, 0) if rules.guarded else m_BHQ
    p_BHQT = jnp.exp(s_BHQT - at_BHQ[..., None])
    l_BHQ = p_BHQT.sum(-1)
    p_BHQT = p_BHQT.astype(v_BHTD.dtype)
    acc_BHQD = jnp.einsum("bhqt,bhtd->bhqd", p_BHQT, v_BHTD, preferred_element_type=f32)
    alpha_BHQ = jnp.exp(run.m_BHQ - at_BHQ)
    return _Running(
        m_BHQ, run.l_BHQ * alpha_BHQ + l_BHQ, run.acc_BHQD * alpha_BHQ[..., None] + acc_BHQD
    )


def _visit_new(
    run: _Running, q_BHQD: Array, k_BHTD: Array, v_BHTD: Array, rules: _Rules, features: Features
) -> _Running:
    """Visits the keys of the new block that the features let queries see."""
    heads, tokens = k_BHTD.shape[1:3]
    if not tokens:
        return run
    see = None
    if features.hides:
        form = heads, q_BHQD.shape[2] // tokens, tokens
        see = lambda start, size: features.visible(form, start, size)  # noqa: E731
        # A hidden value has weight zero, and zero times the NaN of padding would still be NaN.
        if features.lengths_R is not None:
            counts = jnp.arange(tokens)[None, :] < features.lengths_R[:, None]
            v_BHTD = jnp.where(counts[:, None, :, None], v_BHTD, 0)
    return _visit_long(run, q_BHQD, k_BHTD, v_BHTD, rules, see=see)


def _visit_dense(
    run: _Running, view: CacheView, q_BHQD: Array, layer: Array, rules: _Rules
) -> _Running:
    """Visits sink and window, in chunks of their valid prefix, so that an empty window costs nothing."""
    if view.only is not None and not view.only.history:
        return _visit_near(run, view, q_BHQD, layer, rules)
    cache, lay = view.cache, view.cache.layout
    total, valid = lay.dense_blocks * lay.block_tokens, cache.dense_tokens
    size = min(total, DENSE_CHUNK_TOKENS)

    def chunk(i, run):
        # The last chunk is moved back to stay inside the buffer; the mask hides what it repeats.
        start = jnp.minimum(i * size, total - size)
        token = start + jnp.arange(size)
        visible = (token >= i * size) & (token < valid)
        counts = visible[None, None, :, None]
        if cache.dense_valid is not None:
            visible = visible[None] & lax.dynamic_slice_in_dim(cache.dense_valid, start, size, 1)
            counts, visible = visible[:, None, :, None], visible[:, None, None, :]

        def read(buffer):
            return read_dense(view, buffer, layer, start, size).astype(q_BHQD.dtype)

        # A hidden value has weight zero, and zero times a NaN left there would still be NaN.
        v_BHTD = jnp.where(counts, read(cache.dense_v), 0)
        table = view.dense_table(start, size)
        k_BHTD, v_BHTD = view.keys(read(cache.dense_k), table), view.values(v_BHTD, table)
        return _visit(run, q_BHQD, k_BHTD, v_BHTD, rules, visible)

    return lax.fori_loop(0, (valid + size - 1) // size, chunk, run)


def _visit_near(
    run: _Running, view: CacheView, q_BHQD: Array, layer: Array, rules: _Rules
) -> _Running:
    """Visits what local heads read of sink and window."""
    k_BHTD, v_BHTD, table, counts_BT = near_keys(view, layer, q_BHQD.dtype)
    if not k_BHTD.shape[2]:
        return run
    if view.rope is not None:
        k_BHTD, v_BHTD = view.keys(k_BHTD, table), view.values(v_BHTD, table)

    def see(start, size):
        return lax.dynamic_slice_in_dim(counts_BT, start, size, 1)[:, None, None, :]

    return _visit_long(run, q_BHQD, k_BHTD, v_BHTD, rules, see=see)


def _visit_spans(
    run: _Running, view: CacheView, q_BHQD: Array, layer: Array, rules: _Rules
) -> _Running:
    """Visits the valid compressed spans; K and V of one span are decoded at a time."""
    cache, lay = view.cache, view.cache.layout

    def span(i, run):
        slot = (cache.first_span + i) % lay.max_spans

        k_BHTD, v_BHTD = decoded_span(view, layer, slot, q_BHQD.dtype)
        if view.rope is not None:
            table = view.span_table(slot)
            # Rotation reads each channel twice; without the barrier XLA decodes it twice.
            k_BHTD = view.keys(lax.optimization_barrier(k_BHTD), table)
            if view.copies > 1:
                v_BHTD = view.values(lax.optimization_barrier(v_BHTD), table)
        read_packed = lambda: packed_keys(view, layer, slot)  # noqa: E731
        bias = logit_bias(lay.key_bias, lay.key_codec, read_packed, q_BHQD, rules.scale)
        see = None
        if cache.span_valid is not None:
            counts_BT = lax.dynamic_index_in_dim(cache.span_valid, slot, 0, False)

            def see(start, size):
                return lax.dynamic_slice_in_dim(counts_BT, start, size, 1)[:, None, None, :]

        return _visit_long(run, q_BHQD, k_BHTD, v_BHTD, rules, bias, see)

    return lax.fori_loop(0, cache.num_spans, span, run)


def _visit_long(
    run: _Running,
    q_BHQD: Array,
    k_BHTD: Array,
    v_BHTD: Array,
    rules: _Rules,
    bias: LogitBias | None = None,
    see: Callable[[Array | int, int], Array] | None = None,
) -> _Running:
    """Visits a set of keys in pieces of at most `SPAN_CHUNK_TOKENS`, whose logits fit memory.

    `see(start, size)` says which of the keys from `start` on are visible; None is all of them.
    """
    total = k_BHTD.shape[2]
    pieces = -(-total // SPAN_CHUNK_TOKENS)
    if pieces == 1:
        visible = None if see is None else see(0, total)
        return _visit(run, q_BHQD, k_BHTD, v_BHTD, rules, visible, bias=bias)
    size = -(-total // pieces)

    def piece(i, run):
        # The last piece is moved back to stay inside the span; the mask hides what it repeats.
        start = jnp.minimum(i * size, total - size)
        k, v = (lax.dynamic_slice_in_dim(x, start, size, 2) for x in (k_BHTD, v_BHTD))
        visible = None if total % size == 0 else start + jnp.arange(size) >= i * size
        if see is not None:
            seen = see(start, size)
            visible = seen if visible is None else seen & visible[None, None, None, :]
        return _visit(run, q_BHQD, k, v, rules, visible, bias, start)

    return lax.fori_loop(0, pieces, piece, run)
