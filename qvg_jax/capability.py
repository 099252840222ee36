"""What the GPU of a computation can do, where that is not Hopper's own."""

import jax

__all__ = ["capability", "no_triton", "processors"]


def _gpu() -> jax.Device | None:
    device = jax.config.jax_default_device or jax.devices()[0]
    return None if isinstance(device, str) or device.platform != "gpu" else device


def capability() -> tuple[int, ...] | None:
    """Compute capability of the NVIDIA GPU that computations go to, (8, 6) say, or None."""
    numbers = str(getattr(_gpu(), "compute_capability", "")).split(".")
    return tuple(map(int, numbers)) if all(n.isdigit() for n in numbers) else None


def no_triton() -> str | None:
    """Why Triton kernels cannot be called here, or None if they can."""
    if (capability() or (0,))[0] < 8:
        device = jax.devices()[0]
        found = f"{device.platform} {getattr(device, 'compute_capability', '')}".strip()
        return f"the default device is {found}; it must be a GPU of compute capability 8.0 or more"
    from pallas_kernels.gpu.triton_launch import missing

    return missing()


def processors() -> int:
    """Multiprocessors of that GPU; those of an H100 where it is not known."""
    return getattr(_gpu(), "core_count", None) or 132
