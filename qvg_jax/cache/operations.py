"""KVCache and what happens to it: sink | compressed spans | bf16 window, shapes that never change.

    cache = KVCache.create(heads=8, head_dim=128, block_tokens=256, key_codec=c, value_codec=c)
    out_BTHD = attend(q_BTHD, cache, k_BTHD, v_BTHD, positions=pos_BTP, rope=rope)
    cache = compress(append(cache, k_BTHD, v_BTHD, pos_BTP))

Every operation is a function `cache -> cache` that jits, scans, vmaps and, when the outermost jit
donates the cache, works in place. How full the regions are is data (int32 arrays), so a longer
video changes numbers and never a shape.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qvg_jax.backends import divided_automatically, row_major
from qvg_jax.cache.arguments import check_cache
from qvg_jax.cache.devices import on_each_device
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.oldest_span import all_slots, encode_oldest
from qvg_jax.cache.own_window import near_place, rows_of
from qvg_jax.cache.state import KVCache
from qvg_jax.cache.view import checked_lengths, checked_positions
from qvg_jax.codecs.arguments import check_array

__all__ = ["KVCache", "append", "compress", "evict"]

INT32_MAX = 2**31 - 1


def append(
    cache: KVCache,
    k: Float[Array, "L B T H D"] | Float[Array, "B T H D"],
    v: Float[Array, "L B T H D"] | Float[Array, "B T H D"],
    positions_BTP: Float[Array, "B T P"] | Int[Array, "B T P"] | None = None,
    *,
    lengths: Int[Array, " B"] | None = None,
) -> KVCache:
    """The cache with one more block of clean K and V: in the sink while it has room, else window.

    Counts values that are not finite; `raise_if_bad` reports them with the block's number.

    Args:
        cache: the cache; donate it at the outermost jit.
        k: K before RoPE, (L, B, block_tokens, H, D); without the layer axis if L = 1. A cache with
            blocks "partial" or "padded" takes any number of tokens up to block_tokens.
        v: V, of the same shape.
        positions_BTP: positions of the tokens; may be left out if `pos_dims=0`.
        lengths: for a cache with blocks="padded", how many of the tokens count in each row, the first
            ones; the others are padding that no query sees. None is all.

    Returns:
        The cache, one block longer. A full one keeps what it has and counts the block in
        `rejected_blocks`, or overwrites its oldest window block (`overflow="drop"` without slots).

    Raises:
        TypeError: the cache is none, or k or v is no array.
        ValueError: a shape or dtype that does not fit the cache, or lengths beyond the block.
    """
    check_cache(cache)
    check_array(k, "k", "(L, B, T, H, D)")
    check_array(v, "v", "(L, B, T, H, D)")
    lay = cache.layout
    write = divided_automatically(_append, cache)
    if lengths is None:
        return write(cache, k, v, positions_BTP)
    if lay.blocks != "padded":
        raise ValueError(
            f"lengths with blocks={lay.blocks!r}; accepted: a cache with blocks='padded'"
        )
    return write(cache, k, v, positions_BTP, checked_lengths(lengths, lay.batch, k.shape[-3]))


@jax.jit
def _append(
    cache: KVCache, k: Array, v: Array, pos: Array | None, lengths_B: Array | None = None
) -> KVCache:
    lay = cache.layout
    k, v = (_stored_form(lay, n, x, cache.dense_k.dtype) for n, x in (("k", k), ("v", v)))
    pos = checked_positions(lay, pos, k.shape[3])
    if not k.shape[3]:
        return cache
    part = None if lay.plan is None else lay.plan.part
    axis = part.axis if part is not None and part.splits_blocks else None
    of_tokens = jax.P(None, None, None, axis)
    specs = (of_tokens, of_tokens, jax.P(None, axis), jax.P())
    return on_each_device(_append_here, cache, k, v, pos, lengths_B, specs=specs)


def _append_here(
    cache: KVCache, k: Array, v: Array, pos: Array, lengths_B: Array | None
) -> KVCache:
    """The cache with one more block, or this device's part of both; k and v are [L, B, H, T, D]."""
    lay, tokens = cache.layout, k.shape[3]
    place = _whole_block(cache) if lay.blocks == "whole" else _any_tokens(cache, tokens)
    valid = None
    if lay.blocks == "padded":
        counts_B = jnp.full((lay.batch,), tokens) if lengths_B is None else lengths_B
        valid = jnp.arange(tokens)[None] < counts_B[:, None]
        # Padding is stored as zeros, so that neither a NaN nor an outlier of it meets a codec.
        k, v = (jnp.where(valid[None, :, None, :, None], x, 0) for x in (k, v))

    def write(
        buffer: Array, new: Array, axis: int, at: Array | None = place.at, store: Any = place.store
    ) -> Array:
        if place.token_T is not None:
            front = (slice(None),) * axis
            return buffer.at[(*front, place.token_T)].set(new.astype(buffer.dtype))
        # Reads back what is there when the block is refused: no branch, and in place if donated.
        old = lax.dynamic_slice_in_dim(buffer, at, tokens, axis)
        new = row_major(jnp.where(store, new, old))
        return lax.dynamic_update_slice_in_dim(buffer, new, at, axis)

    # Padding may have any position: no query sees it.
    counted_pos = pos if valid is None else jnp.where(valid[..., None], pos, 0)
    bad = sum((~jnp.isfinite(x)).sum(dtype=jnp.int32) for x in (k, v, counted_pos))
    if lay.part is not None and lay.part.splits_blocks:
        bad = lax.psum(bad, lay.part.axis)
    first = jnp.where((cache.first_bad_block < 0) & (bad > 0), cache.seen_blocks, -1)
    table = None if lay.rope is None else lay.rope.table(pos)
    beside = jax.tree.map(
        lambda buffer, new: write(buffer, new, 1),
        (cache.dense_valid, cache.dense_table),
        (valid, table),
    )
    near = {}
    if lay.own_window:
        if lay.near_blocks:
            at, kept = near_place(cache)
            kept &= place.store
            for name, x in (("near_k", k), ("near_v", v)):
                new = rows_of(lay, x, False)
                near[name] = write(getattr(cache, name), new, 3, at, kept)
            near["near_pos"] = write(cache.near_pos, pos, 1, at, kept)
        k, v = (rows_of(lay, x, True) for x in (k, v))
    return dataclasses.replace(
        cache,
        dense_k=write(cache.dense_k, k, 3),
        dense_v=write(cache.dense_v, v, 3),
        dense_pos=write(cache.dense_pos, pos, 1),
        dense_valid=beside[0],
        dense_table=beside[1],
        seen_blocks=cache.seen_blocks + 1,
        nonfinite=jnp.minimum(cache.nonfinite, INT32_MAX - bad) + bad,
        first_bad_block=jnp.maximum(cache.first_bad_block, first),
        **place.counters,
        **near,
    )


