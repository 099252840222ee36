"""KVCache and what happens to it: sink | compressed spans | bf16 window, shapes that never change.

    cache = KVCache.create(heads=8, head_dim=128, block_tokens=256, key_codec=c, value_codec=c)
    out_BTHD = attend(q_BTHD, cache, k_BTHD, v_BTHD, positions=pos_BTP, rope=rope)
    cache = compress(append(cache, k_BTHD, v_BTHD, pos_BTP))

Every operation is a function `cache -> cache` that jits, scans, vmaps and, when the outermost jit
donates the cache, works in place. How full the regions are is data (int32 arrays), so a longer
video changes numbers and never a shape.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qvg_jax.backends import row_major
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.no_gradient import no_gradient
from qvg_jax.cache.slots import write_slot
from qvg_jax.cache.state import KVCache
from qvg_jax.cache.view import checked_positions

__all__ = ["KVCache", "append", "compress", "evict"]

INT32_MAX = 2**31 - 1


@jax.jit
def append(
    cache: KVCache,
    k: Float[Array, "L B T H D"] | Float[Array, "B T H D"],
    v: Float[Array, "L B T H D"] | Float[Array, "B T H D"],
    positions_BTP: Float[Array, "B T P"] | Int[Array, "B T P"] | None = None,
) -> KVCache:
    """The cache with one more block of clean K and V: in the sink while it has room, else window.

    Counts values that are not finite; `raise_if_bad` reports them with the block's number.

    Args:
        cache: the cache; donate it at the outermost jit.
        k: K before RoPE, (L, B, block_tokens, H, D); without the layer axis if L = 1.
        v: V, of the same shape.
        positions_BTP: positions of the tokens; may be left out if `pos_dims=0`.

    Returns:
        The cache, one block longer. A full one keeps what it has and counts the block in
        `rejected_blocks`, or overwrites its oldest window block (`overflow="drop"` without slots).

    Raises:
        ValueError: a shape or dtype that does not fit the cache.
    """
    lay = cache.layout
    k, v = (_stored_form(lay, n, x, cache.dense_k.dtype) for n, x in (("k", k), ("v", v)))
    pos = checked_positions(lay, positions_BTP, lay.block_tokens)
    full = cache.dense_blocks >= lay.dense_blocks
    if lay.is_ring:
        oldest = lay.sink_blocks + cache.dropped_blocks % lay.window_blocks
        store, slot = jnp.ones_like(full), jnp.where(full, oldest, cache.dense_blocks)
    else:
        store, slot = ~full, jnp.minimum(cache.dense_blocks, lay.dense_blocks - 1)
    at = slot * lay.block_tokens

    def write(buffer: Array, new: Array, axis: int) -> Array:
        # Reads back what is there when the block is refused: no branch, and in place if donated.
        old = lax.dynamic_slice_in_dim(buffer, at, lay.block_tokens, axis)
        new = row_major(jnp.where(store, new, old))
        return lax.dynamic_update_slice_in_dim(buffer, new, at, axis)

    bad = sum((~jnp.isfinite(x)).sum(dtype=jnp.int32) for x in (k, v))
    first = jnp.where((cache.first_bad_block < 0) & (bad > 0), cache.seen_blocks, -1)
    grown = (~full).astype(jnp.int32)
    return dataclasses.replace(
        cache,
        dense_k=write(cache.dense_k, k, 3),
        dense_v=write(cache.dense_v, v, 3),
        dense_pos=write(cache.dense_pos, pos, 1),
        dense_blocks=cache.dense_blocks + grown,
        seen_blocks=cache.seen_blocks + 1,
        dropped_blocks=cache.dropped_blocks + (1 - grown if lay.is_ring else 0),
        rejected_blocks=cache.rejected_blocks + (0 if lay.is_ring else 1 - grown),
        nonfinite=jnp.minimum(cache.nonfinite, INT32_MAX - bad) + bad,
        first_bad_block=jnp.maximum(cache.first_bad_block, first),
    )


def _stored_form(lay: Layout, name: str, x: Array, dtype: Any) -> Array:
    """Checks a block of K or V and brings it to [L, B, H, T, D] in the storage dtype."""
    want = (lay.layers, lay.batch, lay.block_tokens, lay.heads, lay.head_dim)
    accepted = f"{want}" + (f" or {want[1:]}" if lay.layers == 1 else "")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {x.dtype}; accepted: floating point")
    if x.shape != want and (lay.layers > 1 or x.shape != want[1:]):
        raise ValueError(f"{name} has shape {x.shape}; accepted: {accepted} (L, B, T, H, D)")
    return jnp.swapaxes(x.reshape(want), 2, 3).astype(dtype)


def compress(cache: KVCache, key: PRNGKeyArray | None = None) -> KVCache:
    """Encodes the oldest span of the window into the next slot, if one is due.

    Due means: the window holds at least span_blocks + keep_recent blocks and a slot is free. The
    span leaves the window, and later blocks move up. With overflow="drop" and no free slot the
    oldest span makes room; with "error" the window fills on until `append` refuses a block.
    Layers are encoded one after another, so temporaries are those of one layer.

    Args:
        cache: the cache; donate it at the outermost jit.
        key: randomness for codecs that want it; folded with the span's number, the layer, and K
            or V. None is a fixed key: compression is deterministic either way.

    Returns:
        The cache, with the same valid tokens (but for a dropped span) in other places.
    """
    if not cache.layout.max_spans:
        return cache
    return _compress(cache, jax.random.key(0) if key is None else key)


@jax.jit
def _compress(cache: KVCache, key: PRNGKeyArray) -> KVCache:
    lay = cache.layout
    window = cache.dense_blocks - lay.sink_blocks
    due = window >= lay.span_blocks + lay.keep_recent
    if lay.overflow == "error":
        due &= cache.num_spans < lay.max_spans
    return lax.cond(due, _encode_oldest, lambda cache, key: cache, cache, key)


def _encode_oldest(cache: KVCache, key: PRNGKeyArray) -> KVCache:
    lay, n = cache.layout, cache.layout.block_tokens
    begin, size = lay.sink_blocks * n, lay.span_tokens
    tail = (lay.window_blocks - lay.span_blocks) * n  # what can remain in the window
    full = (cache.num_spans >= lay.max_spans).astype(jnp.int32)
    slot = (cache.first_span + cache.num_spans) % lay.max_spans
    encoded_blocks = cache.seen_blocks - cache.rejected_blocks - cache.dense_blocks
    key = jax.random.fold_in(key, encoded_blocks // lay.span_blocks)

    def one_layer(l, carry):
        def one(codec, dense, spans, states, key):
            def read(start, length):
                form = (1, lay.batch, lay.heads, length, lay.head_dim)
                return lax.dynamic_slice(dense, (l, 0, 0, start, 0), form)

            state = jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, l, 0, False), states)
            span = no_gradient(read(begin, size)[0], "compress")
            packed, state = codec.encode(span, state, key=key)
            # All reading before all writing, or XLA copies the whole buffer to be safe.
            moved = read(begin + size, tail)
            packed, state, moved = lax.optimization_barrier((packed, state, moved))
            spans = write_slot(spans, l, slot, packed)
            states = jax.tree.map(lambda s, new: s.at[l].set(new), states, state)
            return lax.dynamic_update_slice(dense, moved, (l, 0, 0, begin, 0)), spans, states

        key_k, key_v = jax.random.split(jax.random.fold_in(key, l))
        return one(lay.key_codec, *carry[0], key_k), one(lay.value_codec, *carry[1], key_v)

    carry = (
        (cache.dense_k, cache.span_k, cache.state_k),
        (cache.dense_v, cache.span_v, cache.state_v),
    )
    # int32 whatever `jax_enable_x64` says: the counters are, and indices of one slice must agree.
    (dense_k, span_k, state_k), (dense_v, span_v, state_v) = lax.fori_loop(
        np.int32(0), np.int32(lay.layers), one_layer, carry
    )
    pos = cache.dense_pos
    return dataclasses.replace(
        cache,
        dense_k=dense_k,
        dense_v=dense_v,
        dense_pos=pos.at[:, begin : begin + tail].set(pos[:, begin + size : begin + size + tail]),
        span_k=span_k,
        span_v=span_v,
        span_pos=cache.span_pos.at[slot].set(pos[:, begin : begin + size]),
        state_k=state_k,
        state_v=state_v,
        dense_blocks=cache.dense_blocks - lay.span_blocks,
        first_span=(cache.first_span + full) % lay.max_spans,
        num_spans=cache.num_spans + 1 - full,
        dropped_blocks=cache.dropped_blocks + full * lay.span_blocks,
    )


def evict(cache: KVCache, spans: int | Int[Array, ""] = 1) -> KVCache:
    """The cache without its oldest spans: bounded context. Sink and window stay.

    Args:
        cache: the cache.
        spans: how many to drop; more than there are drops all. May be traced.

    Returns:
        The cache with `min(spans, num_spans)` free slots more; no bytes move.

    Raises:
        ValueError: the cache has no slots, or a Python `spans` is negative.
    """
    lay = cache.layout
    if not lay.max_spans:
        raise ValueError("evict: the cache has max_spans=0 and so no spans; use overflow='drop'")
    if isinstance(spans, int) and spans < 0:
        raise ValueError(f"spans={spans} is not accepted: give an integer >= 0")
    gone = jnp.clip(jnp.asarray(spans, jnp.int32), 0, cache.num_spans)
    return dataclasses.replace(
        cache,
        first_span=(cache.first_span + gone) % lay.max_spans,
        num_spans=cache.num_spans - gone,
        dropped_blocks=cache.dropped_blocks + gone * lay.span_blocks,
    )
