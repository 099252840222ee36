"""Signals that ask a run to end: Ctrl-C, and what schedulers and closing terminals send."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interruption"]

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Interruption:
    """Remembers SIGINT, SIGTERM and SIGHUP instead of ending anywhere, so that no file is torn.

        with Interruption() as stop:
            for block in blocks:
                if stop.signal is not None:
                    ...

    The second signal raises KeyboardInterrupt at once. A signal that the process ignores, such as
    SIGHUP under nohup, stays ignored. In other threads than the main one nothing changes: there
    Python delivers no signals.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
