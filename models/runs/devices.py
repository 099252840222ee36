"""Several devices for one run: the plan that a user asked for, processes that find each other, weights on all."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array

from models.runs.latent_options import LatentOptions
from qvg_jax.app.versions import versions
from qvg_jax.attention.spread import check_spread
from qvg_jax.cache.plan import Plan
from qvg_jax.cache.state import KVCache
from qvg_jax.errors import UserError

__all__ = [
    "check_blocks",
    "check_sharing",
    "check_versions",
    "join_processes",
    "on_all_devices",
    "plan_of",
    "shared_weight_bytes",
    "weight_placement",
    "whole_on_all",
]

FOLDERS_OF_A_PROCESS = ("process", "out", "weights", "image", "video", "lora")
LOST_AFTER = 30  # seconds without a sign of life, then a process counts as lost

log = logging.getLogger(__name__)


def plan_of(options: LatentOptions, accepted: Sequence[str]) -> Plan | None:
    """The plan by which the caches of a run are spread; None for one device.

    Args:
        options: of the user; tokens of a block stay apart between the layers.
        accepted: plans that the model serves, the best first.

    Raises:
        UserError: a plan that the model does not serve, one without devices, or more devices than there are.
    """
    count = jax.device_count() if options.devices is None and options.plan else options.devices
    if count is None or count == 1:
        return None
    if not accepted:
        raise UserError(f"--devices {count} is not accepted: this model runs on one device")
    name = options.plan or accepted[0]
    if name not in accepted:
        raise UserError(f"--plan {name} is not accepted by this model: give {', '.join(accepted)}")
    if count > jax.device_count():
        raise UserError(
            f"--devices {count} is not accepted: there are {jax.device_count()} devices"
        )
    return Plan(**{name: count}, split_tokens=True)


def check_sharing(share: bool, plan: Plan | None) -> None:
    """Raises UserError if weights are to be shared by one device."""
    if share and plan is None:
        raise UserError("--share-weights is for several devices; accepted: --devices N beside it")


def check_blocks(cache: KVCache, plan: Plan | None, tokens: Iterable[int]) -> None:
    """Raises UserError if blocks of so many tokens cannot attend to a cache by a plan, as `attend` would.

    Args:
        cache: the cache, or its shapes.
        plan: how it is spread; None is one device.
        tokens: of the blocks of a run.
    """
    if plan is None:
        return
    try:
        for count in tokens:
            check_spread(cache, plan, count)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"--devices {plan.devices}: {error}") from error


def join_processes(options: LatentOptions) -> None:
    """Makes one run of several processes, each with its own devices. Before JAX is used otherwise.

    Raises:
        UserError: `--processes` or `--process` is missing or out of range, or versions or options differ.
    """
    count, number = options.processes, options.process
    if options.coordinator is None:
        if count is not None or number is not None:
            raise UserError("--processes and --process need --coordinator HOST:PORT")
        return
    if count is None or number is None or not 0 <= number < count:
        raise UserError(
            f"--coordinator with --processes {count} and --process {number}: give the number of "
            "processes, and which of them this is, from 0 on"
        )
    jax.distributed.initialize(
        options.coordinator, count, number, heartbeat_timeout_seconds=LOST_AFTER
    )
    check_versions(versions())
    _check_options(options)
    log.info(
        f"process {number} of {count}: {jax.local_device_count()} of {jax.device_count()} devices"
    )


def check_versions(own: Any) -> None:
    """Raises UserError if another process of this run has other versions of what it runs.

    Args:
        own: versions of this process, as a value that `str` shows.
    """
    if differ := _differing(own):
        raise UserError(
            f"versions of process {', '.join(differ)} differ from those of process 0; this is process "
            f"{jax.process_index()} with {own}; install the same everywhere"
        )


def _check_options(options: LatentOptions) -> None:
    """Raises UserError if another process of this run was asked for something else; folders may differ."""
    own = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in FOLDERS_OF_A_PROCESS
    }
    if differ := _differing(sorted(own.items())):
        raise UserError(
            f"options of process {', '.join(differ)} differ from those of process 0; accepted: the same "
            "command everywhere, but for --process, --out and where files are"
        )


def _differing(own: Any) -> list[str]:
    """The processes of this run that have another value than process 0, compared as text."""
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(str(own).encode()).digest()[:8], np.uint32)
    all_digests = np.atleast_2d(multihost_utils.process_allgather(digest))
    return [str(i) for i, row in enumerate(all_digests) if (row != all_digests[0]).any()]


def whole_on_all(x: Array, plan: Plan | None) -> Array:
    """The array, complete on every device of a plan: for results that the host or a user looks at."""
    if plan is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(plan.mesh, jax.P()))


def on_all_devices[M: nnx.Module](model: M, plan: Plan | None, *, share: bool = False) -> M:
    """The model with its parameters on every device of a plan, or, with `share`, by `weight_placement`."""
    if (place := weight_placement(plan, share=share)) is None:
        return model
    graphdef, state = nnx.split(model)
    moved = [
        (path, v.replace(jax.device_put(v[...], place(".".join(map(str, path)), v.shape))))
        for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(moved))


def weight_placement(
    plan: Plan | None, *, share: bool = False
) -> Callable[[str, tuple[int, ...]], NamedSharding] | None:
    """Where a parameter goes, by its dotted path and shape; None for one device.

    Args:
        plan: of the devices.
        share: whether each device keeps a part of every layer's weights only; else all of them.
    """
    if plan is None:
        return None

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        at = _cut_axis(path, shape, plan.devices) if share else None
        spec = jax.P() if at is None else jax.P(*(None,) * at, plan.axis)
        return NamedSharding(plan.mesh, spec)

    return place


def shared_weight_bytes(model: nnx.Module, devices: int) -> int:
    """Bytes of weights on one of several devices that share them, and of one layer that is gathered.

    Args:
        model: with its layers stacked under `blocks`; shapes are enough.
        devices: their number.
    """
    total = layer = 0
    for path, v in nnx.to_flat_state(nnx.state(model)):
        size, at = v.size * v.dtype.itemsize, _cut_axis(".".join(map(str, path)), v.shape, devices)
        total += size if at is None else size // devices
        layer += 0 if at is None else size // v.shape[0]
    return total + layer


def _cut_axis(path: str, shape: tuple[int, ...], devices: int) -> int | None:
    """The axis of a parameter of stacked layers that devices divide, the longest; None for none."""
    fitting = [i for i in range(1, len(shape)) if not shape[i] % devices]
    if not path.startswith("blocks.") or not fitting:
        return None
    return max(fitting, key=lambda i: shape[i])
