"""The work of the commands, once `cli` has read their options; JAX is imported where it is needed."""

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qvg_jax.app.command_line import command_line
from qvg_jax.app.jax_setup import set_up_jax
from qvg_jax.app.model_entry import GenerateOptions, ModelEntry, PlanOptions, PlayOptions
from qvg_jax.app.protocol import VerifyOptions
from qvg_jax.errors import MissingExtraError, UserError, printable, told_to_user

__all__ = [
    "capture",
    "codecs",
    "convert",
    "fetch",
    "generate",
    "plan",
    "play",
    "tune",
    "tune_heads",
    "verify",
]

# `prepare` of a model writes no files, so that an OSError in it is a mistake of ours.
WRITING = "accepted: a folder that can be written, on a disk with room"


def generate(entry: ModelEntry, options: GenerateOptions) -> int:
    """Runs a model's job: video.mp4 and report.json, .png and .html in `options.out`."""
    outcome = _generated(entry, options, leave_finished=True)
    if outcome is None:
        return 0
    if outcome.report is None:
        return 128 + (outcome.signal or 0)
    from qvg_jax.app.report import table

    print(f"\n{table(outcome.report)}\n")
    seconds = outcome.report["timings"]["total_seconds"]
    print(f"{seconds:.0f} s; wrote video.mp4 and report.json, .png, .html to {options.out}")
    return 0


def verify(entry: ModelEntry, options: GenerateOptions, how: VerifyOptions) -> int:
    """Runs a model's protocol: verify.json and verify.html in `options.out`; 1 if a band fails."""
    from qvg_jax.app import verify as verifying
    from qvg_jax.app.metrics import METRICS
    from qvg_jax.app.perceptual import load_lpips

    metrics = (*METRICS, load_lpips()) if how.lpips else METRICS
    outcomes = []

    def run(asked: GenerateOptions, metrics: Sequence[Any]) -> Any:
        outcomes.append(_generated(entry, asked, metrics=metrics))
        return outcomes[-1]

    with _written():
        result = verifying.verify(entry, options, how, run, metrics)
    if result is None:
        return 128 + (outcomes[-1].signal or 0)
    print(f"\n{verifying.summary_table(result)}\n")
    print(f"wrote verify.json and verify.html to {options.out}")
    return 1 if result["verdict"] == "fail" else 0


def _generated(
    entry: ModelEntry, options: GenerateOptions, *, leave_finished: bool = False, **more: Any
) -> Any:
    """The `Outcome` of a model's job; an interruption is told on stderr.

    With `leave_finished`, None for a run to go on with that is finished, whose files stay.
    """
    from qvg_jax.app.compile_watch import watching_compiler
    from qvg_jax.app.early_checks import check_early
    from qvg_jax.app.progress import Progress, saying
    from qvg_jax.app.run_lock import check_alone_in

    def advice() -> str:
        return entry.memory_advice(options)

    with _told(entry):
        with _within_memory(advice), saying(f"{entry.name}: loading the model"):
            set_up_jax()
            # Before minutes are spent on loading, and seconds on importing what loads.
            with _written():
                check_early(entry, options)
            check_alone_in(options.out)
            going_on = leave_finished and getattr(options, "resume", False)
            if going_on and (options.out / "report.json").is_file() and entry.finished(options):
                return _said_finished(options, longer=True)
            from qvg_jax.app.generate import difference_of_finished
            from qvg_jax.app.generate import generate as run
            from qvg_jax.app.lost_devices import told_of_lost_devices
            from qvg_jax.cache.health import CacheFullError, NonFiniteError

            job = entry.prepare(options)
        differs = difference_of_finished(job, options.out, options.fps) if going_on else ""
        if differs is None:
            return _said_finished(options, longer=not job.anew)
        if going_on and job.anew and (options.out / "report.json").is_file():
            raise UserError(
                f"--resume: the run in {options.out} is finished and was made with other settings: "
                f"{differs}; accepted: its settings, another --out, or no --resume to replace it"
            )
        arms = ", ".join(arm.name for arm in job.arms)
        real = f"{job.tour} real frames, then " if job.tour else ""
        what = f"{job.frames} generated" if real else f"{job.frames} frames"
        print(f"{job.model}: {real}{what}, for each of {arms}", flush=True)
        told = (NonFiniteError, CacheFullError, NotImplementedError)
        with (
            told_of_lost_devices(options),
            _within_memory(advice),
            _one_line(*told),
            _written(),
            watching_compiler() as compiling,
            Progress(job, compiling) as progress,
        ):
            outcome = run(
                job,
                options.out,
                fps=options.fps,
                growing=options.stream,
                begins=progress.begins,
                progress=progress.update,
                command=command_line("generate", entry.name, options),
                **more,
            )
    if outcome.report is None:
        kept = f"; {outcome.video} has the {outcome.frames} frames so far" if outcome.frames else ""
        go_on = "; --resume goes on" if kept and hasattr(options, "resume") else ""
        print(f"qvg: interrupted{kept}{go_on}", file=sys.stderr)
    return outcome


