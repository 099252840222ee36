"""The `qvg` command: arguments in, files and a small table out, errors in one line.

Exit codes: 0 done, 2 bad input or a file that could not be written, 130 Ctrl-C.
"""

import argparse
import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from qvg_jax.versions import own_version

__all__ = ["main"]

# Looked up by name when wanted: the library does not import models.
MODELS = {"pocket-world": "models.pocket_world.job"}
LONGEST_LINE = 400  # characters of an error; a checkpoint can be wrong in a hundred places


class _BadInput(Exception):
    """Something that the user can mend; its message is what they are told."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _BadInput(message)


@contextlib.contextmanager
def _blamed_on_input(*kinds: type[Exception]) -> Iterator[None]:
    """Takes exceptions of these kinds as the user's; all others are ours and show a traceback."""
    try:
        yield
    except OSError as error:
        if not issubclass(OSError, kinds):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise _BadInput(
            f"{where}{error.strerror or error}; accepted: a folder that can be written, on a disk "
            "with room"
        ) from error
    except kinds as error:
        raise _BadInput(str(error)) from error
    except (MemoryError, RuntimeError) as error:  # RuntimeError: how JAX says it
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _BadInput(
            f"{str(error) or 'out of memory'}; accepted: fewer --frames, --tour or --compare"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except _BadInput as error:
        line = " ".join(str(error).split())
        if len(line) > LONGEST_LINE:
            line = line[: LONGEST_LINE - 4] + " ..."
        print(f"qvg: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qvg: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qvg", description="Long videos with a KV cache of about two bits.")
    parser.add_argument("--version", action="version", version=f"qvg {own_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    make = commands.add_parser("generate", help="make a video with compressed and bf16 caches")
    add = make.add_argument
    add("--model", default="pocket-world", metavar="NAME", help=", ".join(MODELS))
    add("--frames", type=_count, metavar="N", help="frames to generate (240)")
    add("--tour", type=_count, metavar="N", help="real frames before them (128)")
    add("--actions", metavar="LIST", help="where to go after the tour, such as w-8,d-4 (back)")
    add("--seed", type=_whole, default=0, metavar="N", help="world, path and noise (0)")
    add("--codec", default="qvg", metavar="NAME", help="of the cache; `qvg codecs` lists them")
    add("--compare", default="", metavar="NAMES", help="more codecs, such as rtn,qvg-pro")
    add("--steps", type=_count, default=4, metavar="N", help="denoising steps per block (4)")
    add("--fps", type=_count, default=8, metavar="N", help="of the video (8)")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the files (out)")
    add("--weights", metavar="FILE", help="other weights than the model's own")
    make.set_defaults(run=_generate)

    codecs = commands.add_parser("codecs", help="list the codecs with their size")
    codecs.add_argument(
        "--shape",
        type=_shape,
        default=(1, 12, 37440, 128),
        metavar="B,H,T,D",
        help="span to measure them on: batch, heads, tokens, head dim (1,12,37440,128)",
    )
    codecs.set_defaults(run=_codecs)
    return parser


def _generate(args: argparse.Namespace) -> int:
    if args.model not in MODELS:
        raise _BadInput(f"model={args.model!r} is not known; accepted: {', '.join(MODELS)}")
    _remember_compilations()
    from qvg_jax.compare import Request
    from qvg_jax.generate import generate
    from qvg_jax.health import CacheFullError, NonFiniteError
    from qvg_jax.progress import Bars
    from qvg_jax.report import table

    more = tuple(name.strip() for name in args.compare.split(",")) if args.compare else ()
    request = Request(
        frames=args.frames,
        tour=args.tour,
        actions=args.actions,
        seed=args.seed,
        codecs=(args.codec, *more),
        steps=args.steps,
        weights=args.weights,
    )
    with _blamed_on_input(ValueError):
        job = importlib.import_module(MODELS[args.model]).prepare(request)
    arms = ", ".join(arm.name for arm in job.arms)
    print(
        f"{job.model}: {job.tour} real frames, then {job.frames} generated, for each of {arms}",
        flush=True,
    )
    with _blamed_on_input(NonFiniteError, CacheFullError, OSError), Bars(job) as bars:
        outcome = generate(job, args.out, fps=args.fps, progress=bars.update)
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


def _codecs(args: argparse.Namespace) -> int:
    from qvg_jax import presets
    from qvg_jax.accounting import bits_per_element, compression_ratio
    from qvg_jax.report import aligned

    rows = [("codec", "code bits", "bits/element", "vs bf16", "what it is")]
    for name, constructor in presets.PRESETS.items():
        codec = presets.get(name)
        what = (constructor.__doc__ or "").strip().splitlines()[0]
        try:
            bits, ratio = bits_per_element(codec, args.shape), compression_ratio(codec, args.shape)
        except ValueError as error:
            raise _BadInput(f"codec={name!r}: {error}") from error
        code = inspect.signature(constructor).parameters.get("bits")
        code = str(code.default) if code else "-"
        rows.append((name, code, f"{bits:.4f}", f"{ratio:.2f}x", what))
    print(aligned(rows))
    return 0


def _remember_compilations() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told otherwise."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir:
        return
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(folder, "qvg_jax", "compiled")))


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give a whole number")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give a whole number above 0")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(p.isdecimal() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted: give four whole numbers above 0, such as 1,12,37440,128"
        )
    return tuple(map(int, parts))


if __name__ == "__main__":
    sys.exit(main())
