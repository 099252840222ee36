"""Memory needs of runs on several devices: a line for each plan by which the devices can share a cache."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence

import jax

from models.runs.devices import check_blocks
from qvg_jax.app.memory_plan import Need
from qvg_jax.cache.devices import share_bytes
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.plan import Plan

__all__ = ["LeftOut", "needs_on_devices"]

log = logging.getLogger(__name__)


class LeftOut:
    """The plans that cannot be, by reason: one warning says all of them."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, name: str, why: Exception) -> None:
        """Notes a plan and why it cannot be."""
        self._names.setdefault(str(why).removesuffix("."), []).append(name)

    def say(self) -> None:
        """Warns of what was noted, if anything was."""
        if self._names:
            parts = (f"{' and '.join(names)} ({why})" for why, names in self._names.items())
            log.warning(f"left out: {'; '.join(parts)}")


def needs_on_devices(
    need: Need,
    cache: KVCache,
    count: int,
    *,
    axes: Sequence[str],
    tokens: Iterable[int],
    longest: Callable[[Callable[[KVCache], int]], int],
    left_out: LeftOut,
    seconds: Callable[[Plan], float | None] = lambda plan: None,
    weights: int | None = None,
) -> list[Need]:
    """The needs of one of several devices under each plan that divides a cache and that attention serves.

    Temporaries are those of one device, which are the largest.

    Args:
        need: of one device alone.
        cache: its cache, shapes only.
        count: of devices; 1 gives no needs.
        axes: plans of the model.
        tokens: of its blocks.
        longest: `longest(share)` is the most latent frames that fit, where `share(cache)` are the bytes that
            a device has of a cache.
        left_out: is told of plans that cannot be.
        seconds: what is predicted for a block under a plan.
        weights: bytes of the transformer on each device; None is all of it.
    """
    found = []
    if weights is not None:
        need = dataclasses.replace(need, held=need.held | {"transformer": weights})
    for axis in axes if count > 1 else ():
        plan = Plan(**{axis: count}, split_tokens=True)  # type: ignore[arg-type]

        def share(cache: KVCache, plan: Plan = plan) -> int:
            return share_bytes(_divisible(cache, plan), plan)

        name = f"{need.name}, {axis} over {count}"
        try:
            held = need.held | {"cache": share(cache)}
            check_blocks(cache, plan, tokens)
        except (ValueError, NotImplementedError) as error:
            left_out.add(name, error)
            continue
        changed = dict(name=name, held=held, longest=longest(share), seconds=seconds(plan))
        found.append(dataclasses.replace(need, **changed))
    return found


def _divisible(cache: KVCache, plan: Plan) -> KVCache:
    """The shapes of a cache with as many more slots as the devices need to divide them."""
    lay = cache.layout
    if plan.part is None or not lay.max_spans % plan.devices:
        return cache
    slots = -(-lay.max_spans // plan.devices) * plan.devices

    def longer(axis: int):
        return lambda x: jax.ShapeDtypeStruct(
            (*x.shape[:axis], slots, *x.shape[axis + 1 :]), x.dtype
        )

    fields = {f"span_{side}": 1 for side in ("k", "v")}
    fields |= {f"span_{name}": 0 for name in ("pos", "valid", "table")}
    changed = {name: jax.tree.map(longer(n), getattr(cache, name)) for name, n in fields.items()}
    return dataclasses.replace(cache, **changed, layout=dataclasses.replace(lay, max_spans=slots))
