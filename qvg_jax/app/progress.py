"""Progress of a run: bars on a terminal, lines elsewhere, and never more than five seconds of silence.

Compiling a step takes longer than making many frames with it, so a clock runs beside the work and says
what is being done. This module imports no JAX, as its first words come before JAX is there.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

from tqdm import tqdm

if TYPE_CHECKING:
    from qvg_jax.app.job import Job, Made

__all__ = ["EVERY", "Progress", "saying", "ticking"]

EVERY = 5.0  # seconds between lines
REDRAWN = 1.0  # seconds between two looks of a bar that does not move


@contextlib.contextmanager
def ticking(tick: Callable[[float], None], every: float) -> Iterator[None]:
    """Calls `tick(seconds)` in a thread while the body runs, with the seconds since it began.

    XLA compiles without holding Python's lock, so the thread runs meanwhile.
    """
    over, begin = threading.Event(), time.monotonic()

    def run() -> None:
        while not over.wait(every):
            with contextlib.suppress(OSError, ValueError):  # nobody reads the output any more
                tick(time.monotonic() - begin)

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
    """Prints what the body does: at once, and again with the time so far as long as it runs."""
    print(what, flush=True)
    with ticking(lambda seconds: print(f"{what}, {seconds:.0f} s", flush=True), EVERY):
        yield


class Progress:
    """Progress of a job's arms: a bar for each on a terminal, else a line every `EVERY` seconds.

    `compiling()` says for how many seconds a program is being compiled, None while none is.

    with Progress(job) as progress:
        ...  # progress.begins(arm) before each block of each arm, progress.update(made) after all
    """

    def __init__(self, job: "Job", compiling: Callable[[], float | None] = lambda: None):
        self._compiling = compiling
        self._total = job.tour + job.frames
        self._first = (
            "compiling the step" if job.play is None else "loading and compiling the first block"
        )
        self._arm, self._since, self._done = "", time.monotonic(), 0
        self._speeds = ""
        self._width = max(len(arm.name) for arm in job.arms)
        self._bars: dict[str, tqdm] = {}
        if sys.stderr.isatty():
            self._bars = {arm.name: self._bar(arm.name, i) for i, arm in enumerate(job.arms)}
        self._clock = contextlib.ExitStack()

    def _bar(self, name: str, position: int) -> tqdm:
        form = (
            "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        )
        return tqdm(
            desc=name.ljust(self._width),
            total=self._total,
            position=position,
            file=sys.stderr,
            bar_format=form,
            dynamic_ncols=True,
            mininterval=0.2,
        )

    def begins(self, arm: str) -> None:
        """Notes that an arm begins with its next block."""
        self._arm, self._since = arm, time.monotonic()

    def update(self, made: "Made") -> None:
        """Notes that all arms have made a block."""
        self._done = made.first + made.count
        speeds = []
        for name, size in made.bytes.items():
            speed = f"{made.count / made.seconds[name]:.1f} frames/s"
            cache = f"cache MB: bf16 {size.bf16 / 1e6:.1f} | {size.in_use.total / 1e6:.1f}"
            speeds.append(f"{name} {speed}, {size.in_use.total / 1e6:.1f} MB")
            if name in self._bars:
                self._bars[name].set_postfix_str(f"{speed}, {cache}", refresh=False)
                self._bars[name].update(made.count)
        self._speeds = "; ".join(speeds)

    def line(self) -> str:
        """What is being done now, and how far the run is."""
        seconds = time.monotonic() - self._since
        if not self._arm:
            return f"preparing the first block, {seconds:.0f} s"
        spent = self._compiling()
        if not self._done and spent is not None:
            return f"compiling the step of {self._arm}, {spent:.0f} s"
        if not self._done:
            return f"{self._first} of {self._arm}, {seconds:.0f} s"
        far = f"{self._done} of {self._total} frames: {self._speeds}"
        if self._done >= self._total:
            return f"{far}; writing the report"
        if spent is not None and spent >= EVERY:
            return f"{far}; compiling for {self._arm}, {spent:.0f} s"
        return far if seconds < EVERY else f"{far}; next block of {self._arm}, {seconds:.0f} s"

    def _tick(self, _: float) -> None:
        if not self._bars:
            print(self.line(), flush=True)
            return
        if not self._done:
            bar = self._bars.get(self._arm, next(iter(self._bars.values())))
            bar.set_postfix_str(self.line(), refresh=False)
        for bar in self._bars.values():
            bar.refresh()

    def __enter__(self) -> Self:
        self._clock.enter_context(ticking(self._tick, REDRAWN if self._bars else EVERY))
        return self

    def __exit__(self, *error: object) -> None:
        self._clock.close()
        for bar in self._bars.values():
            bar.refresh()
            bar.close()
