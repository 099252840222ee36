"""Which GPU computations go to, and whether kernels may be called on an array."""

import jax
from jaxtyping import Array

__all__ = ["is_hopper", "on_several_devices"]


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
