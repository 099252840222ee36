"""The main job, whatever the model: run all arms, write video.mp4 and the reports."""

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qvg_jax.app.background import Background
from qvg_jax.app.differences import difference
from qvg_jax.app.early_checks import FILES, REPORTS, check_out
from qvg_jax.app.figure import write_figure
from qvg_jax.app.film import Film
from qvg_jax.app.interruption import Interruption
from qvg_jax.app.job import Job, Made, lockstep
from qvg_jax.app.metrics import METRICS, Metric
from qvg_jax.app.report import Record, configuration, write_json
from qvg_jax.app.report_page import write_report_page
from qvg_jax.app.run_lock import alone_in
from qvg_jax.app.video import Mp4
from qvg_jax.cache.health import CacheFullError, NonFiniteError
from qvg_jax.files import writable_folder

__all__ = ["Outcome", "difference_of_finished", "generate"]


class Outcome(NamedTuple):
    """The result of a run: the video, its frames, the report."""

    video: Path
    frames: int  # in the video
    report: dict[str, Any] | None  # None if a signal came first
    signal: int | None = None  # which one


def generate(
    job: Job,
    out: str | Path,
    *,
    fps: int | None = None,
    growing: bool = False,
    begins: Callable[[str], None] | None = None,
    progress: Callable[[Made], None] | None = None,
    metrics: Sequence[Metric] = METRICS,
    command: str = "",
) -> Outcome:
    """Makes the frames of all arms and writes what came of it.

    `out` gets video.mp4 (as `Film` draws it: of a long tour the end, then all generated frames),
    report.json, report.png and report.html; the reports appear whole or not at all. The video grows
    with the run: errors, Ctrl-C and the signals of schedulers (SIGTERM, SIGHUP) leave it with the
    frames so far. Frames are drawn, scored and written in a thread of their own while the device
    makes the next block. No other process writes into `out` meanwhile.

    Args:
        job: what to make.
        out: folder; made if missing.
        fps: frames a second of the video; None is the job's.
        growing: whether video.mp4 can be played while the run goes on, see `Mp4`.
        begins: called with an arm's name before it makes its next block.
        progress: called with each block after all arms have made it.
        metrics: what compares the frames of an arm with those of bf16 and with the truth.
        command: the command that asked for the run, for report.html.

    Returns:
        The outcome; one without a report if a signal came first, and without a video if there was no frame.

    Raises:
        UserError: `fps` is not accepted, a file in `out` is a folder, or another process writes
            there.
        NonFiniteError, CacheFullError: with the name of the arm and what the video has.
        OSError: `out` or a file in it could not be written; the files before it stay.
    """
    fps = job.fps if fps is None else fps
    video = Mp4(Path(out) / "video.mp4", fps, growing=growing)
    check_out(Path(out))
    out = writable_folder(out)
    with alone_in(out):
        return _generate(job, Record(job, metrics), out, video, fps, begins, progress, command)


def difference_of_finished(job: Job, out: str | Path, fps: int | None = None) -> str | None:
    """What the finished run in `out` has otherwise than a job, in words; None if it is that job's.

    Args:
        job: what would be made.
        out: folder of an earlier run.
        fps: as in `generate`.
    """
    out = Path(out)
    if not all((out / name).is_file() for name in FILES):
        return "files that are gone"
    try:
        report = json.loads((out / REPORTS[0]).read_text(encoding="utf-8"))
        theirs = {"model": report["model"], "arms": [*report["arms"]]}, report["config"]
    except (OSError, ValueError, KeyError, TypeError):  # not a report of ours
        return "a report that is not readable"
    config = json.loads(json.dumps(configuration(job, fps=job.fps if fps is None else fps)))
    ours = {"model": job.model, "arms": [arm.name for arm in job.arms]}, config
    return difference(theirs[0], ours[0]) or difference(theirs[1], ours[1])


def _generate(
    job: Job,
    record: Record,
    out: Path,
    video: Mp4,
    fps: int,
    begins: Callable[[str], None] | None,
    progress: Callable[[Made], None] | None,
    command: str,
) -> Outcome:
    begin = time.perf_counter()
    film = Film(job)

    def write(made: Made) -> None:
        for i in range(max(0, film.first - made.first), made.count):
            video.add(film.draw(made, i))
        record.add(made)

    stop = Interruption()
    try:
        with stop, video, Background() as later:
            total = job.tour + job.frames
            for made in lockstep(job, begins):
                later.wait()  # for the block before, in the middle of which it may come
                if stop.signal is not None and made.first < total:
                    raise KeyboardInterrupt
                if video.growing and not video.frames:  # these would be of another video
                    for name in REPORTS:
                        (out / name).unlink(missing_ok=True)
                later(write, made)
                if progress is not None:
                    progress(made)
                if stop.signal is not None and made.first + made.count < total:
                    raise KeyboardInterrupt
        report = record.report(fps=fps)
        write_figure(out / "report.png", report, record.strip)
        report["timings"]["total_seconds"] = round(time.perf_counter() - begin, 3)
        write_report_page(out / "report.html", report, record.strip, film, video.path, command)
        write_json(out / "report.json", report)
        job.finished()
    except (NonFiniteError, CacheFullError) as error:
        kept = f"{video.path} has the {video.frames} frames before it" if video.frames else ""
        raise type(error)("; ".join(filter(None, (str(error), kept)))) from error
    except KeyboardInterrupt:
        return Outcome(video.path, video.frames, None, stop.signal or signal.SIGINT)
    return Outcome(video.path, video.frames, report)
