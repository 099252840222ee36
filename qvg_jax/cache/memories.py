"""Memories that spans are kept in: the host's, pinned where the device knows that, or the device's own."""

import functools
from pathlib import Path

import jax

__all__ = ["check_room", "in_memory"]

HOST = ("pinned_host", "unpinned_host")  # memories of the host as JAX names them, the faster first


def check_room(spans: int, each: int, memory: str) -> None:
    """Raises ValueError if a memory does not hold so many spans of so many bytes."""
    free = _free_bytes(memory)
    if free is not None and spans * each > free:
        raise ValueError(
            f"spans={spans} of {each / 1e6:.3g} MB take {spans * each / 1e9:.3g} GB of the {memory}'s "
            f"memory, of which {free / 1e9:.3g} GB are free; accepted: at most {free // each} spans, a "
            "codec of fewer bits, or shorter spans"
        )


def _free_bytes(memory: str) -> int | None:
    """Free bytes of the host's or the device's memory; None where nobody says."""
    if memory == "device":
        stats = getattr(jax.local_devices()[0], "memory_stats", lambda: None)() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def in_memory[T](tree: T, memory: str) -> T:
    """The arrays of a tree in a memory, or on their way there."""
    return jax.device_put(tree, _sharding(memory))


@functools.cache
def _sharding(memory: str) -> jax.sharding.Sharding:
    device = jax.local_devices()[0]
    kind = device.default_memory().kind
    if memory == "host":
        there = {m.kind for m in device.addressable_memories()}
        kind = next((name for name in HOST if name in there), kind)
    return jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
