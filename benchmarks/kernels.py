"""Speed of the kernels: `python -m benchmarks.kernels --json kernels.json` on a Hopper GPU.

Decoding of spans against a copy, and attention to a compressed cache (decoding, rotation and merge
included) against cuDNN's bf16 attention to the same keys, uncompressed and already rotated. A
number is the median of `--repeats` timings of several calls each; the spread is half their range.
`--profile` adds what the GPU does meanwhile: the time of each kernel, and of none. `--decoders mosaic triton xla`
decodes the same forms by each of them, XLA as it does for cuDNN.

Other implementations are timed beside these with `--also mine:flash`, where mine.py holds

    def flash(row, arrays):  # for example PyTorch's
        q, k, v = (torch.from_dlpack(arrays[n]).transpose(1, 2) for n in ("q", "keys", "values"))
        run = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return run, torch.cuda.synchronize  # starts one call; waits for all

`arrays` are JAX's: q, k and v (1, T, H, D) of the new block before RoPE, `keys` and `values` (1, S, H, D) of
everything, uncompressed and rotated, all bf16, and `view`, the compressed cache.
"""

import argparse
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention_cases import BETWEEN, DECODE, FEW, PLANS, READS, ROWS, Row, inputs, noise
from benchmarks.common import one_of, positive
from benchmarks.decode_cases import DECODERS
from benchmarks.device_time import table, traced


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints two tables, and returns and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument(
        "--rows",
        nargs="*",
        type=one_of(row.name for row in (*ROWS, *BETWEEN)),
        help="names of attention shapes; default: all of `ROWS`",
    )
    parser.add_argument(
        "--reads",
        nargs="*",
        type=one_of(READS | PLANS),
        default=list(READS),
        help=f"of {', '.join(READS | PLANS)}",
    )
    parser.add_argument(
        "--also", nargs="*", default=[], type=_named, metavar="MODULE:FUNCTION", help="see above"
    )
    parser.add_argument("--variants", action="store_true", help="other sizes of blocks")
    parser.add_argument("--decoders", nargs="+", default=["mosaic"], choices=tuple(DECODERS))
    parser.add_argument("--no-decode", action="store_true", help="only the attention table")
    parser.add_argument("--profile", action="store_true", help="device time of every kernel")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    result = {"device": device.device_kind, "jax": jax.__version__}
    print(f"{device.device_kind}, jax {jax.__version__}")
    if not args.no_decode:
        result["decode"] = decode_table(args.repeats, args.profile, args.variants, args.decoders)
    result["attention"] = attention_table(
        args.repeats, args.rows, args.reads, args.profile, dict(args.also)
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    return result


def _named(text: str) -> tuple[str, Callable]:
    """The text MODULE:FUNCTION and the function that it names."""
    module, _, function = text.partition(":")
    try:
        return text, getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; give MODULE:FUNCTION") from error


def compiled(
    jobs: dict[str, tuple[Callable, tuple]], **options: Any
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields (name, call) of every job; the jobs are compiled at the same time.

    All before the first is given out: compiling searches for fast kernels on the GPU that is measured.
    A job that does not compile is left out, and said.

    Args:
        jobs: functions and their arguments.
        options: of XLA's compiler.
    """

    def one(f: Callable, x: tuple) -> Callable[[], Any]:
        return functools.partial(jax.jit(f).lower(*x).compile(compiler_options=options), *x)

    with ThreadPoolExecutor(8) as pool:
        futures = {name: pool.submit(one, f, x) for name, (f, x) in jobs.items()}
    for name, future in futures.items():
        if future.exception() is None:
            yield name, future.result()
        else:
            print(f"{name}: {_first_line(future.exception())}", flush=True)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"


def milliseconds(
    call: Callable[[], Any],
    repeats: int,
    at_least: float = 20.0,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, float]:
    """The median and the spread of a call's time; calls are queued, so that gaps do not count.

    Args:
        call: starts the work and returns something.
        repeats: how many times to measure.
        at_least: milliseconds that calls measured together take.
        wait: given what the last call returned, waits for all of them.
    """
    wait(call())
    times, count = [], 1
    while len(times) < repeats:
        start = time.perf_counter()
        for _ in range(count):
            out = call()
        wait(out)
        took = (time.perf_counter() - start) * 1e3
        if took < at_least and count < 1000:
            count *= 2
        else:
            times.append(took / count)
    return {"ms": statistics.median(times), "spread": (max(times) - min(times)) / 2}


def decode_table(
    repeats: int,
    profile: bool = False,
    variants: bool = False,
    decoders: Sequence[str] = ("mosaic",),
) -> list[dict[str, Any]]:
    """Rows of times of decoding a span of a layer, and of a copy of the same output.

    Args:
        repeats: timings of each.
        profile: whether times are the device's: those of the host are longer than a small kernel's.
        variants: whether kernels are measured in other sizes too.
        decoders: of `DECODERS`.
    """
    print(f"{'decode':56} {'ms':>8} {'TB/s':>6} {'of copy':>8}")
    rows = []
    for heads, tokens in DECODE:
        x = noise((heads, tokens, 128), 3)
        jobs, traffic = {"copy bf16": (lambda x: -x, (x,))}, {"copy bf16": 2 * x.nbytes}
        for by in decoders:
            for name, run, arguments, size in DECODERS[by](heads, tokens, variants):
                jobs[f"{name}, {by}"], traffic[f"{name}, {by}"] = (run, arguments), size
        for name, call in compiled(jobs):
            row = dict(heads=heads, tokens=tokens, what=name, **milliseconds(call, repeats))
            if profile and (seen := profiled(name, call)) is not None:
                row |= dict(host_ms=row["ms"], ms=seen["busy_ms"])
            row["tb_per_s"] = traffic[name] / row["ms"] / 1e9
            rows.append(row)
            share = row["tb_per_s"] / next(
                r["tb_per_s"] for r in rows if r["heads"] == heads and r["what"] == "copy bf16"
            )
            label = f"{heads} x {tokens} {name}"
            print(f"{label:56} {row['ms']:8.4f} {row['tb_per_s']:6.2f} {share:8.2f}", flush=True)
    return rows


def profiled(name: str, call: Callable[[], Any], show: bool = False) -> dict[str, Any] | None:
    """The device times of a call, printed if `show`; None, with a printed line, if there are none."""
    try:
        profile = traced(call)
    except RuntimeError as error:
        print(f"{name}: {_first_line(error)}", flush=True)
        return None
    if show:
        print(table(profile), flush=True)
    return dict(busy_ms=profile.busy_ms, gaps_ms=profile.gaps_ms, kernels=profile.kernels)


def attention_table(
    repeats: int,
    names: list[str] | None,
    reads: list[str],
    profile: bool = False,
    also: dict[str, Callable] | None = None,
    *,
    rows: Sequence[Row] | None = None,
    rival: str = "cudnn",
    until: float | None = None,
) -> list[dict[str, Any]]:
    """Rows of times of all reads of every shape, with the ratio to cuDNN bf16 and the difference from "xla".

    Args:
        repeats: timings of each.
        names: of rows; None for all.
        reads: of `READS` and `PLANS`.
        profile: whether to say what the GPU does meanwhile.
        also: name: function(row, arrays) of other implementations, see the module.
        rows: shapes; None is `ROWS`, and `BETWEEN` where rows are named.
        rival: implementation of the dense bf16 attention that the others are compared with.
        until: time of `time.monotonic` after which no shape begins; None for no end.
    """
    print(f"{'attention':32} {'ms':>8} {'TFLOP/s':>8} {'/ ' + rival:>8} {'/ xla - 1':>10}")
    dense, found = f"{rival} bf16", []
    every = (*ROWS, *BETWEEN) if names else ROWS
    for row in every if rows is None else rows:
        late = until is not None and time.monotonic() > until
        if late or (names and row.name not in names):
            continue
        q, view, k, v = inputs(row)
        whole = [noise((1, row.dense_keys, row.heads, row.head_dim), 60 + i) for i in range(2)]
        # Rivals first: the others are compared with the first of them.
        jobs = {
            f"{name} bf16": (
                lambda q, k, v, by=name: jax.nn.dot_product_attention(q, k, v, implementation=by),
                (q, *whole),
            )
            for name in (rival, *(("xla",) if row in FEW and rival != "xla" else ()))
        }
        rivals = tuple(jobs)
        for name in sorted(reads, key=lambda name: name != "xla"):
            jobs[name] = ((READS | PLANS)[name], (q, view, k, v))
        base, right = None, None
        for name, call in compiled(jobs):
            try:
                entry = _measured(row, name, base, milliseconds(call, repeats))
                got = jnp.asarray(call(), jnp.float32) if name not in rivals else None
            except jax.errors.JaxRuntimeError as error:
                print(f"{row.name}, {name}: {_first_line(error)}", flush=True)
                continue
            if name == dense:
                base = entry["ms"]
                entry |= dict(cudnn_ms=base, ratio=1.0)
            if name == "xla":
                right = got
            elif right is not None and got is not None:
                entry["difference"] = float(jnp.linalg.norm(got - right) / jnp.linalg.norm(right))
            found.append(entry)
            _say(row, entry)
            if profile and name not in ("xla", "official style", *rivals):
                entry["profile"] = profiled(name, call, show=True)
        arrays = dict(q=q, k=k, v=v, keys=whole[0], values=whole[1], view=view)
        for name, function in (also or {}).items():
            run, wait = function(row, arrays)
            times = milliseconds(run, repeats, wait=lambda _, wait=wait: wait())
            found.append(_measured(row, name, base, times))
            _say(row, found[-1])
    return found


def _measured(row: Row, name: str, cudnn: float | None, times: dict[str, float]) -> dict[str, Any]:
    """The row of a read, with the ratio to cuDNN's milliseconds if those are known."""
    entry = dict(row=row.name, heads=row.heads, queries=row.queries, keys=row.keys, read=name)
    entry |= times
    return entry if cudnn is None else entry | dict(cudnn_ms=cudnn, ratio=entry["ms"] / cudnn)


def _say(row: Row, entry: dict[str, Any]) -> None:
    ratio = f"{entry['ratio']:8.3f}" if "ratio" in entry else ""
    error = f"{entry['difference']:10.1e}" if "difference" in entry else ""
    label, speed = f"{row.name}, {entry['read']}", row.flops / entry["ms"] / 1e9
    print(f"{label:32} {entry['ms']:8.3f} {speed:8.0f} {ratio:8} {error}", flush=True)


if __name__ == "__main__":
    main()
