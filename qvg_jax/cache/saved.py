"""Caches on disk: a dictionary of arrays that any saver takes, and the way back with its checks.

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, to_saved(cache))
        cache = from_saved(checkpointer.restore(folder), like=KVCache.create(...))

A `KVCache` is a pytree, but savers refuse arrays of no elements, which empty regions have, and know
nothing of its layout: slots of one codec read as slots of another would be silently wrong.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvg_jax.cache.layout import Layout
from qvg_jax.cache.state import KVCache

__all__ = ["from_saved", "to_saved"]

LAYOUT = "layout"  # under this name lie the bytes of the layout's text


def to_saved(cache: KVCache) -> dict[str, Any]:
    """The cache's arrays by name, without those of no elements, and its layout as bytes."""
    text = "\n".join(_lines(cache.layout)).encode()
    saved: dict[str, Any] = {LAYOUT: np.frombuffer(text, np.uint8)}
    return saved | {name: x for name, x in _named(cache).items() if x.size}


def from_saved(saved: dict[str, Any], like: KVCache) -> KVCache:
    """The cache that `to_saved` gave away.

    Args:
        saved: what a saver brought back.
        like: a cache of the same layout, such as the empty one that the run began with. Arrays go
            where its arrays are.

    Raises:
        ValueError: the layout is another one (every setting that differs is named), or an array is
            missing or of another shape or dtype.
    """
    if LAYOUT not in saved:
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
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named(cache: KVCache) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {jax.tree_util.keystr(path): x for path, x in leaves}


def _lines(layout: Layout) -> list[str]:
    fields = dataclasses.fields(layout)
    return [f"{f.name}={getattr(layout, f.name)}".replace("\n", " ") for f in fields]
