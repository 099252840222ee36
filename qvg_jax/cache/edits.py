"""Changes of a cache as a whole: emptied, cut back to its oldest tokens, or with its batch rows in another order."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from qvg_jax.cache.arguments import check_cache
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.slots import batch_leaves, initial_states
from qvg_jax.cache.state import KVCache
from qvg_jax.cache.view import known
from qvg_jax.errors import wrong_kind

__all__ = ["reset", "take_rows", "truncate"]


def reset(cache: KVCache) -> KVCache:
    """The cache without any token, as `KVCache.create` made it; its buffers are used again.

    Args:
        cache: the cache; donate it at the outermost jit.

    Returns:
        An empty cache of the same layout. What lies in its buffers is not erased, and never read.
    """
    check_cache(cache)
    return _reset(cache)


@jax.jit
def _reset(cache: KVCache) -> KVCache:
    lay, dtype = cache.layout, cache.dense_k.dtype
    zeros = ("dense_blocks", "first_span", "num_spans", "seen_blocks", "dropped_blocks")
    zeros += ("rejected_blocks", "nonfinite") + (() if cache.filled is None else ("filled",))
    return dataclasses.replace(
        cache,
        state_k=initial_states(lay, lay.key_codec, dtype),
        state_v=initial_states(lay, lay.value_codec, dtype),
        first_bad_block=jnp.full((), -1, jnp.int32),
        **{name: jnp.zeros((), jnp.int32) for name in zeros},
    )


def truncate(cache: KVCache, tokens: int | Int[Array, ""]) -> KVCache:
    """The cache with its oldest `tokens` only, as if the later ones had not been appended.

    A compressed span stays whole or goes whole. So does a block of a cache with blocks="whole".
    Inside jit, where the number may be unknown, it is rounded down to what can stay;
    outside, such a number is an error that names the numbers around it.

    Args:
        cache: the cache.
        tokens: how many to keep, of `cache.tokens`; more than there are keeps all inside jit.

    Returns:
        The cache with `tokens` tokens. Codecs go on from the state that they have.

    Raises:
        ValueError: the cache is a ring, or its local heads have windows of their own, whose overwritten
            tokens cannot come back; more tokens than it has; or a number inside of a span, or of a block
            that stays whole.
    """
    check_cache(cache)
    lay = cache.layout
    if lay.is_ring:
        raise ValueError(
            "truncate: with overflow='drop' and max_spans=0 newer tokens overwrote older ones, which "
            "do not come back; accepted: a cache with slots, or with overflow='error'"
        )
    if lay.own_window:
        raise ValueError(
            f"truncate: the cache has a {lay.history}, and newer blocks overwrote older ones of local heads, "
            "which do not come back; accepted: a HeadHistory with own_window=False"
        )
    if tokens is None or isinstance(tokens, str):
        raise wrong_kind("tokens", tokens, "a number >= 0")
    wanted, held = known(tokens), known(cache.tokens)
    if wanted is not None and wanted < 0:
        raise ValueError(f"tokens={wanted} is not accepted: give a number >= 0")
    if wanted is not None and held is not None and held.ndim == 0:
        _check_border(cache, int(wanted), int(held))
    return _truncate(cache, jnp.asarray(tokens, jnp.int32))


@jax.jit
def _truncate(cache: KVCache, tokens: Array) -> KVCache:
    lay = cache.layout
    size, sink = lay.block_tokens, lay.sink_blocks * lay.block_tokens
    kept = jnp.clip(tokens, 0, cache.tokens)
    spans, dense = jnp.zeros_like(kept), kept
    if lay.max_spans:
        spans = jnp.clip((kept - sink) // lay.span_tokens, 0, cache.num_spans)
        dense = kept - spans * lay.span_tokens
        dense = jnp.where(spans < cache.num_spans, jnp.minimum(dense, sink), dense)
    counters = dict(num_spans=spans, dense_blocks=dense // size)
    if cache.filled is None:
        # Blocks that were taken back count as never seen: the number of encoded blocks follows from it.
        gone = cache.dense_blocks - counters["dense_blocks"]
        gone += (cache.num_spans - spans) * lay.span_blocks
        counters |= dict(seen_blocks=cache.seen_blocks - gone)
    else:
        counters |= dict(filled=dense % size)
    return dataclasses.replace(cache, **counters)


def _check_border(cache: KVCache, tokens: int, held: int) -> None:
    """Raises ValueError if a cache of `held` tokens cannot be cut back to `tokens`."""
    lay = cache.layout
    if tokens > held:
        raise ValueError(f"tokens={tokens} is not accepted: the cache has {held}")
    sink, span = lay.sink_blocks * lay.block_tokens, lay.span_tokens
    spans = int(cache.num_spans)
    inside = spans and sink < tokens < sink + spans * span and (tokens - sink) % span
    if inside:
        low = tokens - inside
        raise ValueError(
            f"tokens={tokens} lies inside of the compressed span of tokens {low} to {low + span}; "
            f"accepted there: {low} or {low + span}"
        )
    if lay.blocks == "whole" and tokens % lay.block_tokens:
        low = tokens - tokens % lay.block_tokens
        raise ValueError(
            f"tokens={tokens} lies inside of a block, and blocks='whole'; accepted: {low} or "
            f"{low + lay.block_tokens}"
        )


def take_rows(cache: KVCache, rows: Int[Array, " R"]) -> KVCache:
    """The cache with these rows of its batch, in this order: for beams, and for requests that end.

    Args:
        cache: the cache.
        rows: an index for each row of the result; rows may repeat, and their number may differ from
            the batch. Inside jit, where they may be unknown, an index out of range is clipped.

    Returns:
        A cache whose batch is the number of rows. All rows have the same counters.

    Raises:
        ValueError: not one axis of integers, none at all, or an index out of range.
        NotImplementedError: a codec stores rows of the batch together.
    """
    check_cache(cache)
    if rows is None or isinstance(rows, str):
        raise wrong_kind("rows", rows, "(R,) integers, R >= 1")
    lay = cache.layout
    found = jnp.asarray(rows)
    if found.ndim != 1 or not found.size or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(
            f"rows have shape {found.shape} and dtype {found.dtype}; accepted: (R,) integers, R >= 1"
        )
    numbers = known(rows)
    if numbers is not None and not (0 <= numbers.min() <= numbers.max() < lay.batch):
        raise ValueError(
            f"rows={np.asarray(numbers).tolist()} are not accepted: give 0 to {lay.batch - 1}"
        )
    return _take_rows(cache, found)


@jax.jit
def _take_rows(cache: KVCache, rows: Array) -> KVCache:
    lay: Layout = cache.layout

    def taken(tree: Any, axis: int, apart: Any = True) -> Any:
        if apart is True:
            apart = jax.tree.map(lambda _: True, tree)
        take = lambda x, here: jnp.take(x, rows, axis, mode="clip") if here else x  # noqa: E731
        return jax.tree.map(take, tree, apart)

    of_heads = ("dense_k", "dense_v", "near_k", "near_v")
    fields = {name: taken(getattr(cache, name), 1) for name in of_heads}
    fields["near_pos"] = taken(cache.near_pos, 0)
    for name in ("pos", "valid", "table"):
        fields[f"dense_{name}"] = taken(getattr(cache, f"dense_{name}"), 0)
        fields[f"span_{name}"] = taken(getattr(cache, f"span_{name}"), 1)
    if lay.max_spans:
        for side, codec in (("k", lay.key_codec), ("v", lay.value_codec)):
            packed, state = batch_leaves(lay, codec, cache.dense_k.dtype)
            fields[f"span_{side}"] = taken(getattr(cache, f"span_{side}"), 2, packed)
            fields[f"state_{side}"] = taken(getattr(cache, f"state_{side}"), 1, state)
    return dataclasses.replace(
        cache, **fields, layout=dataclasses.replace(lay, batch=rows.shape[0])
    )
