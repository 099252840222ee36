"""Attention by a ring of devices: queries stay, packed spans and the new block's parts go around.

A step attends to the spans in hand while the next ones are on their way. What travels are the bytes that
the cache stores, about seven times fewer than those of K and V in bf16, and positions, which are few.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qvg_jax.attention.features import Features
from qvg_jax.cache.devices import cache_specs, own_part, own_spans
from qvg_jax.cache.plan import Plan
from qvg_jax.cache.state import KVCache
from qvg_jax.cache.view import CacheView

__all__ = ["attend_ring", "rotated"]


class _Hand(NamedTuple):
    """What goes around: packed spans of one layer, their positions, and a part of the new block."""

    span_k: Any
    span_v: Any
    span_pos: Any
    span_valid: Any
    k_BTHD: Array | None
    v_BTHD: Array | None


def attend_ring(
    attend_here: Callable[..., tuple[Array, Array | None]],
    plan: Plan,
    new: tuple[Array, Array, Array],
    table: Any,
    view: CacheView,
    layer: Array,
    scale: Array,
    features: Features,
) -> tuple[Array, Array]:
    """Output and log-sum-exp of `attend`, with tokens apart; arguments as in `attend_on_devices`."""
    axis, n, tokens = plan.axis, plan.devices, new[1].shape[1]
    view = dataclasses.replace(view, table_spans=None)  # made where spans come around
    ahead = [(d, (d + 1) % n) for d in range(n)]

    def here(new, table, view, layer, scale, features):
        q, k, v = rotated(view, new, table, axis)
        cache = dataclasses.replace(view.cache, layout=own_part(view.cache.layout))
        plain = dataclasses.replace(features, mask=None)
        none = jnp.zeros((*q.shape[:1], 0, *k.shape[2:]), q.dtype)

        def attended(view, k, v, layer, turns):
            seen = plain
            if tokens and features.mask is not None:  # the columns of the keys in hand
                size = tokens // n
                source = (lax.axis_index(axis) - turns) % n
                mask = lax.dynamic_slice_in_dim(features.mask, source * size, size, 3)
                seen = dataclasses.replace(features, mask=mask)
            k, v = (k, v) if tokens else (none, none)
            out, lse = attend_here(q, view, k, v, layer, scale, seen, bool(tokens))
            return out.astype(jnp.float32), lse

        def sent(hand):
            return jax.tree.map(lambda x: lax.ppermute(x, axis, ahead), hand)

        def step(turns, hand, run):
            one = _in_hand(cache, hand, turns)
            part = dataclasses.replace(view, cache=one, table_dense=None)
            return _both(run, attended(part, hand.k_BTHD, hand.v_BTHD, jnp.int32(0), turns))

        def turn(turns, carry):
            hand, run = carry
            # First on its way, then read: the two have nothing to wait for of each other.
            coming = sent(hand)
            return coming, step(turns, hand, run)

        # Sink and window are on every device, and read with its own spans, where those lie.
        hand = sent(_first_hand(cache, layer, *((k, v) if tokens else (None, None))))
        run = attended(dataclasses.replace(view, cache=own_spans(cache)), k, v, layer, 0)
        hand, run = lax.fori_loop(1, n - 1, turn, (hand, run))
        return step(n - 1, hand, run)

    apart = jax.P(None, axis)
    everywhere = jax.tree.map(lambda x: jax.P(), view)
    views = dataclasses.replace(everywhere, cache=cache_specs(view.cache, plan))
    rows = jax.tree.map(lambda x: jax.P(None, None, axis), features)
    inputs = (apart, apart, views, jax.P(), jax.P(), rows)
    run = jax.shard_map(here, mesh=plan.mesh, in_specs=inputs, out_specs=apart, check_vma=False)
    return run(new, table, view, layer, scale, features)


def _first_hand(cache: KVCache, layer: Array, k: Array | None, v: Array | None) -> _Hand:
    """This device's own spans of one layer, and its part of the new block."""
    row = lambda x: lax.dynamic_slice_in_dim(x, layer, 1, 0)  # noqa: E731
    if not cache.layout.max_spans:
        return _Hand(None, None, None, None, k, v)
    spans = (jax.tree.map(row, x) for x in (cache.span_k, cache.span_v))
    return _Hand(*spans, cache.span_pos, cache.span_valid, k, v)


def _in_hand(cache: KVCache, hand: _Hand, turns: Array | int) -> KVCache:
    """A cache of one layer that has the spans in hand, and an empty sink and window."""
    cache = own_spans(cache, turns)
    nothing = jnp.zeros_like(cache.dense_blocks)
    fields = dict(dense_blocks=nothing, filled=None if cache.filled is None else nothing)
    if cache.layout.max_spans:
        fields |= {name: getattr(hand, name) for name in _Hand._fields[:4]}
    return dataclasses.replace(cache, **fields, layout=dataclasses.replace(cache.layout, layers=1))


def rotated(
    view: CacheView, new: tuple[Array, Array, Array], table: Any, axis: str
) -> tuple[Array, Array, Array]:
    """New queries, keys and values (B, T, H, D) with the first two rotated, inside of `shard_map`.

    Keys that are this device's part of those in the rope table of new tokens are rotated by that part.
    """

    def turned(x_BTHD: Array) -> Array:
        tokens = x_BTHD.shape[1]

        def part(t: Array) -> Array:
            if t.shape[1] == tokens:
                return t
            return lax.dynamic_slice_in_dim(t, lax.axis_index(axis) * tokens, tokens, 1)

        by = dataclasses.replace(view, table_new=jax.tree.map(part, table))
        return jnp.swapaxes(by.new(jnp.swapaxes(x_BTHD, 1, 2)), 1, 2) if tokens else x_BTHD

    q_BTHD, k_BTHD, v_BTHD = new
    return turned(q_BTHD), turned(k_BTHD), v_BTHD


def _both(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention to two sets of keys, from the output and log-sum-exp of each."""
    lse_BTH = jnp.logaddexp(a[1], b[1])
    shares = [jnp.where(x[1] > -jnp.inf, jnp.exp(x[1] - lse_BTH), 0) for x in (a, b)]
    out = sum(x[0] * share[..., None] for x, share in zip((a, b), shares, strict=True))
    return out, lse_BTH