class _Place(NamedTuple):
    """Where new tokens go in the dense buffer, and the counters after that."""

    at: Array | None  # the first of them
    store: Array | None  # whether they find room
    counters: dict[str, Array]
    token_T: Array | None = None  # of each token, for a ring in which tokens may part


def _whole_block(cache: KVCache) -> _Place:
    """The place of one whole block."""
    lay = cache.layout
    full = cache.dense_blocks >= lay.dense_blocks
    if lay.is_ring:
        oldest = lay.sink_blocks + cache.dropped_blocks % lay.window_blocks
        store, slot = jnp.ones_like(full), jnp.where(full, oldest, cache.dense_blocks)
    else:
        store, slot = ~full, jnp.minimum(cache.dense_blocks, lay.dense_blocks - 1)
    grown = (~full).astype(jnp.int32)
    counters = dict(
        dense_blocks=cache.dense_blocks + grown,
        dropped_blocks=cache.dropped_blocks + (1 - grown if lay.is_ring else 0),
        rejected_blocks=cache.rejected_blocks + (0 if lay.is_ring else 1 - grown),
    )
    return _Place(slot * lay.block_tokens, store, counters)


def _any_tokens(cache: KVCache, tokens: int) -> _Place:
    """The place of up to a block of tokens, behind the last one."""
    lay = cache.layout
    size, sink = lay.block_tokens, lay.sink_blocks * lay.block_tokens
    total = lay.dense_blocks * size
    whole, filled = (cache.filled + tokens) // size, (cache.filled + tokens) % size
    if lay.is_ring:
        first = (cache.dense_blocks + cache.dropped_blocks) * size + cache.filled
        token_T = first + jnp.arange(tokens)
        token_T = jnp.where(token_T < total, token_T, sink + (token_T - sink) % (total - sink))
        grows = cache.dense_blocks < lay.dense_blocks
        counters = dict(
            filled=filled,
            dense_blocks=cache.dense_blocks + jnp.where(grows, whole, 0),
            dropped_blocks=cache.dropped_blocks + jnp.where(grows, 0, whole),
        )
        return _Place(None, None, counters, token_T)
    store = cache.dense_tokens + tokens <= total
    counters = dict(
        filled=jnp.where(store, filled, cache.filled),
        dense_blocks=cache.dense_blocks + jnp.where(store, whole, 0),
        rejected_blocks=cache.rejected_blocks + (~store).astype(jnp.int32),
    )
    return _Place(jnp.minimum(cache.dense_tokens, total - tokens), store, counters)


def _stored_form(lay: Layout, name: str, x: Array, dtype: Any) -> Array:
    """Checks a block of K or V and brings it to [L, B, H, T, D] in the storage dtype."""
    tokens = lay.block_tokens
    if lay.blocks != "whole" and x.ndim >= 4 and x.shape[-3] < tokens:
        tokens = x.shape[-3]
    want = (lay.layers, lay.batch, tokens, lay.heads, lay.head_dim)
    accepted = f"{want}" + (f" or {want[1:]}" if lay.layers == 1 else "")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {x.dtype}; accepted: floating point")
    if x.shape != want and (lay.layers > 1 or x.shape != want[1:]):
        hint = "" if lay.blocks == "whole" else f", or fewer tokens than {lay.block_tokens}"
        raise ValueError(f"{name} has shape {x.shape}; accepted: {accepted} (L, B, T, H, D){hint}")
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
    check_cache(cache)
    if not cache.layout.max_spans:
        return cache
    key = jax.random.key(0) if key is None else key
    return divided_automatically(_compress, cache)(cache, key)


@jax.jit
def _compress(cache: KVCache, key: PRNGKeyArray) -> KVCache:
    codecs = cache.layout.key_codec, cache.layout.value_codec
    stored = [getattr(codec, "storage", None) for codec in codecs]
    by_head = all(storage is not None and storage.by_head for storage in stored)
    return on_each_device(_compress_here, cache, key, specs=(jax.P(),), by_head=by_head)


def _compress_here(cache: KVCache, key: PRNGKeyArray) -> KVCache:
    """The cache after `compress`, or this device's part of it; all devices encode the same span."""
    lay = cache.layout
    window = cache.dense_blocks - lay.sink_blocks
    due = window >= lay.span_blocks + lay.keep_recent
    if lay.overflow == "error":
        due &= cache.num_spans < all_slots(lay)
    return lax.cond(due, encode_oldest, lambda cache, key: cache, cache, key)


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
    check_cache(cache)
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