def _said_finished(options: GenerateOptions, *, longer: bool) -> None:
    """Says that a finished run stays as it is, and how to make it longer if its blocks were kept."""
    more = "give more --frames to make it longer, or " if longer else ""
    print(
        f"--resume: the run in {options.out} is finished, and all its files stay as they are; "
        f"{more}leave --resume out to make it anew"
    )


def play(entry: ModelEntry, options: PlayOptions) -> int:
    """Serves the page of a walk until Ctrl-C."""
    try:
        from qvg_jax.app.play import server
    except ImportError as error:
        raise MissingExtraError(f"the page needs NiceGUI ({error})", "play") from error
    set_up_jax()
    from qvg_jax.app.play.walk import Walk

    assert entry.play is not None
    with _within_memory(lambda: "accepted: less --memory"):
        world = entry.play(options)
        with told_to_user():
            walk = Walk(world, seed=options.seed, codec=options.chosen_codec)
    try:
        with told_to_user():
            sock = server.listen(options.host, options.port)
    except OSError as error:
        raise UserError(
            f"--host {options.host} --port {options.port}: {error.strerror or error}; accepted: an "
            "address of this machine and a free port, 0 for any"
        ) from error
    with contextlib.suppress(KeyboardInterrupt):
        server.serve(walk, sock, host=options.host, show=not options.no_browser)
    print(f"qvg: ended after {walk.blocks} blocks")
    return 0


def plan(entry: ModelEntry, options: PlanOptions) -> int:
    """Prints what fits into the memory; 1 if nothing does."""
    set_up_jax()
    from qvg_jax.app.memory_plan import plan_table

    assert entry.plan is not None
    with _told(entry):
        made = entry.plan(options)
    print(plan_table(made, options.memory))
    return 0 if any(made.fits(need, options.memory) for need in made.needs) else 1


def capture(entry: ModelEntry, options: Any) -> int:
    """Writes K, V and Q of a model."""
    set_up_jax()
    from qvg_jax.app.tune_command import run_capture

    assert entry.capture is not None
    with _written():
        print(run_capture(entry.capture, options))
    return 0


def tune(
    file: Path,
    entry: ModelEntry | None,
    budget: float | None,
    span_tokens: int | None,
    recipes: Sequence[str],
    out: Path,
) -> int:
    """Measures recipes on captured tensors; see `tune_command.run_tune`."""
    if entry is not None and entry.loop is None:
        raise UserError(f"model={entry.name!r} has no loop to tune in; accepted: pocket-world")
    set_up_jax()
    from qvg_jax.app.tune_command import run_tune

    loop = None if entry is None else entry.loop
    options = dict(span_tokens=span_tokens, budget=budget, loop=loop)
    with _written():
        print(run_tune(file, out, recipes=recipes or None, **options))  # type: ignore[arg-type]
    print(f"wrote tune.json and tune.png to {out}")
    return 0


