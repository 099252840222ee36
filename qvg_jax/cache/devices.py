"""A cache on several devices: where its arrays lie, and functions that each device runs on its own part.

The spans of a plan go around: span j of the ring of slots lies on device j mod n. So the arrays hold slots in
another order than on one device, device by device; `spread` takes a cache from one plan to another.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array

from qvg_jax.cache.layout import Layout
from qvg_jax.cache.plan import Part, Plan, fits_memory
from qvg_jax.cache.slots import batch_leaves
from qvg_jax.errors import wrong_kind

if TYPE_CHECKING:
    from qvg_jax.cache.state import KVCache

__all__ = [
    "axis_specs",
    "cache_specs",
    "create_on",
    "in_order_of",
    "on_each_device",
    "own_part",
    "own_spans",
    "plan_shardings",
    "share_bytes",
    "span_tables_of",
    "spread",
    "whole_span",
]

OF_TOKENS = ("pos", "valid", "table")
OF_HEADS = ("dense_k", "dense_v", "near_k", "near_v")


def axis_specs(
    cache: "KVCache", *, batch: str | None = None, heads: str | None = None
) -> "KVCache":
    """The pytree of a cache with a `PartitionSpec` for each array that divides its batch rows or heads.

    Arrays without such an axis are on every device.

    Args:
        cache: a cache, or its `jax.eval_shape`.
        batch, heads: names of the mesh axes that divide them; None leaves them together.

    Raises:
        NotImplementedError: rows are divided, and a codec stores them together; or heads are, and not all
            of them have a history.
    """
    lay = cache.layout
    if heads is not None and lay.history is not None:
        raise NotImplementedError(
            f"axis {heads!r} of heads: the cache has a {lay.history}, so layers differ in the heads "
            "that they store; accepted: heads=None, or a cache whose heads all have a history"
        )

    def placed(*spec: str | None) -> Any:
        return jax.P(*spec) if any(spec) else jax.P()

    def of_codec(leading: int, tree: Any, rows: Any) -> Any:
        # Codecs keep (B, H) in front of what they store for each head.
        def of(x: Any, has_rows: bool) -> Any:
            apart = x.shape[leading : leading + 2] == (lay.batch, lay.heads)
            return placed(*(None,) * leading, batch if has_rows else None, heads if apart else None)

        return jax.tree.map(of, tree, rows)

    specs = jax.tree.map(lambda x: placed(), cache)
    fields = {
        name: jax.tree.map(lambda _: placed(None, batch, heads), getattr(cache, name))
        for name in OF_HEADS
    }
    fields["near_pos"] = jax.tree.map(lambda _: placed(batch), cache.near_pos)
    for side, codec in (("k", lay.key_codec), ("v", lay.value_codec)):
        trees = [getattr(cache, f"{name}_{side}") for name in ("span", "state")]
        rows = [jax.tree.map(lambda _: False, tree) for tree in trees]
        if batch is not None and lay.max_spans:
            rows = batch_leaves(lay, codec, cache.dense_k.dtype)
        fields[f"span_{side}"] = of_codec(2, trees[0], rows[0])
        fields[f"state_{side}"] = of_codec(1, trees[1], rows[1])
    for name in OF_TOKENS:
        for region, leading in (("dense", ()), ("span", (None,))):
            tree = getattr(cache, f"{region}_{name}")
            field = jax.tree.map(lambda _, leading=leading: placed(*leading, batch), tree)
            fields[f"{region}_{name}"] = field
    return dataclasses.replace(specs, **fields)


def cache_specs(cache: "KVCache", plan: Plan) -> "KVCache":
    """The pytree of a cache with a `PartitionSpec` in place of each array.

    Args:
        cache: a cache, or its `jax.eval_shape`.
        plan: how it is spread.
    """
    if plan.part is None:
        return axis_specs(cache, heads=plan.axis)
    everywhere = jax.tree.map(lambda x: jax.P(), cache)

    def at(name: str, *spec: str | None) -> Any:
        return jax.tree.map(lambda x: jax.P(*spec), getattr(cache, name))

    axis = plan.axis
    fields = {f"span_{side}": at(f"span_{side}", None, axis) for side in ("k", "v")}
    fields |= {f"span_{name}": at(f"span_{name}", axis) for name in OF_TOKENS}
    if plan.part.splits_blocks:
        fields |= {name: at(name, *(None,) * 3, axis) for name in OF_HEADS}
        fields["near_pos"] = at("near_pos", None, axis)
        fields |= {f"dense_{name}": at(f"dense_{name}", None, axis) for name in OF_TOKENS}
    return dataclasses.replace(everywhere, **fields)


def plan_shardings(
    cache: "KVCache", plan: Plan, mesh: Mesh | AbstractMesh | None = None
) -> "KVCache":
    """The pytree of a cache with a `NamedSharding` in place of each array; by default on the plan's mesh."""
    mesh = plan.mesh if mesh is None else mesh
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs(cache, plan))


