"""The spans that a cache has in sight, chosen from a store of all of them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jaxtyping import Array

from qvg_jax.cache.arguments import check_cache, whole_numbers
from qvg_jax.cache.memories import in_memory
from qvg_jax.cache.state import KVCache
from qvg_jax.cache.store import Span, SpanStore
from qvg_jax.errors import wrong_kind

__all__ = ["recall"]


def recall(
    cache: KVCache,
    store: SpanStore,
    ids: Sequence[int],
    ahead: Mapping[int, Span] | None = None,
) -> tuple[KVCache, SpanStore]:
    """The cache with these spans in sight and no others, and the store with all spans of the cache kept.

    Only spans that are not in a slot yet are copied. `compress` puts the next span into a slot that is free,
    or in place of the oldest one in sight. Outside of jit.

    Args:
        cache: the cache; it is donated.
        store: of this cache.
        ids: numbers of kept spans, at most as many as the cache has slots; in any order.
        ahead: from `store.fetch`: spans that are on the device already.

    Raises:
        TypeError: what is no cache, no store or no list of integers.
        ValueError: a number twice, too many of them, or one that is not kept; see also `SpanStore.keep`.
    """
    check_cache(cache)
    if not isinstance(store, SpanStore):
        raise wrong_kind("store", store, "a SpanStore, as SpanStore.create makes it")
    wanted = whole_numbers("ids", ids)
    store, slots = store.keep(cache), store.layout.max_spans
    if len(set(wanted)) < len(wanted) or len(wanted) > slots:
        raise ValueError(
            f"ids={wanted} are not accepted: give at most max_spans={slots} numbers, each once"
        )
    for number in wanted:
        store.span(number)
    first, sight = _placed(wanted, store.sight)
    for slot, (new, old) in enumerate(zip(sight, store.sight, strict=True)):
        if new is None or new == old:
            continue
        span = ahead[new] if ahead and new in ahead else in_memory(store.span(new), "device")
        cache = _with_span(cache, span, np.int32(slot))
    cache = _in_sight(cache, np.int32(first), np.int32(len(wanted)))
    return cache, dataclasses.replace(store, sight=sight)


def _placed(wanted: list[int], sight: tuple[int | None, ...]) -> tuple[int, tuple[int | None, ...]]:
    """The first slot in sight, and the span of each slot: as many as can be stay where they are.

    Slots in sight are a range of the ring. If it is all of the ring, it begins with the oldest span.
    """
    slots, count = len(sight), len(wanted)
    ring = lambda first: [(first + i) % slots for i in range(count)]  # noqa: E731
    first = max(range(slots), key=lambda f: len({sight[s] for s in ring(f)} & set(wanted)))
    at = {sight[s]: s for s in ring(first) if sight[s] in wanted}
    free = [s for s in ring(first) if s not in at.values()]
    at |= zip((i for i in wanted if i not in at), free, strict=True)
    placed = list(sight)
    for number, slot in at.items():
        placed[slot] = number
    if count == slots and wanted:
        first = at[min(wanted)]
    return first, tuple(placed)


@functools.partial(jax.jit, donate_argnums=0)
def _with_span(cache: KVCache, span: Span, slot: Array) -> KVCache:
    """The cache with a span in a slot."""

    def put(tree: Any, new: Any, axis: int) -> Any:
        return jax.tree.map(
            lambda x, y: lax.dynamic_update_index_in_dim(x, y, slot, axis), tree, new
        )

    return dataclasses.replace(
        cache,
        span_k=put(cache.span_k, span.k, 1),
        span_v=put(cache.span_v, span.v, 1),
        span_pos=put(cache.span_pos, span.pos, 0),
        span_valid=put(cache.span_valid, span.valid, 0),
        span_table=put(cache.span_table, span.table, 0),
    )


@functools.partial(jax.jit, donate_argnums=0)
def _in_sight(cache: KVCache, first: Array, count: Array) -> KVCache:
    """The cache whose valid spans are `count` slots from `first` on; those out of sight count as dropped."""
    out = (cache.num_spans - count) * cache.layout.span_blocks
    return dataclasses.replace(
        cache, first_span=first, num_spans=count, dropped_blocks=cache.dropped_blocks + out
    )
