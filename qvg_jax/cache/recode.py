"""Another codec for a cache that is in use: its spans are decoded and encoded again."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PRNGKeyArray

from qvg_jax.cache.arguments import check_cache, check_codec
from qvg_jax.cache.layer_codecs import LayerCodecs
from qvg_jax.cache.slots import empty_slots, read_slot, write_slot
from qvg_jax.cache.state import KVCache
from qvg_jax.codecs.base import Codec

__all__ = ["recode"]


def recode(
    cache: KVCache, key_codec: Codec, value_codec: Codec, key: PRNGKeyArray | None = None
) -> KVCache:
    """A cache with the same contents under other codecs; sink and window are uncompressed and stay as they are.

    Spans are encoded oldest first, each from the state that the one before left and with the
    randomness that `compress` would have given it. So a cache that comes from `identity` has
    the bytes that it would have had, had it been compressed from the start (and dropped nothing).
    What another codec has lost stays lost, and the new one's error adds to it. K or V whose codec
    does not change keeps its bytes.

    Outside jit; one program for each pair of codecs. Both caches are alive at its end.

    Args:
        cache: the cache; not donated.
        key_codec, value_codec: the new codecs.
        key: as for `compress`; give the key that was given there.

    Returns:
        A cache of the same layout but for the codecs.

    Raises:
        ValueError: a codec refuses the span's shape.
        NotImplementedError: codecs that differ by layer, before or after, heads without a history, or a
            cache on several devices.
    """
    check_cache(cache)
    for name, codec in (("key_codec", key_codec), ("value_codec", value_codec)):
        if not isinstance(codec, list | LayerCodecs):  # which are refused below
            check_codec(codec, name)
    lay = cache.layout
    if lay.plan is not None:
        raise NotImplementedError(
            f"recode: the cache has plan {lay.plan.axis}={lay.plan.devices}; accepted: a cache on one "
            "device, as spread(cache, None) returns it"
        )
    if lay.history is not None:
        raise NotImplementedError(
            f"recode: the cache has a {lay.history}; accepted: a cache whose heads all have a history"
        )
    for codec in (lay.key_codec, lay.value_codec, key_codec, value_codec):
        if not isinstance(codec, Codec):
            raise NotImplementedError("recode: codecs that differ by layer; accepted: one for all")
    key = jax.random.key(0) if key is None else key
    return _recode(cache, key, key_codec=key_codec, value_codec=value_codec)


@functools.partial(jax.jit, static_argnames=("key_codec", "value_codec"))
def _recode(cache: KVCache, key: PRNGKeyArray, *, key_codec: Codec, value_codec: Codec) -> KVCache:
    old = cache.layout
    lay = dataclasses.replace(old, key_codec=key_codec, value_codec=value_codec)
    if not lay.max_spans:
        return dataclasses.replace(cache, layout=lay)
    dtype = cache.dense_k.dtype
    encoded = cache.encoded_blocks // lay.span_blocks

    def half(number: int, before: Codec, after: Codec, spans: Any, states: Any) -> tuple[Any, Any]:
        if before == after:
            return spans, states

        def one_span(i, carry):
            l, j = i // jnp.maximum(cache.num_spans, 1), i % jnp.maximum(cache.num_spans, 1)
            slots, states = carry
            slot = (cache.first_span + j) % lay.max_spans
            x_BHTD = before.decode(read_slot(spans, l, slot), dtype)
            span_key = jax.random.fold_in(key, encoded - cache.num_spans + j)
            span_key = jax.random.split(jax.random.fold_in(span_key, l))[number]
            state = jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, l, 0, False), states)
            packed, state = after.encode(x_BHTD, state, key=span_key)
            states = jax.tree.map(lambda s, new: s.at[l].set(new), states, state)
            return write_slot(slots, l, slot, packed), states

        # Layer by layer, and in each layer oldest first: states go from span to span.
        return lax.fori_loop(
            0, lay.layers * cache.num_spans, one_span, empty_slots(lay, after, dtype)
        )

    span_k, state_k = half(0, old.key_codec, key_codec, cache.span_k, cache.state_k)
    span_v, state_v = half(1, old.value_codec, value_codec, cache.span_v, cache.state_v)
    return dataclasses.replace(
        cache, span_k=span_k, span_v=span_v, state_k=state_k, state_v=state_v, layout=lay
    )
