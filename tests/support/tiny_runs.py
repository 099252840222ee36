"""Tiny runs of every model that makes videos, in processes that a test may kill.

A server that has imported the models, but has not started JAX, forks them: a process costs the
run alone, not the seconds of the imports.
"""

import dataclasses
import json
import locale
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from models.common.weights import Weights
from models.longcat import job as longcat_job
from models.self_forcing import job as self_forcing_job
from models.worldplay import job as worldplay_job
from qvg_jax.app import cli
from qvg_jax.app.saved_blocks import CHECKSUM_BYTES
from tests.support import tiny_longcat, tiny_self_forcing, tiny_world, tiny_worldplay

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__, "models.pocket_world.job", "qvg_jax.app.generate"])
LONGEST = 300.0  # seconds that a process may take on a busy machine


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """A command line, what makes its model tiny in the process that runs it, and what to ignore."""

    argv: Callable[[Path], Sequence[str]]  # of a folder for the input
    setup: Callable[[], None] = lambda: None
    unlike: tuple[str, ...] = (
        "report.png",
        "report.html",
    )  # files with timings: seconds of each block


def _shrink(job, sizes: Callable) -> None:
    job.released_sizes = sizes
    Weights.random = tiny_worldplay.drawn


def _world(folder: Path) -> list[str]:
    weights = folder / "smoke.safetensors"
    if not weights.exists():
        tiny_world.random_weights(folder)
    sizes = [f"--tour={tiny_world.TOUR}", "--frames=34"]
    return ["pocket-world", "--codec=qvg", f"--weights={weights}", *sizes]


def _latent(model: str, tiny, *more: str) -> list[str]:
    size = [f"--height={tiny.HEIGHT}", f"--width={tiny.WIDTH}"]
    common = ["--seed=3", "--weights=random", "--prompt=a café", f"--codec={tiny.CODEC}"]
    return [model, *common, *size, *more]


def _walk(folder: Path) -> list[str]:
    picture = folder / "room.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    return _latent("worldplay", tiny_worldplay, f"--image={picture}", "--actions=w-4,right-3,s-4")


RUNS = {
    "pocket-world": TinyRun(_world, unlike=("report.html",)),  # frames a second, and the command
    "self-forcing": TinyRun(
        lambda _: _latent("self-forcing", tiny_self_forcing, "--frames=30"),
        lambda: _shrink(self_forcing_job, tiny_self_forcing.sizes),
    ),
    "longcat": TinyRun(
        lambda _: _latent("longcat", tiny_longcat, "--frames=34", "--steps=2"),
        lambda: _shrink(longcat_job, tiny_longcat.sizes),
    ),
    "worldplay": TinyRun(_walk, lambda: _shrink(worldplay_job, tiny_worldplay.sizes)),
}


def _child(model: str, argv: Sequence[str], log: Path, folder: Path, odd: bool) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder / "user-cache")
    if odd:
        _strange_place()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    RUNS[model].setup()
    sys.exit(cli.main(argv))


def _strange_place() -> None:
    """Another time zone, and a clock that stands decades back and runs backwards."""
    os.environ["TZ"] = "Pacific/Kiritimati"
    time.tzset()
    begin, now = time.time(), time.time
    time.time = lambda: 1e9 - (now() - begin)
    locale.setlocale(locale.LC_ALL, "C")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its code, negative for a signal's number, and all that it said."""

    code: int
    said: str


class Runner:
    """Runs a tiny model again and again.

    Args:
        model: a name in `RUNS`.
        folder: where its input, its output and its compiled programs go.
    """

    def __init__(self, model: str, folder: Path):
        self.model, self.folder = model, folder
        self._argv = ["generate", *RUNS[model].argv(folder), "--compare=bf16"]

    def run(
        self,
        out: Path,
        *argv: str,
        until: Callable[[], bool] | None = None,
        number: int = signal.SIGKILL,
        odd: bool = False,
    ) -> Ended:
        """The command in a process of its own; it gets a signal once `until` says so.

        Args:
            out: folder of the output.
            argv: further words of the command line.
            until: when to send the signal; the process runs to its end if left out.
            number: the signal.
            odd: whether it runs with another clock, time zone and locale.
        """
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        words = [*self._argv, f"--out={out}", *argv]
        process = CONTEXT.Process(target=_child, args=(self.model, words, log, self.folder, odd))
        process.start()
        end = time.monotonic() + LONGEST
        while process.exitcode is None and time.monotonic() < end:
            if log.exists() and until is not None and until():
                os.kill(process.pid, number)
                break
            process.join(0.01)
        process.join(LONGEST)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words} ran on for {LONGEST:.0f} s: {log.read_text()}")
        return Ended(process.exitcode, log.read_text(errors="replace"))

    def timeline(self, out: Path) -> list[float]:
        """Seconds after which an undisturbed run had stored so many blocks, and those to its end."""
        times, begin = [], time.monotonic()

        def look() -> bool:
            times.extend([time.monotonic() - begin] * (stored(out) - len(times)))
            return False

        ended = self.run(out, until=look)
        assert ended.code == 0, ended.said
        return [*times, time.monotonic() - begin]

    def products(self, out: Path) -> dict[str, object]:
        """All that a run leaves but its timings, by name."""
        unlike = (".lock", *RUNS[self.model].unlike)
        files = [p for p in out.rglob("*") if p.is_file() and p.name not in unlike]
        left: dict[str, object] = {str(p.relative_to(out)): p.read_bytes() for p in files}
        report = json.loads((out / "report.json").read_text())
        assert report.pop("timings")["total_seconds"] > 0
        return left | {"report.json": report}


def stored(out: Path) -> int:
    """Blocks of a run that are on the disk, of all arms together."""
    sizes = 0
    for file in out.glob("*/*.sums"):
        try:
            sizes += file.stat().st_size // CHECKSUM_BYTES
        except FileNotFoundError:  # the run has just ended
            continue
    return sizes


def at(point: float, times: Sequence[float], out: Path) -> Callable[[], bool]:
    """Whether a run has come to a point: so many blocks are stored, and part of the next is made.

    A busy machine makes seconds long, so blocks are counted; only after the last one that was
    stored before the point the seconds of an undisturbed run are waited for.

    Args:
        point: blocks, from 0, the start, to `len(times)`, the end of the process.
        times: the `Runner.timeline` of an undisturbed run.
        out: folder of the run that is watched.
    """
    *begins, end = times
    blocks = min(int(point), len(begins))
    if blocks == 0:
        longest = begins[0]
    elif blocks == len(begins):
        longest = end - begins[-1]
    else:  # not that block's own time, which may be the compiler's
        longest = float(np.median(np.diff(begins)))
    after = (point - blocks) * longest
    reached: list[float] = []

    def come() -> bool:
        if not reached and stored(out) >= blocks:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() - reached[0] >= after

    return come


def playable_frames(video: Path) -> int:
    """Frames of a video that a player shows."""
    with av.open(str(video)) as file:
        return sum(1 for _ in file.decode(video=0))


def said_frames(said: str) -> int | None:
    """Frames that the last message of an interrupted command promises."""
    found = re.search(r"has the (\d+) frames so far", said)
    return int(found[1]) if found else None
