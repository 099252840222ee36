"""Weights of a network that several devices run: whole on each of them, or the layers' in parts.

In parts, a device has 1 / n of each layer, and gathers a layer when it runs. So the weights take less memory
and cost an exchange a layer and pass.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding

from qvg_jax.cache.plan import Plan

__all__ = ["gathered", "weight_specs"]


def weight_specs(state: Any, plan: Plan) -> Any:
    """The pytree of a model's state with a `PartitionSpec` for each parameter.

    With `split_weights`, arrays of the stacked `blocks`, [L, ...], are divided along the last axis that the
    devices divide; everything else is whole on each device.

    Args:
        state: arrays or their shapes, the state of a module.
        plan: of the devices.
    """

    def place(path: Any, x: Any) -> jax.P:
        spec: list[str | None] = [None] * len(x.shape)
        if plan.split_weights and "blocks" in jax.tree_util.keystr(path[:1]):
            axes = [i for i in range(1, len(x.shape)) if not x.shape[i] % plan.devices]
            if axes:
                spec[axes[-1]] = plan.axis
        return jax.P(*spec)

    return jax.tree_util.tree_map_with_path(place, state)


def gathered(layer: Any, plan: Plan | None) -> Any:
    """The parameters of one layer, whole on each device of a plan: those that were divided are gathered."""
    if plan is None or not plan.split_weights:
        return layer
    return jax.lax.with_sharding_constraint(layer, NamedSharding(plan.mesh, jax.P()))
