"""Attention to a cache on several devices: each attends to what it has, and outputs are merged.

With o_d and lse_d the output and log-sum-exp of device d's keys, m the largest lse_d and
w_d = exp(lse_d - m), attention to all keys is
    o = sum_d w_d o_d / sum_d w_d,   lse = m + log sum_d w_d.
So what devices exchange is as large as the output, and no key or value.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qvg_jax.attention.features import Features
from qvg_jax.attention.ring import attend_ring, rotated
from qvg_jax.cache.devices import cache_specs, own_part, own_spans
from qvg_jax.cache.plan import Plan
from qvg_jax.cache.state import KVCache
from qvg_jax.cache.view import CacheView

__all__ = ["attend_on_devices", "check_spread"]

type Attend = Callable[..., tuple[Array, Array | None]]


def attend_on_devices(
    attend_here: Attend,
    q_BTHD: Array,
    view: CacheView,
    k_BTHD: Array,
    v_BTHD: Array,
    layer: Array,
    scale: Array,
    features: Features,
) -> tuple[Array, Array]:
    """Output and log-sum-exp of `attend` for a cache that has a plan.

    Args:
        attend_here: `attend_here(q, view, k, v, layer, scale, features, reads_new)` attends on one device,
            and returns the log-sum-exp too if the features ask for it.
        q_BTHD, view, k_BTHD, v_BTHD, layer, scale, features: as in `attend`, checked.

    Raises:
        ValueError: the devices do not divide the new tokens, where the plan keeps them apart.
        NotImplementedError: the plan divides heads that a codec keeps together.
    """
    plan: Plan = view.cache.layout.plan
    tokens = q_BTHD.shape[1]
    check_spread(view.cache, plan, tokens)
    k_BTHD, v_BTHD = k_BTHD.astype(q_BTHD.dtype), v_BTHD.astype(q_BTHD.dtype)
    table, view = view.table_new, dataclasses.replace(view, table_new=None)
    sinks = features.sink_logits_H
    asked = Features(softcap=features.softcap, return_lse=True, mask=_mask(features, tokens))
    if k_BTHD.size and features.lengths_R is not None:  # what padding holds may be NaN
        counts_RT = jnp.arange(tokens)[None] < features.lengths_R[:, None]
        v_BTHD = jnp.where(counts_RT[..., None, None], v_BTHD, 0)
    by = {"heads": _by_heads, "spans": _by_spans, "ring": attend_ring}[plan.axis]
    new = (q_BTHD, k_BTHD, v_BTHD)
    out, lse = by(attend_here, plan, new, table, view, layer, scale, asked)
    if sinks is not None:
        out, lse = Features(sink_logits_H=sinks).finished(out.astype(jnp.float32), lse)
    return out.astype(q_BTHD.dtype), lse


def check_spread(cache: KVCache, plan: Plan, tokens: int) -> None:
    """Raises unless blocks of so many tokens can attend to a cache by a plan; shapes are enough.

    Args:
        cache: the cache, or its `jax.eval_shape`.
        plan: how it is spread, or would be.
        tokens: of a new block.

    Raises:
        ValueError: the devices do not divide the new tokens, where the plan keeps them apart.
        NotImplementedError: the plan divides heads that a codec keeps together.
    """
    n, lay = plan.devices, cache.layout
    if plan.split_tokens and tokens % n:
        raise ValueError(
            f"q has {tokens} tokens, and plan {plan.axis}={n} with split_tokens divides them over the "
            f"devices; accepted: a multiple of {n}"
        )
    for name, spans in (("key", cache.span_k), ("value", cache.span_v)):
        if plan.axis == "heads" and any(
            x.shape[2:4] != (lay.batch, lay.heads) for x in jax.tree.leaves(spans)
        ):
            raise NotImplementedError(
                f"plan heads={n}: {name} codec {getattr(lay, f'{name}_codec').name} keeps heads together, "
                "so none can be read alone; accepted: plan spans or ring, or a codec that keeps them apart"
            )


def _mask(features: Features, tokens: int) -> Array | None:
    """Which new keys queries see, (R or 1, Hq or 1, T, T), of `causal`, `mask` and `lengths` together."""
    parts = []
    if features.causal:
        parts.append(jnp.tril(jnp.ones((tokens, tokens), bool))[None, None])
    if features.mask is not None:
        parts.append(features.mask)
    if features.lengths_R is not None:
        counts_RT = jnp.arange(tokens)[None] < features.lengths_R[:, None]
        parts.append(
            jnp.broadcast_to(counts_RT[:, None, None], (*counts_RT.shape[:1], 1, tokens, tokens))
        )
    return functools.reduce(jnp.logical_and, parts) if parts else None


def _view_specs(view: CacheView, plan: Plan) -> CacheView:
    """The pytree of a view with a `PartitionSpec` in place of each array."""
    everywhere = jax.tree.map(lambda x: jax.P(), view)
    specs = dataclasses.replace(everywhere, cache=cache_specs(view.cache, plan))
    if plan.part is None:
        return specs
    by_slot = jax.tree.map(lambda x: jax.P(plan.axis), view.table_spans)
    specs = dataclasses.replace(specs, table_spans=by_slot)
    if not plan.part.splits_blocks:
        return specs
    by_token = jax.tree.map(lambda x: jax.P(None, plan.axis), view.table_dense)
    return dataclasses.replace(specs, table_dense=by_token)


def _by_spans(
    attend_here: Attend,
    plan: Plan,
    new: tuple[Array, Array, Array],
    table: Any,
    view: CacheView,
    layer: Array,
    scale: Array,
    features: Features,
) -> tuple[Array, Array]:
    """Each device attends to its own spans, and to its part of sink, window and the new block."""
    axis, tokens = plan.axis, new[1].shape[1]
    # A new block that is not all seen, or that cannot be divided, is the first device's.
    divided = features.mask is None and not tokens % plan.devices
    apart = jax.P(None, axis) if divided else jax.P()
    if tokens and not divided and features.mask is None:
        features = dataclasses.replace(features, mask=jnp.ones((1, 1, tokens, tokens), bool))

    def here(new, table, view, layer, scale, features):
        q, k, v = rotated(view, new, table, axis)
        own = own_spans(dataclasses.replace(view.cache, layout=own_part(view.cache.layout)))
        view = dataclasses.replace(view, cache=own)
        if not divided:
            mine = features.mask & (lax.axis_index(axis) == 0)
            features = dataclasses.replace(features, mask=mine)
        run = attend_here(q, view, k, v, layer, scale, features, bool(tokens))
        return merged(*run, axis, plan.split_tokens)

    inputs = ((jax.P(), apart, apart), jax.P(), _view_specs(view, plan), jax.P(), jax.P(), jax.P())
    out = jax.P(None, axis) if plan.split_tokens else jax.P()
    run = jax.shard_map(here, mesh=plan.mesh, in_specs=inputs, out_specs=out, check_vma=False)
    return run(new, table, view, layer, scale, features)


def merged(out_BTHD: Array, lse_BTH: Array, axis: str, split_tokens: bool) -> tuple[Array, Array]:
    """Attention to the keys of all devices from that to each one's, inside of `shard_map`.

    Args:
        out_BTHD, lse_BTH: of this device; a log-sum-exp of -inf means that it has no keys.
        axis: of the mesh.
        split_tokens: whether each device gets its part of the tokens only.
    """
    m_BTH = lax.pmax(lse_BTH, axis)
    at_BTH = jnp.where(m_BTH > -jnp.inf, m_BTH, 0)
    w_BTH1 = jnp.exp(lse_BTH - at_BTH)[..., None]
    both = jnp.concatenate([out_BTHD.astype(jnp.float32) * w_BTH1, w_BTH1], -1)
    if split_tokens:
        both = lax.psum_scatter(both, axis, scatter_dimension=1, tiled=True)
        size = both.shape[1]
        at_BTH = lax.dynamic_slice_in_dim(at_BTH, lax.axis_index(axis) * size, size, 1)
    else:
        both = lax.psum(both, axis)
    out_BTHD, w_BTH1 = both[..., :-1], both[..., -1:]
    lse_BTH = at_BTH + jnp.log(w_BTH1[..., 0])
    return out_BTHD / jnp.where(w_BTH1 > 0, w_BTH1, 1), lse_BTH


def _by_heads(
    attend_here: Attend,
    plan: Plan,
    new: tuple[Array, Array, Array],
    table: Any,
    view: CacheView,
    layer: Array,
    scale: Array,
    features: Features,
) -> tuple[Array, Array]:
    """Each device attends with its own heads; queries with their tokens apart change places before and after."""
    axis, n, lay = plan.axis, plan.devices, view.cache.layout

    def here(new, table, view, layer, scale, features):
        q, k, v = rotated(view, new, table, axis)
        layout = dataclasses.replace(lay, plan=None, heads=lay.heads // n)
        view = dataclasses.replace(view, cache=dataclasses.replace(view.cache, layout=layout))
        reads_new = bool(k.shape[1])
        if plan.split_tokens:
            q, k, v = _heads_together((q, k, v) if reads_new else (q,), axis, n) + (
                () if reads_new else (k, v)
            )
        out, lse = attend_here(q, view, k, v, layer, scale, features, reads_new)
        if not plan.split_tokens:
            return out, lse
        back = functools.partial(
            lax.all_to_all, axis_name=axis, split_axis=1, concat_axis=2, tiled=True
        )
        return back(out), back(lse)

    apart = jax.P(None, axis) if plan.split_tokens else jax.P(None, None, axis)
    of_keys = apart if new[1].shape[1] else jax.P(None, None, axis)
    mask = features.mask
    by_head = jax.P(None, axis) if mask is not None and mask.shape[1] > 1 else jax.P()
    rules = jax.tree.map(lambda x: by_head, features)
    of_table = jax.P(None, axis) if plan.split_tokens else jax.P()
    inputs = ((apart, of_keys, of_keys), of_table, _view_specs(view, plan), jax.P(), jax.P(), rules)
    run = jax.shard_map(here, mesh=plan.mesh, in_specs=inputs, out_specs=apart, check_vma=False)
    return run(new, table, view, layer, scale, features)


def _heads_together(arrays: tuple[Array, ...], axis: str, n: int) -> tuple[Any, ...]:
    """Arrays (B, T / n, H, D) with some tokens and all heads as (B, T, H / n, D), by one all-to-all."""
    groups = [x.reshape(*x.shape[:2], n, -1, x.shape[3]) for x in arrays]
    sizes = [x.shape[3] for x in groups]
    joined = jnp.concatenate(groups, axis=3)
    joined = joined.reshape(*joined.shape[:2], -1, joined.shape[4])
    joined = lax.all_to_all(joined, axis, split_axis=2, concat_axis=1, tiled=True)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return tuple(jnp.split(joined, ends, axis=2))
