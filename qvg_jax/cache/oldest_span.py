"""The oldest span of the window on its way into a slot: `compress`, once a span is due."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from qvg_jax.cache.devices import whole_span
from qvg_jax.cache.layer_codecs import groups_of, joined, parts_of
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.own_window import by_head, read_rows, write_rows
from qvg_jax.cache.slots import write_slot
from qvg_jax.cache.state import KVCache
from qvg_jax.codecs.no_gradient import no_gradient

__all__ = ["all_slots", "encode_oldest"]


def encode_oldest(cache: KVCache, key: PRNGKeyArray) -> KVCache:
    """The cache with the oldest span of its window in the next slot, and later blocks moved up.

    With a slot for it or without: then the oldest span makes room. On several devices all of them encode
    the span, and the one that is next keeps it.
    """
    lay, n = cache.layout, cache.layout.block_tokens
    begin, size = lay.sink_blocks * n, lay.span_blocks * n
    tail = (lay.window_blocks - lay.span_blocks) * n  # what can remain in the window
    slots = all_slots(lay)
    full = (cache.num_spans >= slots).astype(jnp.int32)
    slot, store = (cache.first_span + cache.num_spans) % slots, None
    if lay.part is not None:  # the span's place on its device, and whether this is the one
        store = slot % lay.part.devices == lax.axis_index(lay.part.axis)
        slot //= lay.part.devices
    key = jax.random.fold_in(key, cache.encoded_blocks // lay.span_blocks)

    def one_layer(l, carry, codecs, places, head_h):
        def one(codec, place, dense, spans, states, key):
            state = jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, place, 0, False), states)
            rows = None if head_h is None else head_h.shape[0]
            span = by_head(lay, read_rows(lay, dense, l, rows, begin, size))
            span = span if head_h is None or lay.own_window else span.take(head_h, 1)
            encoded = codec.encode(whole_span(lay, span, 2), state, key=key)
            packed, state = no_gradient(encoded, "compress")
            # All reading before all writing, or XLA copies the whole buffer to be safe.
            moved = read_rows(lay, dense, l, rows, begin + size, tail)
            packed, state, moved = lax.optimization_barrier((packed, state, moved))
            spans = write_slot(spans, place, slot, packed, store)
            states = jax.tree.map(lambda s, new: s.at[place].set(new), states, state)
            return write_rows(lay, dense, l, begin, moved), spans, states

        keys = jax.random.split(jax.random.fold_in(key, l))
        sides = zip(codecs, places, carry, keys, strict=True)
        return tuple(one(codec, place, *x, key) for codec, place, x, key in sides)

    def no_head(l, dense):
        moved = lax.optimization_barrier(read_rows(lay, dense, l, None, begin + size, tail))
        return write_rows(lay, dense, l, begin, moved)

    sides = _for_each_layer(cache, one_layer, no_head)
    (dense_k, span_k, state_k), (dense_v, span_v, state_v) = sides

    def moved(x: Array) -> Array:
        return x.at[:, begin : begin + tail].set(x[:, begin + size : begin + size + tail])

    def moved_to_slot(slots: Array, x: Array) -> Array:
        new = whole_span(lay, x[:, begin : begin + size], 1)
        return slots.at[slot].set(new if store is None else jnp.where(store, new, slots[slot]))

    of_tokens = (cache.dense_pos, cache.dense_valid, cache.dense_table)
    dense_pos, dense_valid, dense_table = jax.tree.map(moved, of_tokens)
    span_pos, span_valid, span_table = jax.tree.map(
        moved_to_slot,
        (cache.span_pos, cache.span_valid, cache.span_table),
        of_tokens,
    )
    return dataclasses.replace(
        cache,
        dense_k=dense_k,
        dense_v=dense_v,
        dense_pos=dense_pos,
        dense_valid=dense_valid,
        dense_table=dense_table,
        span_k=span_k,
        span_v=span_v,
        span_pos=span_pos,
        span_valid=span_valid,
        span_table=span_table,
        state_k=state_k,
        state_v=state_v,
        dense_blocks=cache.dense_blocks - lay.span_blocks,
        first_span=(cache.first_span + full) % slots,
        num_spans=cache.num_spans + 1 - full,
        dropped_blocks=cache.dropped_blocks + full * lay.span_blocks,
    )


def all_slots(lay: Layout) -> int:
    """Slots of the whole cache, on all devices."""
    return lay.max_spans * (1 if lay.part is None else lay.part.devices)


def _for_each_layer(
    cache: KVCache, one_layer: Callable[..., Any], no_head: Callable[[Array, Array], Array]
) -> tuple[Any, Any]:
    """K and V after `one_layer` for each layer, and `no_head` for those none of whose heads has a history.

    Layers that share slots of both K and V are a loop.

    Args:
        cache: the cache.
        one_layer: `one_layer(l, (k, v), codecs, places, head_h)` returns (k, v), each the dense buffer, slots
            and states. `places` are where layer l lies in the slots; `head_h` are its heads with a
            history, None for all.
        no_head: `no_head(l, dense)` returns the dense buffer of K or V.
    """
    lay = cache.layout
    codecs = lay.key_codec, lay.value_codec
    dense = [cache.dense_k, cache.dense_v]
    slots = [parts_of(c, lay, x) for c, x in zip(codecs, (cache.span_k, cache.span_v), strict=True)]
    states = (cache.state_k, cache.state_v)
    states = [parts_of(c, lay, x) for c, x in zip(codecs, states, strict=True)]
    groups = [groups_of(codec, lay) for codec in codecs]
    for i, keys in enumerate(groups[0]):
        for j, values in enumerate(groups[1]):
            layers = [l for l in keys.layers if l in values.layers]
            if not layers:
                continue
            places = [[of.layers.index(l) for l in layers] for of in (keys, values)]
            plain = layers == list(range(lay.layers)) and all(place == layers for place in places)
            heads = None if lay.history is None else lay.history.indices(keys.shape[1], True)

            def step(
                n,
                carry,
                layers=layers,
                places=places,
                plain=plain,
                heads=heads,
                pair=(keys.codec, values.codec),
            ):
                l, at = n, (n, n)
                if not plain:
                    l, *at = (jnp.asarray(x, jnp.int32)[n] for x in (layers, *places))
                return one_layer(
                    l, carry, pair, at, None if heads is None else jnp.asarray(heads)[l]
                )

            carry = tuple((dense[s], slots[s][g], states[s][g]) for s, g in enumerate((i, j)))
            carry = _loop(len(layers), step, carry)
            for s, g in enumerate((i, j)):
                dense[s], slots[s][g], states[s][g] = carry[s]
    if lay.history is not None and 0 in lay.history.counts and not lay.own_window:
        alone = np.flatnonzero(np.asarray(lay.history.counts) == 0).astype(np.int32)
        for s in range(2):
            move = lambda n, x: no_head(jnp.asarray(alone)[n], x)  # noqa: E731
            dense[s] = _loop(len(alone), move, dense[s])
    return tuple(
        (dense[s], joined(codec, lay, slots[s]), joined(codec, lay, states[s]))
        for s, codec in enumerate(codecs)
    )


def _loop(count: int, step: Callable[[Array, Any], Any], carry: Any) -> Any:
    """A loop whose index is int32 whatever `jax_enable_x64` says: the counters are, and indices of a slice agree."""
    return lax.fori_loop(np.int32(0), np.int32(count), step, carry)
