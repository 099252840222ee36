"""Speed of encoding spans: `python -m benchmarks.encode --json encode.json` on a Hopper GPU.

One layer's span of K or V: the kernels by themselves, with the share of their arithmetic in what the
tensor cores can do, then whole codecs, cold, on the kernels. A copy of the span stands beside them. Every row
is printed when it is measured. Numbers as in `benchmarks.kernels`.

`--implementation triton` measures Triton's kernels, on any GPU from Ampere on, and `xla` the same on XLA,
of which whole codecs take minutes to compile:

    python -m benchmarks.encode --implementation mosaic triton xla --codecs "qvg, 2 iterations"

What no kernel encodes runs on XLA where it is named, pocket world's span of eight blocks here:

    python -m benchmarks.encode --no-kernels --shapes 3x1536 --codecs "trellis, keys" "trellis, values"
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention_cases import DECODE, noise
from benchmarks.common import one_of, positive
from benchmarks.kernels import compiled, milliseconds
from pallas_kernels.kmeans import Metric, Tuning, kmeans_sums
from pallas_kernels.quantize_pack import (
    Dithered,
    Integers,
    Midrise,
    assign_and_pack,
    assign_and_subtract,
    pack_dithered,
)
from qvg_jax.codecs import presets
from qvg_jax.codecs.compose import ENCODERS, chain
from qvg_jax.codecs.quantize.dithered import channel_sizes
from qvg_jax.codecs.quantize.grid import grid_quantize
from qvg_jax.codecs.quantize.integer import residual_quantize
from qvg_jax.codecs.smoothing import KMeansState, kmeans_smoothing
from qvg_jax.codecs.smoothing.kmeans import deviations
from qvg_jax.codecs.smoothing.lloyd import restarted

# As the published code encodes: no warm start, no restarts. Then what this library does by default.
CODECS = {
    "qvg, 2 iterations": lambda: chain(
        kmeans_smoothing(256, 2, warm_start=False), residual_quantize(2, 64)
    ),
    "qvg-pro, 5 iterations": lambda: chain(
        kmeans_smoothing(256, 5, 4, warm_start=False), residual_quantize(2, 16)
    ),
    "midrise, 2 iterations": lambda: chain(
        kmeans_smoothing(256, 2, warm_start=False, centroid_dtype="int8"), grid_quantize(2)
    ),
    "qvg as preset": lambda: presets.get("qvg"),
    "dither as preset, keys": lambda: presets.pair("dither")[0],
}
# `benchmarks.all` leaves these out.
MORE = {
    "dither, 2 iterations": lambda: presets.pair("dither", cold_iters=2)[0],
    "dither-asym, 2 iterations": lambda: presets.pair("dither-asym", cold_iters=2)[1],
    "qvg-asym, 2 iterations": lambda: presets.get("qvg-asym", cold_iters=2),
    "qvg, 2 iterations, 1 in 4": lambda: chain(
        kmeans_smoothing(256, 2, warm_start=False, subsample=4), residual_quantize(2, 64)
    ),
    "qvg-pro, 5 iterations, 1 in 4": lambda: chain(
        kmeans_smoothing(256, 5, 4, warm_start=False, subsample=4), residual_quantize(2, 16)
    ),
    "dither as preset, keys, 1 in 4": lambda: presets.pair("dither", subsample=4)[0],
    "dither as preset, keys, warm": lambda: presets.pair("dither")[0],
    "dither as preset, keys, 1 in 4, warm": lambda: presets.pair("dither", subsample=4)[0],
    "qvg as preset, warm": lambda: presets.get("qvg"),
}
ON_XLA = {
    "trellis, keys": lambda: presets.pair("trellis")[0],
    "trellis, values": lambda: presets.pair("trellis")[1],
}
FORMS = {
    "pack, groups of 64": Integers(2, 64),
    "pack, groups of 16": Integers(2, 16),
    "pack, midrise lsq": Midrise(2, 0.9957, 2, recode=True),
    "pack, zero points": Integers(2, 128, zero_points=True),
}
DITHERED = {
    "pack, dithered": Dithered(2, 3.75, zero_points=False),
    "pack, dithered with a middle": Dithered(2, 3.5, zero_points=True),
}
VARIANTS = {
    "stages 3": Tuning(stages=3),
    "columns 64": Tuning(columns=64),
}
SHAPES = {f"{heads}x{tokens}": (heads, tokens) for heads, tokens in (*DECODE, (3, 1536))}
LARGE = list(SHAPES)[: len(DECODE)]
_PRODUCT = 2 * 256 * 128  # operations per token of a product with all centroids


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints a table, and returns and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument(
        "--shapes", nargs="*", type=one_of(SHAPES), default=LARGE, help=f"of {list(SHAPES)}"
    )
    parser.add_argument(
        "--codecs",
        nargs="*",
        default=list(CODECS | MORE),
        help=f"of {list(CODECS | MORE | ON_XLA)}",
    )
    parser.add_argument("--no-kernels", action="store_true", help="only whole codecs")
    parser.add_argument(
        "--implementation", nargs="+", default=["mosaic"], choices=ENCODERS, help="what encodes"
    )
    parser.add_argument(
        "--variants", action="store_true", help="other sizes of Mosaic's kernels too"
    )
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    print(f"{'encode':52} {'ms':>8} {'+-':>7} {'TFLOP/s':>8} {'/ copy':>7}", flush=True)
    copies: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        rows += _measured(
            shape, _beside(*SHAPES[shape], not args.no_kernels), {}, copies, args.repeats
        )
    for by in args.implementation if not args.no_kernels else []:
        for shape in args.shapes:
            jobs = _kernel_jobs(*SHAPES[shape], by, args.variants and by == "mosaic")
            rows += _measured(shape, jobs, _options(by), copies, args.repeats)
    for by in dict.fromkeys((*args.implementation, "xla")):
        codecs = CODECS | MORE if by in args.implementation else {}
        jobs_of = _codec_jobs(by, codecs | (ON_XLA if by == "xla" else {}))
        for shape in args.shapes:
            # One by one: each is printed before the next is compiled.
            for name, job in jobs_of(*SHAPES[shape], args.codecs).items():
                rows += _measured(shape, {name: job}, _options(by), copies, args.repeats)
    result = {"device": device.device_kind, "jax": jax.__version__, "encode": rows}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    return result


def codec_rows(
    shapes: Sequence[str],
    codecs: dict[str, Any],
    implementation: str,
    repeats: int,
    *,
    until: float | None = None,
) -> list[dict[str, Any]]:
    """Rows of times of whole codecs and of a copy of each span.

    Args:
        shapes: of `SHAPES`.
        codecs: functions that make them, by name.
        implementation: what encodes.
        repeats: timings of each.
        until: time of `time.monotonic` after which nothing begins; None for no end.
    """
    print(f"{'encode':52} {'ms':>8} {'+-':>7} {'TFLOP/s':>8} {'/ copy':>7}", flush=True)
    copies: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    options = _options(implementation)
    for shape in shapes:
        heads, tokens = SHAPES[shape]
        rows += _measured(shape, _beside(heads, tokens), {}, copies, repeats)
        for name in codecs:
            if until is not None and time.monotonic() > until:
                continue
            some = _codec_jobs(implementation, codecs)(heads, tokens, [name])
            rows += _measured(shape, some, options, copies, repeats)
    return rows


def _options(implementation: str) -> dict[str, Any]:
    """Options of XLA's compiler for what an implementation encodes.

    What runs on kernels has XLA's way inside, for spans with bad tokens. It is never run here, and
    searching for the fastest of its matrix products takes longer than all else.
    """
    return {} if implementation == "xla" else dict(xla_gpu_autotune_level=0)


def _beside(heads: int, tokens: int, parts: bool = False) -> dict[str, Any]:
    """Jobs that every implementation has beside its kernels: a copy and, with `parts`, what XLA always does."""
    x, c = noise((heads, tokens, 128), 1), noise((heads, 256, 128), 2)
    jobs: dict[str, Any] = {"copy": (lambda x: -x, (x,), 0)}
    if not parts:
        return jobs
    spare = jnp.arange(256)[None, None] % 8 == jnp.zeros((1, heads, 1), int)
    jobs["restart an eighth of the centroids, XLA"] = (
        lambda x, c, s: restarted(x[None], c[None], s, jnp.abs(x[None, ..., 0]).astype(jnp.float32)),
        (x, c, spare), 0,
    )  # fmt: skip
    jobs["channel sizes, XLA"] = (lambda x: channel_sizes(x[None]), (x,), 0)
    used = jnp.ones((1, heads, tokens), bool)
    jobs["deviations, XLA"] = (lambda x, u: deviations(x[None], u), (x, used), 0)
    return jobs


def _kernel_jobs(
    heads: int, tokens: int, implementation: str = "mosaic", variants: bool = False
) -> dict[str, Any]:
    """The jobs by name: (function, its arguments, number of matrix products with all centroids)."""
    x, c, ones = noise((heads, tokens, 128), 1), noise((heads, 256, 128), 2), jnp.ones((heads, 128))
    jobs: dict[str, Any] = {}
    by = dict(implementation=implementation)
    for name, tuning in ({"": None} | (VARIANTS if variants else {})).items():
        jobs[f"k-means sums {name}".strip()] = (
            lambda x, c, t=tuning: kmeans_sums(x, c, tuning=t, **by)[:2], (x, c), 2,
        )  # fmt: skip
        jobs[f"subtract {name}".strip()] = (
            lambda x, c, t=tuning: assign_and_subtract(x, c, tuning=t, **by), (x, c), 2,
        )  # fmt: skip
    for name, form in FORMS.items():
        jobs[name] = (lambda x, c, f=form: assign_and_pack(x, c, f, **by), (x, c), 2)
    jobs["subtract by a metric"] = (
        lambda x, c, one: assign_and_subtract(x, c, metric=Metric(0 * one, one), **by), (x, c, ones), 2,
    )  # fmt: skip
    for name, dithered in DITHERED.items():
        jobs[name] = (lambda x, one, f=dithered: pack_dithered(x, one, f, **by), (x, ones), 0)
    return {f"{name}, {implementation}": job for name, job in jobs.items()}


def _codec_jobs(implementation: str, codecs: dict[str, Any]) -> Any:
    def jobs(heads: int, tokens: int, wanted: Sequence[str]) -> dict[str, Any]:
        names, out = [name for name in wanted if name in codecs], {}
        x_BHTD = noise((1, heads, tokens, 128), 1) if names else None
        for name in names:
            codec = codecs[name]()
            state = codec.init(x_BHTD.shape, x_BHTD.dtype)
            if name.endswith("warm"):  # as after a span like this one
                c_BHSKD = x_BHTD[:, :, None, :256].astype(state[0].centroids_BHSKD.dtype)
                state = (KMeansState(c_BHSKD, jnp.ones((), bool)), *state[1:])
            named = {} if name in ON_XLA else dict(implementation=implementation)
            out[f"{name}, {implementation}"] = (
                lambda x, s, c=codec, n=named: c.encode(x, s, **n),
                (x_BHTD, state),
                0,
            )
        return out

    return jobs


def _measured(
    shape: str, jobs: dict[str, Any], options: dict, copies: dict[str, float], repeats: int
) -> list[dict[str, Any]]:
    """Rows of times of one shape; the time of a copy of it is put into `copies`."""
    (heads, tokens), rows = SHAPES[shape], []
    for name, call in compiled({n: job[:2] for n, job in jobs.items()}, **options):
        label = f"{heads} x {tokens} {name}"
        try:
            row = dict(heads=heads, tokens=tokens, what=name, **milliseconds(call, repeats))
        except jax.errors.JaxRuntimeError as error:
            print(f"{label}: {str(error).splitlines()[0][:200]}", flush=True)
            continue
        if name == "copy":
            copies[shape] = row["ms"]
        speed = ""
        if products := jobs[name][2]:
            row["tflop_per_s"] = products * _PRODUCT * heads * tokens / row["ms"] / 1e9
            speed = f"{row['tflop_per_s']:8.0f}"
        rows.append(row)
        share = f"{row['ms'] / copies[shape]:7.1f}" if shape in copies else ""
        print(f"{label:52} {row['ms']:8.4f} {row['spread']:7.4f} {speed:8} {share}", flush=True)
    return rows


if __name__ == "__main__":
    main()
