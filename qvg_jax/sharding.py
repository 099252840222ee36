"""Where the arrays of a cache lie on several devices: heads apart, everything else on each."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from qvg_jax.cache_state import KVCache

__all__ = ["head_shardings"]


def head_shardings(cache: KVCache, mesh: Mesh, axis: str) -> KVCache:
    """Shardings of a cache whose key-value heads are spread over one axis of a mesh.

        cache = jax.device_put(cache, head_shardings(cache, mesh, "heads"))

    Heads never meet in the cache or in attention, so nothing is communicated. Arrays without a
    head axis (positions, counters) are replicated.

    Args:
        cache: a cache, or its `jax.eval_shape`.
        mesh: the devices.
        axis: name of the mesh axis that divides the heads.

    Returns:
        A pytree of the cache's structure with a `NamedSharding` in place of each array.

    Raises:
        ValueError: the mesh has no such axis, or its size does not divide the heads.
    """
    lay = cache.layout
    if axis not in mesh.shape:
        raise ValueError(f"axis={axis!r} is not accepted: the mesh has {tuple(mesh.axis_names)}")
    if lay.heads % mesh.shape[axis]:
        raise ValueError(
            f"heads={lay.heads} do not divide over axis {axis!r} of size {mesh.shape[axis]}"
        )
    batch_heads = (lay.batch, lay.heads)

    def place(leading: int):
        # Codecs keep (B, H) in front of what they store for each head.
        def of(x: Any) -> NamedSharding:
            apart = x.shape[leading : leading + 2] == batch_heads
            spec = (None,) * (leading + 1) + (axis,) if apart else ()
            return NamedSharding(mesh, jax.P(*spec))

        return of

    fields = {}
    for name, leading in (("dense", 1), ("span", 2), ("state", 1)):
        for side in ("k", "v"):
            value = getattr(cache, f"{name}_{side}")
            fields[f"{name}_{side}"] = jax.tree.map(place(leading), value)
    everywhere = NamedSharding(mesh, jax.P())
    shardings = jax.tree.map(lambda x: everywhere, cache)
    return dataclasses.replace(shardings, **fields)
