"""Calls that run beside the main thread: files are written while the device computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

__all__ = ["Background"]


class Background:
    """Runs calls one after another in a thread of their own; at most one is under way.

        with Background() as later:
            for item in items:
                later(write, item)      # returns at once, or when the call before it is done

    What a call raises comes out of the next one, or of the end of the block.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(1)
        self._running: Future | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> None:
        """Waits for the call before, then starts this one."""
        self.wait()
        self._running = self._pool.submit(function, *args)

    def wait(self) -> None:
        """Waits for the call that is under way, and raises what it raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True)