def tune_heads(
    files: Sequence[str | Path],
    out: Path,
    share: float,
    block_tokens: int | None,
    sink_blocks: int,
    local_blocks: int,
) -> int:
    """Measures heads on captured tensors; see `heads_command.run_heads`."""
    set_up_jax()
    from qvg_jax.app.heads_command import run_heads

    sizes = dict(sink_blocks=sink_blocks, local_blocks=local_blocks)
    with _written():
        print(run_heads([*map(Path, files)], out, share=share, block_tokens=block_tokens, **sizes))
    print(f"wrote heads.json and heads.png to {out}")
    return 0


def fetch(entry: ModelEntry, yes: bool) -> int:
    """Downloads the released weights of a model, after its user accepted their licences."""
    from qvg_jax.app import fetch as fetching

    if not entry.needs:
        raise UserError(f"model={entry.name!r} brings its weights along: there is nothing to fetch")
    with _written():
        folder = fetching.fetch(entry.needs, accept=(lambda _: True) if yes else fetching.ask)
        fetching.remember(entry.name, folder)
    print(f"weights of {entry.name} in {folder}; `qvg generate {entry.name}` reads them")
    return 0


def convert(source: Path, target: Path, entry: str | None) -> int:
    """Makes safetensors of a checkpoint of PyTorch."""
    from qvg_jax.app.convert import convert as run

    with _written():
        done = run(source, target, entry=entry)
    if bad := done.get("nonfinite"):
        name, count = next(iter(bad.items()))
        print(
            f"qvg: warning: {len(bad)} tensors have NaN or Inf, the first is {printable(name)} with "
            f"{count} of them; a model that needs it will refuse the file",
            file=sys.stderr,
        )
    of = f" of {done['entry']}" if done["entry"] else ""
    print(f"{done['tensors']} tensors{of}, {done['bytes'] / 1e9:.3f} GB, in {target}")
    return 0


def codecs(shape: tuple[int, ...]) -> int:
    """Prints the recipes with their bits per element in spans of a shape."""
    set_up_jax()
    from qvg_jax.app.report import aligned
    from qvg_jax.codecs import presets
    from qvg_jax.codecs.accounting import pair_bits
    from qvg_jax.codecs.fitted import fitted

    rows = [("codec", "code bits", "bits/element", "vs bf16", "what it is")]
    for name, constructor in (presets.PRESETS | presets.PAIRS).items():
        what = next(iter((constructor.__doc__ or "").strip().splitlines()), "")  # -OO has none
        try:
            bits = pair_bits(presets.parse_pair(fitted(name, shape[-1])), shape)
        except ValueError as error:
            raise UserError(f"codec={name!r}: {error}") from error
        parameter = inspect.signature(constructor).parameters.get("bits")
        code = str(parameter.default) if parameter else "-"
        rows.append((name, code, f"{bits:.4f}", f"{16 / bits:.2f}x", what))
    print(aligned(rows))
    return 0


@contextlib.contextmanager
def _within_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turns a lack of memory into one line with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # RuntimeError: how JAX says it
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The first line says how much; the next ones list every buffer.
        what = (str(error) or "out of memory").strip().splitlines()[0][:120]
        raise UserError(f"{what}; {advice()}") from error


@contextlib.contextmanager
def _written() -> Iterator[None]:
    """Turns an error of the disk under the output into one line."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror or error}; {WRITING}") from error


@contextlib.contextmanager
def _one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of these kinds into one line."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def _told(entry: ModelEntry) -> Iterator[None]:
    """Shows on stderr what the model's package and this one log on the way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    names = {entry.options.__module__.partition(".")[0], __name__.partition(".")[0]}
    before = {log: log.level for log in map(logging.getLogger, names)}
    for log in before:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log, level in before.items():
            log.removeHandler(handler)
            log.setLevel(level)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"qvg: {level}{printable(record.getMessage())}"
