"""Where the arrays of a cache lie on several devices: batch rows or heads apart, everything else on each."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from qvg_jax.attention.api import attend
from qvg_jax.cache.devices import axis_specs
from qvg_jax.cache.plan import Plan
from qvg_jax.cache.state import KVCache
from qvg_jax.cache.view import CacheView

__all__ = ["attend_by_heads", "by_tokens", "cache_shardings", "head_shardings"]


def head_shardings(cache: KVCache, mesh: Mesh | AbstractMesh, axis: str) -> KVCache:
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
    return cache_shardings(cache, mesh, heads=axis)


def cache_shardings(
    cache: KVCache,
    mesh: Mesh | AbstractMesh,
    *,
    batch: str | None = None,
    heads: str | None = None,
) -> KVCache:
    """Shardings of a cache whose batch rows, heads or both are spread over axes of a mesh.

        cache = jax.device_put(cache, cache_shardings(cache, mesh, batch="data", heads="model"))

    Neither rows nor heads meet in the cache or in attention. Arrays without such an axis are
    replicated. Axes of the mesh may be of type Auto or Explicit.

    Args:
        cache: a cache, or its `jax.eval_shape`.
        mesh: the devices.
        batch: name of the mesh axis that divides the batch; None leaves it together.
        heads: name of the mesh axis that divides the key-value heads; None leaves them together.

    Returns:
        A pytree of the cache's structure with a `NamedSharding` in place of each array.

    Raises:
        ValueError: the mesh has no such axis, or its size does not divide the heads or the batch.
        NotImplementedError: rows are divided, and a codec stores them together.
    """
    lay = cache.layout
    for name, axis, size in (("heads", heads, lay.heads), ("batch", batch, lay.batch)):
        if axis is not None and axis not in mesh.shape:
            raise ValueError(
                f"axis={axis!r} is not accepted: the mesh has {tuple(mesh.axis_names)}"
            )
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name}={size} do not divide over axis {axis!r} of size {mesh.shape[axis]}"
            )

    specs = axis_specs(cache, batch=batch, heads=heads)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def attend_by_heads(
    q_BTHD: Float[Array, "B T Hq D"],
    view: CacheView,
    k_BTHD: Float[Array, "B T H D"],
    v_BTHD: Float[Array, "B T H D"],
    *,
    axis: str,
    layer: int | Int[Array, ""] = 0,
    implementation: str | None = None,
    precision: str | None = None,
) -> Float[Array, "B T Hq D"]:
    """`attend`, by each device for the heads that it has.

    For programs under `jax.set_mesh` with automatic axes. What XLA cannot divide, the kernels, runs
    on each device as if it were alone; what it would divide anyhow stays without communication.

    Args:
        q_BTHD, k_BTHD, v_BTHD, view, layer, implementation, precision: as for `attend`.
        axis: name of the mesh axis that divides the heads.

    Raises:
        ValueError, NotImplementedError: as `attend` and `head_shardings`.
    """
    lay = view.cache.layout
    mesh = jax.sharding.get_abstract_mesh()
    cut = jax.tree.map(lambda s: s.spec, head_shardings(view.cache, mesh, axis))
    for name, spans in (("key", view.cache.span_k), ("value", view.cache.span_v)):
        together = [x.shape for x in jax.tree.leaves(spans) if x.shape[3] != lay.heads]
        if together:
            codec = getattr(lay, f"{name}_codec").name
            raise NotImplementedError(
                f"{name} codec {codec} keeps heads together, so none can be read alone; accepted: a "
                "codec that keeps them apart, such as trellis:across_heads=0"
            )
    apart, everywhere = jax.P(None, None, axis), jax.P()
    specs = jax.tree.map(lambda x: everywhere, view)
    specs = dataclasses.replace(specs, cache=cut)

    def local(q, view, k, v, layer):
        heads = view.cache.layout.heads // mesh.shape[axis]
        layout = dataclasses.replace(view.cache.layout, heads=heads)
        view = dataclasses.replace(view, cache=dataclasses.replace(view.cache, layout=layout))
        names = dict(implementation=implementation, precision=precision)
        return attend(q, view, k, v, layer=layer, **names)

    inputs = (apart, specs, apart, apart, everywhere)
    # The kernels do not say on which axes their results vary.
    run = jax.shard_map(local, in_specs=inputs, out_specs=apart, check_vma=False)
    return run(q_BTHD, view, k_BTHD, v_BTHD, jnp.asarray(layer, jnp.int32))


def by_tokens(attention: Callable[..., Array], plan: Plan | None) -> Callable[..., Array]:
    """The function attention(q, k, v), run by each device for the queries that it has.

    For attention to keys and values that every device has whole, such as a prompt's. Fused kernels refuse
    queries whose tokens XLA has divided.

    Args:
        attention: of q (B, T, H, D), k and v.
        plan: of the devices; None, or one that keeps tokens together, changes nothing.
    """
    if plan is None or not plan.split_tokens:
        return attention
    apart, everywhere = jax.P(None, plan.axis), jax.P()
    specs = dict(in_specs=(apart, everywhere, everywhere), out_specs=apart)
    return jax.shard_map(attention, mesh=plan.mesh, **specs, check_vma=False)
