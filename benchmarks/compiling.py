"""Seconds until Self-Forcing's first block at its true size: tracing, lowering, compilation, and the rest.

    python -m benchmarks.compiling --out DIR --arm qvg
    python -m benchmarks.compiling --out DIR --arm qvg --keep     # twice: the second time from DIR/compiled

Prints a table and writes DIR/compiling.json. The block comes after --history filled-in latent frames, in a
cache made for 9 more. Seconds are those that JAX reports of itself (`jax.monitoring`), of the program of the
block alone; programs of less than --least seconds are left out. With --keep compiled programs are kept.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import an_arm, device
from qvg_jax.app.report import aligned

EVENTS = {
    "jaxpr_trace_duration": "tracing",
    "jaxpr_to_mlir_module_duration": "lowering",
    "backend_compile_duration": "compiling",
}
BLOCK = "run_chunk"  # the program of a block, see `qvg_jax.loop`


def main(argv: list[str] | None = None) -> int:
    """Measures one first block, prints and writes the numbers."""
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    found = measure(args)
    (args.out / "compiling.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--arm", type=an_arm, default="qvg", help="CODEC or CODEC@IMPLEMENTATION")
    add("--keep", action="store_true", help="keep compiled programs in DIR/compiled")
    add("--history", type=int, default=60, help="latent frames before the block")
    add("--least", type=float, default=0.1)
    add("--span", type=int)
    add("--height", type=int, default=480)
    add("--width", type=int, default=832)
    add("--layers", type=int, default=30)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The device, the seconds of the first block, and what JAX says of them, by program."""
    import jax

    from benchmarks.self_forcing import block_at
    from benchmarks.self_forcing_setup import Setup

    if args.keep:
        jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    whole = dict(arms=(args.arm,), limit_arm=args.arm, heads="all", frames=0, repeats=1)
    setup = Setup(
        argparse.Namespace(**vars(args), **whole, histories=(args.history,), capacity=None),
        vae=False,
    )
    programs: dict[str, dict[str, float]] = {}

    def ended(event: str, duration: float, **more: Any) -> None:
        what = EVENTS.get(event.rpartition("/")[2])
        if what is not None and duration >= args.least:
            times = programs.setdefault(
                str(more.get("fun_name")).removeprefix("jit(").rstrip(")"), {}
            )
            times[what] = round(times.get(what, 0) + duration, 2)

    jax.monitoring.register_event_duration_secs_listener(ended)
    found: dict[str, Any] = {}
    begin = time.perf_counter()
    try:
        block_at(setup, args.arm, args.history, found)
    finally:
        jax.monitoring.unregister_event_duration_listener(ended)
    return {
        "command": sys.argv[1:],
        "device": device(),
        "arm": args.arm,
        "first_block_seconds": found["filled"][str(args.history)]["first_call_seconds"],
        "programs": programs,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def table(found: dict[str, Any]) -> str:
    """The numbers in words: a line for each program, the block's first."""
    names = sorted(found["programs"], key=lambda name: (name != BLOCK, name))
    rows = [("program", *EVENTS.values())]
    for name in names:
        times = found["programs"][name]
        rows.append((name, *(f"{times[w]:.2f}" if w in times else "-" for w in EVENTS.values())))
    head = f"{found['arm']} on {found['device']['kind']}: first block in {found['first_block_seconds']:.1f} s"
    return f"{head}\n{aligned(rows)}"


if __name__ == "__main__":
    sys.exit(main())
