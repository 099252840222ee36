"""The main job, whatever the model: run all arms, write video.mp4, report.json and report.png."""

import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

from tqdm import tqdm

from qvg_jax.compare import BASELINE, Job, Made, lockstep
from qvg_jax.figure import write_figure
from qvg_jax.files import writable_folder
from qvg_jax.health import CacheFullError, NonFiniteError
from qvg_jax.panels import Panel, Sheet
from qvg_jax.report import SEEN, Record, write_json
from qvg_jax.video import Mp4

__all__ = ["Outcome", "generate"]


class Outcome(NamedTuple):
    """What is there after a run."""

    video: Path
    frames: int  # in the video
    report: dict[str, Any] | None  # None if Ctrl-C came before the last block


def generate(job: Job, out: str | Path, *, fps: int = 8, progress: bool = True) -> Outcome:
    """Makes the frames of all arms and writes what came of it.

    `out` gets video.mp4 (truth and arms side by side), report.json and report.png, each of which
    appears whole or not at all. The video grows with the run: Ctrl-C and errors leave it with the
    frames so far.

    Args:
        job: what to make.
        out: folder; made if missing.
        fps: frames a second of the video.
        progress: whether to show a bar for each arm on stderr, if that is a terminal.

    Returns:
        The outcome; after Ctrl-C one without a report.

    Raises:
        ValueError: `fps` is not accepted.
        NonFiniteError, CacheFullError: with the name of the arm and what the video has.
        OSError: `out` or a file in it could not be written; the files before it stay.
    """
    begin = time.perf_counter()
    video = Mp4(Path(out) / "video.mp4", fps)
    out = writable_folder(out)
    record = Record(job)
    sheet = Sheet(1 + len(job.arms), job.height, job.width, tour=job.tour, frames=job.frames)
    stopped = False
    try:
        with _CtrlC() as ctrl_c, video, _Bars(job, progress) as bars:
            for made in lockstep(job):
                for i in range(len(made.truth_FHW3)):
                    video.add(sheet.draw(_panels(job, made, i), made.first + i))
                record.add(made)
                bars.update(made)
                stopped = ctrl_c.pressed and video.frames < job.tour + job.frames
                if stopped:
                    break
    except (NonFiniteError, CacheFullError) as error:
        kept = f"{video.path} has the {video.frames} frames before it" if video.frames else ""
        raise type(error)("; ".join(filter(None, (str(error), kept)))) from error
    if stopped:
        return Outcome(video.path, video.frames, None)
    report = record.report(fps=fps)
    write_figure(out / "report.png", report, record.strip)
    report["timings"]["total_seconds"] = round(time.perf_counter() - begin, 3)
    write_json(out / "report.json", report)
    return Outcome(video.path, video.frames, report)


def _panels(job: Job, made: Made, i: int) -> list[Panel]:
    real = made.first + i < job.tour
    known = made.seen_F[i] >= SEEN
    note = "given to all arms" if real else "seen in the tour" if known else "not in the tour"
    panels = [Panel(made.truth_FHW3[i], "real frames" if real else "ground truth", note)]
    for arm in job.arms:
        size = made.bytes[arm.name]
        note = f"cache {size.in_use.total / 1e6:.1f} MB"
        if arm.name == BASELINE:
            title = "bf16 cache"
        else:
            bits = arm.codec.bits_per_element(job.cache(arm.state).layout.span_shape)
            title = f"{arm.name}: {bits:.2f} bits per element"
            full = made.bytes[BASELINE].in_use.total
            note += f", {full / size.in_use.total:.1f}x smaller"
        panels.append(Panel(made.frames[arm.name][i], title, note))
    return panels


class _Bars:
    """A progress bar for each arm, with its own speed and the size of its cache."""

    def __init__(self, job: Job, progress: bool):
        # tqdm: None switches the bars off where stderr is not a terminal.
        off = None if progress else True
        width = max(len(arm.name) for arm in job.arms)
        form = (
            "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        )
        self._bars = {
            arm.name: tqdm(
                desc=arm.name.ljust(width),
                total=job.tour + job.frames,
                position=i,
                disable=off,
                file=sys.stderr,
                bar_format=form,
                dynamic_ncols=True,
                mininterval=0.2,
            )  # fmt: skip
            for i, arm in enumerate(job.arms)
        }
        for bar in self._bars.values():
            bar.set_postfix_str("compiling")

    def update(self, made: Made) -> None:
        frames = len(made.truth_FHW3)
        for name, bar in self._bars.items():
            size = made.bytes[name]
            speed = f"{frames / made.seconds[name]:.1f} frames/s"
            cache = f"cache MB: bf16 {size.bf16 / 1e6:.1f} | {size.in_use.total / 1e6:.1f}"
            bar.set_postfix_str(f"{speed}, {cache}", refresh=False)
            bar.update(frames)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for bar in self._bars.values():
            bar.refresh()
            bar.close()


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
