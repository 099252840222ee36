"""Which GPU computations go to, and whether kernels may be called on an array."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

__all__ = ["is_hopper", "on_several_devices", "row_major"]


def is_hopper() -> bool:
    """Whether computations go to a GPU of compute capability 9."""
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        return False
    return device.platform == "gpu" and str(device.compute_capability).startswith("9.")


def on_several_devices(x: Array) -> str | None:
    """Why kernels cannot be called on x, which is spread over devices; None if it is not."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.are_all_axes_manual:
        return None
    return "arrays on several devices; inside of shard_map they can be read"


def row_major(x: Array) -> Array:
    """x, whose last axis must be the innermost one in memory; inside of jit.

    For what is written into a large buffer. XLA lets the buffer take the layout of the write, and
    where that is transposed it transposes the whole buffer, before and after: for a GPU that was
    two more copies of a cache of 7.5 GB.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
