"""The main job, whatever the model: run all arms, write video.mp4, report.json and report.png."""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import UInt8

from qvg_jax.app.background import Background
from qvg_jax.app.figure import write_figure
from qvg_jax.app.job import Job, Made, lockstep
from qvg_jax.app.metrics import METRICS, Metric
from qvg_jax.app.panels import Panel, Sheet
from qvg_jax.app.report import SEEN, Record, write_json
from qvg_jax.app.video import Mp4
from qvg_jax.cache.health import CacheFullError, NonFiniteError
from qvg_jax.files import writable_folder

__all__ = ["Outcome", "generate"]


class Outcome(NamedTuple):
    """The result of a run: the video, its frames, the report."""

    video: Path
    frames: int  # in the video
    report: dict[str, Any] | None  # None if Ctrl-C came first


def generate(
    job: Job,
    out: str | Path,
    *,
    fps: int | None = None,
    growing: bool = False,
    progress: Callable[[Made], None] | None = None,
    metrics: Sequence[Metric] = METRICS,
) -> Outcome:
    """Makes the frames of all arms and writes what came of it.

    `out` gets video.mp4 (the frames of a single arm as they are, several and the truth side by
    side), report.json and report.png; the last two appear whole or not at all. The video grows
    with the run: Ctrl-C and errors leave it with the frames so far. Frames are drawn, scored and
    written in a thread of their own while the device makes the next block.

    Args:
        job: what to make.
        out: folder; made if missing.
        fps: frames a second of the video; None is the job's.
        growing: whether video.mp4 can be played while the run goes on, see `Mp4`.
        progress: called with each block after all arms have made it.
        metrics: what compares the frames of an arm with those of bf16 and with the truth.

    Returns:
        The outcome; one without a report if Ctrl-C came after the first frame.

    Raises:
        ValueError: `fps` is not accepted.
        NonFiniteError, CacheFullError: with the name of the arm and what the video has.
        OSError: `out` or a file in it could not be written; the files before it stay.
        KeyboardInterrupt: before there was a frame.
    """
    begin = time.perf_counter()
    fps = job.fps if fps is None else fps
    video = Mp4(Path(out) / "video.mp4", fps, growing=growing)
    out = writable_folder(out)
    record = Record(job, metrics)
    draw = _drawing(job)

    def write(made: Made) -> None:
        for i in range(made.count):
            video.add(draw(made, i))
        record.add(made)

    try:
        with _CtrlC() as ctrl_c, video, Background() as later:
            total = job.tour + job.frames
            for made in lockstep(job):
                later.wait()  # for the block before, in the middle of which it may come
                if ctrl_c.pressed and made.first < total:
                    raise KeyboardInterrupt
                later(write, made)
                if progress is not None:
                    progress(made)
                if ctrl_c.pressed and made.first + made.count < total:
                    raise KeyboardInterrupt
        report = record.report(fps=fps)
        write_figure(out / "report.png", report, record.strip)
        report["timings"]["total_seconds"] = round(time.perf_counter() - begin, 3)
        write_json(out / "report.json", report)
    except (NonFiniteError, CacheFullError) as error:
        kept = f"{video.path} has the {video.frames} frames before it" if video.frames else ""
        raise type(error)("; ".join(filter(None, (str(error), kept)))) from error
    except KeyboardInterrupt:
        if not video.frames:
            raise
        return Outcome(video.path, video.frames, None)
    return Outcome(video.path, video.frames, report)


def _drawing(job: Job) -> Callable[[Made, int], UInt8[np.ndarray, "H W 3"]]:
    """The function `draw(made, i)` that draws picture i of a block as the video shows it."""
    if len(job.arms) == 1 and not job.truth:
        return lambda made, i: made.frames[job.arms[0].name][i]
    count = len(job.arms) + job.truth
    sheet = Sheet(count, job.height, job.width, tour=job.tour, frames=job.frames)
    return lambda made, i: sheet.draw(_panels(job, made, i), made.first + i)


def _panels(job: Job, made: Made, i: int) -> list[Panel]:
    panels = []
    if made.truth_FHW3 is not None:
        real = made.first + i < job.tour
        known = made.seen_F[i] >= SEEN
        note = "given to all arms" if real else "seen in the tour" if known else "not in the tour"
        panels.append(Panel(made.truth_FHW3[i], "real frames" if real else "ground truth", note))
    for arm in job.arms:
        layout = job.cache(arm.state).layout
        size = made.bytes[arm.name].in_use.total
        note = f"{layout.span_bits:.4g} bits per element, {size / 1e6:.1f} MB"
        if job.baseline not in (None, arm.name) and size:  # there may be no cache yet
            note += f" ({made.bytes[job.baseline].in_use.total / size:.1f}x smaller)"
        panels.append(Panel(made.frames[arm.name][i], f"{arm.name} cache", note))
    return panels


class _CtrlC:
    """Remembers Ctrl-C instead of raising it anywhere, so that no block is cut and no file torn.

    The second Ctrl-C raises as usual. In other threads than the main one nothing changes: there
    Python delivers no signals.
    """

    def __init__(self):
        self.pressed = False
        self._before: Any = None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
