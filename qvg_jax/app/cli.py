"""The `qvg` command: arguments in, files and a small table out, errors in one line.

Exit codes: 0 done, 1 nothing fits (plan), 2 bad input or a file that could not be written, 130 Ctrl-C.
"""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qvg_jax.app.options import MODELS, WALKS, BadInput, parser

__all__ = ["main"]

LONGEST_LINE = 600  # characters of an error; a checkpoint can be wrong in a hundred places


@contextlib.contextmanager
def _blamed_on_input(
    *kinds: type[Exception],
    memory_advice: str = "accepted: fewer --frames, --tour or --compare",
) -> Iterator[None]:
    """Takes exceptions of these kinds as the user's; all others are ours and show a traceback."""
    try:
        yield
    except OSError as error:
        if not issubclass(OSError, kinds):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise BadInput(
            f"{where}{error.strerror or error}; accepted: a folder that can be written, on a disk "
            "with room"
        ) from error
    except kinds as error:
        raise BadInput(str(error)) from error
    except (MemoryError, RuntimeError) as error:  # RuntimeError: how JAX says it
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The first line says how much; what follows lists every buffer.
        what = (str(error) or "out of memory").strip().splitlines()[0][:120]
        raise BadInput(f"{what}; {memory_advice}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    try:
        args = parser().parse_args(argv)
        return COMMANDS[args.command](args)
    except BadInput as error:
        line = " ".join(str(error).split())
        if len(line) > LONGEST_LINE:
            line = line[: LONGEST_LINE - 4] + " ..."
        print(f"qvg: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qvg: interrupted", file=sys.stderr)
        return 130


def _generate(args: argparse.Namespace) -> int:
    model = _model(args.model)
    _remember_compilations()
    from qvg_jax.app.generate import generate
    from qvg_jax.app.progress import Bars
    from qvg_jax.app.report import table
    from qvg_jax.cache.health import CacheFullError, NonFiniteError

    module = importlib.import_module(model)
    args.codec = _or_default(args.codec, module)
    request = _request(args, codecs=_codec_names(args), out=str(args.out))
    advice = {}
    if hasattr(module, "memory_advice"):
        advice = {"memory_advice": module.memory_advice(request)}
    with _told():
        with _blamed_on_input(ValueError, **advice):
            job = module.prepare(request)
        arms = ", ".join(arm.name for arm in job.arms)
        real = f"{job.tour} real frames, then " if job.tour else ""
        told = (NonFiniteError, CacheFullError, OSError, NotImplementedError)
        what = f"{job.frames} generated" if real else f"{job.frames} frames"
        print(f"{job.model}: {real}{what}, for each of {arms}", flush=True)
        with _blamed_on_input(*told, **advice), Bars(job) as bars:
            outcome = generate(
                job, args.out, fps=args.fps, growing=args.stream, progress=bars.update
            )
    if outcome.report is None:
        print(
            f"qvg: interrupted; {outcome.video} has the {outcome.frames} frames so far",
            file=sys.stderr,
        )
        return 130
    print(f"\n{table(outcome.report)}\n")
    seconds = outcome.report["timings"]["total_seconds"]
    print(f"{seconds:.0f} s; wrote video.mp4, report.json and report.png to {args.out}")
    return 0


def _play(args: argparse.Namespace) -> int:
    if args.model not in WALKS:
        what = "cannot be walked in yet" if args.model in MODELS else "is not known"
        raise BadInput(f"model={args.model!r} {what}; accepted: {', '.join(WALKS)}")
    try:
        from qvg_jax.app.play import server as play
    except ImportError as error:
        raise BadInput(
            f"the page needs NiceGUI ({error}); install the extra: pip install 'qvg-jax[play]', or "
            "uv run --extra play qvg play"
        ) from error
    _remember_compilations()
    from qvg_jax.app.play.walk import Walk

    module = importlib.import_module(WALKS[args.model])
    codec = _or_default(args.codec, module)
    with _blamed_on_input(ValueError, memory_advice="accepted: less --memory"):
        world = module.walk(_request(args, codecs=(codec,)), args.memory)
        walk = Walk(world, seed=args.seed, codec=codec)
    try:
        sock = play.listen(args.host, args.port)
    except OSError as error:
        raise BadInput(
            f"--host {args.host} --port {args.port}: {error.strerror or error}; accepted: an "
            "address of this machine and a free port, 0 for any"
        ) from error
    with contextlib.suppress(KeyboardInterrupt):
        play.serve(walk, sock, show=not args.no_browser)
    print(f"qvg: ended after {walk.blocks} blocks")
    return 0


def _plan(args: argparse.Namespace) -> int:
    module = importlib.import_module(_model(args.model))
    if not hasattr(module, "plan"):
        raise BadInput(
            f"model={args.model!r} has no plan; accepted: self-forcing, worldplay, longcat"
        )
    _remember_compilations()
    from qvg_jax.app.memory_plan import plan_table

    request = _request(args, codecs=tuple(name.strip() for name in args.codec.split(",")))
    with _told(), _blamed_on_input(ValueError):
        plan = module.plan(request, args.memory)
    print(plan_table(plan, args.memory))
    return 0 if any(plan.fits(need, args.memory) for need in plan.needs) else 1


def _convert(args: argparse.Namespace) -> int:
    from qvg_jax.app.convert import convert

    with _blamed_on_input(ValueError, OSError):
        done = convert(args.source, args.target, entry=args.entry)
    entry = f" of {done['entry']}" if done["entry"] else ""
    print(f"{done['tensors']} tensors{entry}, {done['bytes'] / 1e9:.3f} GB, in {args.target}")
    return 0


def _capture(args: argparse.Namespace) -> int:
    module = importlib.import_module(_model(args.model))
    if not hasattr(module, "capture"):
        raise BadInput(f"model={args.model!r} cannot be captured yet; accepted: pocket-world")
    _remember_compilations()
    from qvg_jax.app.tune_command import run_capture

    options = dict(frames=args.frames, layers=args.layers, seed=args.seed)
    with _blamed_on_input(ValueError, OSError):
        print(run_capture(module, args.out, **options))
    return 0


def _tune(args: argparse.Namespace) -> int:
    loop = None
    if args.model is not None:
        loop = getattr(importlib.import_module(_model(args.model)), "loop", None)
        if loop is None:
            raise BadInput(f"model={args.model!r} has no loop to tune in; accepted: pocket-world")
    _remember_compilations()
    from qvg_jax.app.tune_command import run_tune

    options = dict(span_tokens=args.span_tokens, budget=args.budget, loop=loop)
    recipes = [name.strip() for name in args.codec.split(",")] if args.codec else None
    with _blamed_on_input(ValueError, OSError):
        print(run_tune(args.file, args.out, recipes=recipes, **options))
    print(f"wrote tune.json and tune.png to {args.out}")
    return 0


def _request(args: argparse.Namespace, **changes: Any) -> Any:
    """The options that a `Request` knows."""
    from qvg_jax.app.job import Request

    names = {field.name for field in dataclasses.fields(Request)} & vars(args).keys()
    return Request(**({name: getattr(args, name) for name in names} | changes))


def _model(name: str) -> str:
    if name not in MODELS:
        raise BadInput(f"model={name!r} is not known; accepted: {', '.join(MODELS)}")
    return MODELS[name]


def _codec_names(args: argparse.Namespace) -> tuple[str, ...]:
    more = (name.strip() for name in args.compare.split(",")) if args.compare else ()
    return (args.codec, *more)


def _or_default(codec: str | None, module: Any) -> str:
    """The codec, or what `presets.recommended` says of the module's model, in its own words."""
    return module.DEFAULT_CODEC if codec in (None, "", "auto") else codec


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Shows on stderr what models have to say on the way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    log = logging.getLogger("models")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"qvg: {level}{' '.join(record.getMessage().split())}"


def _codecs(args: argparse.Namespace) -> int:
    from qvg_jax.app.report import aligned
    from qvg_jax.codecs import presets
    from qvg_jax.codecs.accounting import pair_bits

    rows = [("codec", "code bits", "bits/element", "vs bf16", "what it is")]
    for name, constructor in (presets.PRESETS | presets.PAIRS).items():
        what = (constructor.__doc__ or "").strip().splitlines()[0]
        try:
            bits = pair_bits(presets.pair(name), args.shape)
        except ValueError as error:
            raise BadInput(f"codec={name!r}: {error}") from error
        code = inspect.signature(constructor).parameters.get("bits")
        code = str(code.default) if code else "-"
        rows.append((name, code, f"{bits:.4f}", f"{16 / bits:.2f}x", what))
    print(aligned(rows))
    return 0


def _remember_compilations() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told otherwise."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir:
        return
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(folder, "qvg_jax", "compiled")))


COMMANDS = {
    "generate": _generate,
    "play": _play,
    "plan": _plan,
    "convert": _convert,
    "capture": _capture,
    "tune": _tune,
    "codecs": _codecs,
}


if __name__ == "__main__":
    sys.exit(main())