def share_bytes(cache: "KVCache", plan: Plan) -> int:
    """The bytes that one device has of a cache, or of its shapes, under a plan; no device is asked.

    Raises:
        ValueError, NotImplementedError: the plan does not divide the cache.
    """
    plan.check(cache.layout)
    pairs = zip(jax.tree.leaves(cache), jax.tree.leaves(cache_specs(cache, plan)), strict=True)
    sizes = ((x.size * x.dtype.itemsize, plan.axis in spec) for x, spec in pairs)
    return sum(size // plan.devices if divided else size for size, divided in sizes)


def own_part(lay: Layout) -> Layout:
    """The layout of the arrays that one device has of a cache spread by spans."""
    part = lay.plan.part
    shares = part.devices if part.splits_blocks else 1
    return dataclasses.replace(
        lay,
        plan=None,
        part=part,
        max_spans=lay.max_spans // part.devices,
        block_tokens=lay.block_tokens // shares,
    )


def on_each_device(
    f: Callable[..., "KVCache"],
    cache: "KVCache",
    *args: Any,
    specs: tuple[Any, ...] = (),
    by_head: bool = False,
) -> "KVCache":
    """The cache f(cache, *args), computed by each device on its own part; plainly f without a plan.

    Args:
        f: `cache -> cache`. It is given this device's arrays with the counters of the whole cache, and a
            layout whose `part` is set. Under a plan of heads it is given the whole cache, and XLA
            divides what it computes.
        cache: the cache.
        args, specs: further arguments, and the `PartitionSpec` of each.
        by_head: whether f treats each head by itself. Then it is given this device's heads under a plan
            of heads, too, where it may call kernels.
    """
    lay = cache.layout
    if lay.plan is None:
        return f(cache, *args)
    if lay.plan.part is None and not by_head:
        return lax.with_sharding_constraint(f(cache, *args), plan_shardings(cache, lay.plan))
    cut = cache_specs(cache, lay.plan)

    def here(cache: "KVCache", *args: Any) -> "KVCache":
        if lay.plan.part is None:
            layout = dataclasses.replace(lay, plan=None, heads=lay.heads // lay.plan.devices)
        else:
            layout = own_part(lay)
        own = dataclasses.replace(cache, layout=layout)
        return dataclasses.replace(f(own, *args), layout=lay)

    names = dict(mesh=lay.plan.mesh, in_specs=(cut, *specs), out_specs=cut)
    # Codecs' kernels do not say on which axes their results vary.
    return jax.shard_map(here, **names, check_vma=False)(cache, *args)


def own_spans(cache: "KVCache", turns: Array | int = 0) -> "KVCache":
    """One device's cache with the counters of the spans that it has, in place of those of all devices.

    Args:
        cache: this device's arrays, as `on_each_device` gives them.
        turns: for spans that have come around from the device so many places before this one.
    """
    lay, part = cache.layout, cache.layout.part
    if not lay.max_spans:
        return cache
    n, slots = part.devices, lay.max_spans * part.devices
    device = (lax.axis_index(part.axis) - turns) % n
    skipped = (device - cache.first_span) % n  # spans older than the oldest one of this device
    count = jnp.maximum(0, (cache.num_spans - skipped + n - 1) // n)
    first = (cache.first_span + skipped) % slots // n
    return dataclasses.replace(cache, first_span=first, num_spans=count)


def span_tables_of(cache: "KVCache", make: Callable[["KVCache"], Any]) -> Any:
    """The rope tables make(cache) of all slots, leaves [N, ...], made by each device for its own spans.

    None for a ring, where tables are made when spans come around.
    """
    plan = cache.layout.plan
    if plan is None or plan.part is None:
        return make(cache)
    if not plan.part.splits_blocks:
        return None

    def here(cache: "KVCache") -> Any:
        return make(own_spans(dataclasses.replace(cache, layout=own_part(cache.layout))))

    names = dict(mesh=plan.mesh, in_specs=(cache_specs(cache, plan),), out_specs=jax.P(plan.axis))
    return jax.shard_map(here, **names, check_vma=False)(cache)


def whole_span(lay: Layout, x: Array, axis: int) -> Array:
    """All tokens of a span, of which each device may have a part of each block along an axis."""
    if lay.part is None or not lay.part.splits_blocks:
        return x
    form = (*x.shape[:axis], lay.span_blocks, lay.block_tokens, *x.shape[axis + 1 :])
    whole = lax.all_gather(x.reshape(form), lay.part.axis, axis=axis + 1)
    return whole.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def spread(cache: "KVCache", plan: Plan | None) -> "KVCache":
    """The same cache by another plan; bytes move, and no value changes.

    Outside jit.

    Args:
        cache: a cache by any plan, or on one device.
        plan: the plan; None puts the cache on the first device.

    Raises:
        TypeError: the cache or the plan is none.
        ValueError, NotImplementedError: as `KVCache.create`.
    """
    if not isinstance(getattr(cache, "layout", None), Layout):
        raise wrong_kind("cache", cache, "a KVCache, as KVCache.create makes it")
    if plan is not None and not isinstance(plan, Plan):
        raise wrong_kind("plan", plan, "a Plan, such as Plan(spans=2), or None for one device")
    old, new = cache.layout.plan, None if plan is None or plan.devices == 1 else plan
    if new is not None:
        new.check(cache.layout)
    layout = dataclasses.replace(cache.layout, plan=new)
    cache = in_order_of(dataclasses.replace(cache, layout=layout), old)
    return jax.device_put(cache, jax.devices()[0]) if new is None else cache


def in_order_of(cache: "KVCache", old: Plan | None) -> "KVCache":
    """A cache whose arrays lie in the order of another plan, brought into that of its own.

    Args:
        cache: the cache, with its own plan in the layout.
        old: the plan by which its arrays lie; None is one device.
    """
    new, fields, lay = cache.layout.plan, {}, cache.layout
    blocks = dict(dense=lay.dense_blocks, near=lay.near_blocks, span=None)
    if (None if old is None else old.part) == (None if new is None else new.part):
        return cache if new is None else jax.device_put(cache, plan_shardings(cache, new))
    for name, axis in _orders(cache):
        order = axis, blocks[name.partition("_")[0]]
        fields[name] = jax.tree.map(
            lambda x, order=order: _reorder(x, *order, old, new), getattr(cache, name)
        )
    cache = dataclasses.replace(cache, **fields)
    return cache if new is None else jax.device_put(cache, plan_shardings(cache, new))


def _orders(cache: "KVCache") -> list[tuple[str, int]]:
    """The fields whose order depends on the plan, and the axis along which it does."""
    spans = [("span_k", 1), ("span_v", 1), *((f"span_{name}", 0) for name in OF_TOKENS)]
    of_tokens = (*(f"dense_{name}" for name in OF_TOKENS), "near_pos")
    dense = [*((name, 3) for name in OF_HEADS), *((name, 1) for name in of_tokens)]
    return (spans if cache.layout.max_spans else []) + dense


def _reorder(x: Array, axis: int, blocks: int | None, old: Plan | None, new: Plan | None) -> Array:
    """An array whose slots (`blocks` None) or tokens lie in the order of another plan."""

    def part_of(plan: Plan | None) -> Part | None:
        part = None if plan is None else plan.part
        return part if part is not None and (blocks is None or part.splits_blocks) else None

    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if (part := part_of(old)) is not None:  # device, slot of it -> slot, device
        n = part.devices
        form = (n, -1) if blocks is None else (n, blocks, x.shape[axis] // n // blocks)
        x = jnp.swapaxes(x.reshape(*before, *form, *after), axis, axis + 1)
        x = x.reshape(*before, -1, *after)
    if (part := part_of(new)) is not None:
        n = part.devices
        form = (-1, n) if blocks is None else (blocks, n, x.shape[axis] // n // blocks)
        x = jnp.swapaxes(x.reshape(*before, *form, *after), axis, axis + 1)
        x = x.reshape(*before, -1, *after)
    return x


def create_on(plan: Plan, make: Callable[[], "KVCache"]) -> "KVCache":
    """An empty cache whose arrays are made on the devices of a plan, each its own part.

    Raises:
        ValueError, NotImplementedError: the plan does not fit the cache or the devices' memory.
    """
    shapes = jax.eval_shape(make)
    plan.check(shapes.layout)
    stats = getattr(jax.local_devices()[0], "memory_stats", lambda: None)() or {}
    fits_memory(plan, share_bytes(shapes, plan), stats.get("bytes_limit"))
    return jax.jit(make, out_shardings=plan_shardings(shapes, plan))()
