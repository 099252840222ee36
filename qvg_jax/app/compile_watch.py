"""Whether XLA is compiling now, and for how long, from what JAX reports of itself."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

__all__ = ["watching_compiler"]

COMPILING = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def watching_compiler() -> Iterator[Callable[[], float | None]]:
    """Gives a function that says for how many seconds a program has been compiled, None while none is.

    A JAX that does not report the beginning of a compilation, as older ones, gives None always.
    """
    begun: list[float] = []

    def begins(event: str, value: float | int, **_: Any) -> None:
        if event == COMPILING:
            begun.append(time.monotonic())

    def ends(event: str, duration: float, **_: Any) -> None:
        if event == COMPILING and begun:
            begun.pop()

    def seconds() -> float | None:
        since = begun[:1]  # another thread may end it between a test and a reading
        return time.monotonic() - since[0] if since else None

    jax.monitoring.register_scalar_listener(begins)
    jax.monitoring.register_event_duration_secs_listener(ends)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_scalar_listener(begins)
        jax.monitoring.unregister_event_duration_listener(ends)
