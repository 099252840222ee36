"""Caches on disk: a dictionary of arrays that any saver takes, and the way back with its checks.

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, to_saved(cache))
        cache = from_saved(checkpointer.restore(folder), like=KVCache.create(...))

A cache of one plan comes back by another. Devices then read as the saver's target says; here it is the
same for all of them:

    form = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    target = {name: form(x) if isinstance(x, jax.Array) else x for name, x in to_saved(like).items()}
    cache = from_saved(checkpointer.restore(folder, target), like)

A `KVCache` is a pytree, but savers refuse arrays of no elements, which empty regions have, and know
nothing of its layout: slots of one codec read as slots of another would be silently wrong.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvg_jax.cache.arguments import check_cache
from qvg_jax.cache.devices import in_order_of
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.plan import AXES, Plan
from qvg_jax.cache.state import KVCache

__all__ = ["from_saved", "to_saved"]

INT32_MAX = 2**31 - 1

LAYOUT = "layout"  # under this name lie the bytes of the layout's text
PLAN = "plan"  # and under this one the devices of each axis, in whose order the arrays lie


def to_saved(cache: KVCache) -> dict[str, Any]:
    """The cache's arrays by name, without those of no elements, its layout as bytes, and its plan."""
    check_cache(cache)
    text = "\n".join(_lines(cache.layout)).encode()
    plan = Plan() if cache.layout.plan is None else cache.layout.plan
    saved: dict[str, Any] = {LAYOUT: np.frombuffer(text, np.uint8)}
    saved[PLAN] = np.array([getattr(plan, axis) for axis in AXES], np.int32)
    return saved | {name: x for name, x in _named(cache).items() if x.size}


def from_saved(saved: dict[str, Any], like: KVCache) -> KVCache:
    """The cache that `to_saved` gave away.

    Args:
        saved: what a saver brought back.
        like: a cache of the same layout, such as the empty one that the run began with. Arrays go
            where its arrays are; its plan may be another one.

    Raises:
        ValueError: the layout is another one (every setting that differs is named), or an array is
            missing or of another shape or dtype, or counters say what no cache of this layout can hold.
    """
    check_cache(like, "like")
    if not isinstance(saved, Mapping) or LAYOUT not in saved:
        raise ValueError(f"saved has no {LAYOUT!r}: accepted is what `to_saved` returns")
    then = bytes(np.asarray(saved[LAYOUT])).decode().split("\n")
    now = _lines(like.layout)
    if then != now:
        was, has = (", ".join(x for x in a if x not in b) for a, b in ((then, now), (now, then)))
        raise ValueError(f"the saved cache has {was or 'fewer settings'}; this cache has {has}")
    leaves = []
    for name, x in _named(like).items():
        if not x.size:
            leaves.append(x)
            continue
        if name not in saved:
            raise ValueError(f"saved: {name} is missing")
        got = saved[name]
        if (got.shape, got.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"saved: {name} has {got.shape} {got.dtype}; accepted: {x.shape} {x.dtype}"
            )
        leaves.append(jax.device_put(jnp.asarray(got), x.sharding))
    cache = jax.tree.unflatten(jax.tree.structure(like), leaves)
    _check_counters(cache)
    devices = np.asarray(saved.get(PLAN, [1] * len(AXES))).tolist()
    return in_order_of(cache, Plan(**dict(zip(AXES, devices, strict=True))))


def _check_counters(cache: KVCache) -> None:
    """Raises ValueError if the counters of a cache, or of stacked ones, cannot all be true."""
    lay = cache.layout
    names = ("dense_blocks", "first_span", "num_spans", "seen_blocks", "dropped_blocks")
    names += ("rejected_blocks", "nonfinite", "first_bad_block")
    names += () if cache.filled is None else ("filled",)
    numbers = [np.asarray(x, np.int64) for x in jax.device_get([getattr(cache, n) for n in names])]
    of = dict(zip(names, numbers, strict=True))
    most = dict(dense_blocks=lay.dense_blocks, num_spans=lay.max_spans, filled=lay.block_tokens - 1)
    most["first_span"] = max(lay.max_spans - 1, 0)
    for name, x in of.items():
        least, top = -1 if name == "first_bad_block" else 0, most.get(name, INT32_MAX)
        if ((x < least) | (x > top)).any():
            raise ValueError(f"saved: {name}={x.tolist()} is not accepted: give {least} to {top}")
    shown = {name: f"{name}={x.tolist()}" for name, x in of.items()}
    dense, spans, bad = of["dense_blocks"], of["num_spans"], of["first_bad_block"]
    wrong = [
        (
            f"{shown['num_spans']} with {shown['dense_blocks']}: spans come after {lay.sink_blocks} blocks "
            "of sink",
            (spans > 0) & (dense < lay.sink_blocks),
        ),
        (
            f"{shown['first_bad_block']} with {shown['nonfinite']}: bad values and their block go together",
            (bad >= 0) != (of["nonfinite"] > 0),
        ),
    ]
    if cache.filled is None:  # then each call of `append` was one block
        gone = of["dropped_blocks"] + of["rejected_blocks"]
        known = dense + spans * lay.span_blocks + gone
        wrong.append(
            (
                f"{shown['seen_blocks']}, but blocks in sink, window and spans, and those dropped and "
                f"rejected, are {known.tolist()}",
                of["seen_blocks"] != known,
            )
        )
    for what, found in wrong:
        if found.any():
            raise ValueError(f"saved: {what}; accepted: the counters as `to_saved` returned them")


def _named(cache: KVCache) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {jax.tree_util.keystr(path): x for path, x in leaves}


def _lines(layout: Layout) -> list[str]:
    fields = [f for f in dataclasses.fields(layout) if f.name not in ("plan", "part")]
    # Caches that were saved before there were histories have no line about them.
    fields = [f for f in fields if f.name != "history" or layout.history is not None]
    return [f"{f.name}={getattr(layout, f.name)}".replace("\n", " ") for f in fields]
