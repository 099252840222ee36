"""Speed of encoding spans: `python -m benchmarks.encode --json encode.json` on a Hopper GPU.

One layer's span of K or V through whole codecs, cold, on the kernels and on XLA; then the kernels
by themselves, with the share of their arithmetic in what the tensor cores can do, and a copy of the
span. Numbers as in `benchmarks.kernels`.
"""

import argparse
import json
from typing import Any

import jax

from benchmarks.kernel_cases import DECODE, noise
from benchmarks.kernels import compiled, milliseconds
from pallas_kernels.kmeans import kmeans_sums
from pallas_kernels.kmeans.mosaic_gpu import Tuning
from pallas_kernels.quantize_pack import Integers, Midrise, assign_and_pack, assign_and_subtract
from qvg_jax import presets
from qvg_jax.codec import chain
from qvg_jax.quantize.grid import grid_quantize
from qvg_jax.quantize.integer import residual_quantize
from qvg_jax.smoothing import kmeans_smoothing

# As the published code encodes: no warm start, no restarts. Then what this library does by default.
CODECS = {
    "qvg, 2 iterations": lambda: chain(
        kmeans_smoothing(256, 2, warm_start=False), residual_quantize(2, 64)
    ),
    "midrise, 2 iterations": lambda: chain(
        kmeans_smoothing(256, 2, warm_start=False, centroid_dtype="int8"), grid_quantize(2)
    ),
    "qvg-pro, 5 iterations": lambda: chain(
        kmeans_smoothing(256, 5, 4, warm_start=False), residual_quantize(2, 16)
    ),
    "qvg as preset": lambda: presets.get("qvg"),
}
FORMS = {
    "pack, groups of 64": Integers(2, 64),
    "pack, groups of 16": Integers(2, 16),
    "pack, midrise lsq": Midrise(2, 0.9957, 2, recode=True),
}
VARIANTS = {
    "stages 3": Tuning(stages=3),
    "at once": Tuning(late=False),
    "columns 64": Tuning(columns=64),
    "columns 256": Tuning(columns=256, late=False),
}
_PRODUCT = 2 * 256 * 128  # operations per token of a product with all centroids


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints a table, and returns and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--codecs", nargs="*", default=list(CODECS), help=f"of {list(CODECS)}")
    parser.add_argument("--no-xla", action="store_true", help="leave the slow opponent out")
    parser.add_argument("--variants", action="store_true", help="other sizes of the kernels too")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    print(f"{'encode':52} {'ms':>8} {'+-':>7} {'TFLOP/s':>8} {'/ copy':>7}")
    rows: list[dict[str, Any]] = []
    for heads, tokens in DECODE:
        rows += _shape(heads, tokens, args)
    result = {"device": device.device_kind, "jax": jax.__version__, "encode": rows}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    return result


def _shape(heads: int, tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    x, c = noise((heads, tokens, 128), 1), noise((heads, 256, 128), 2)
    jobs: dict[str, Any] = {"copy": (lambda x: -x, (x,))}
    products = {}
    tunings = {"": None} | (VARIANTS if args.variants else {})
    for name, tuning in tunings.items():
        label = f"k-means sums {name}"
        jobs[label] = (lambda x, c, t=tuning: kmeans_sums(x, c, tuning=t)[:2], (x, c))
        products[label] = 2
        label = f"subtract {name}"
        jobs[label] = (lambda x, c, t=tuning: assign_and_subtract(x, c, tuning=t), (x, c))
        products[label] = 2
    for name, form in FORMS.items():
        jobs[name] = (lambda x, c, f=form: assign_and_pack(x, c, f), (x, c))
        products[name] = 2
    x_BHTD = x[None]
    for name in args.codecs:
        codec = CODECS[name]()
        state = codec.init(x_BHTD.shape, x.dtype)
        for implementation in ("mosaic",) if args.no_xla else ("mosaic", "xla"):
            jobs[f"{name}, {implementation}"] = (
                lambda x, s, c=codec, i=implementation: c.encode(x, s, implementation=i),
                (x_BHTD, state),
            )
    rows, copy = [], None
    for name, call in compiled(jobs).items():
        row = dict(heads=heads, tokens=tokens, what=name, **milliseconds(call, args.repeats))
        copy = row["ms"] if name == "copy" else copy
        speed = ""
        if name in products:
            row["tflop_per_s"] = products[name] * _PRODUCT * heads * tokens / row["ms"] / 1e9
            speed = f"{row['tflop_per_s']:8.0f}"
        rows.append(row)
        share = f"{row['ms'] / copy:7.1f}" if copy else ""
        label = f"{heads} x {tokens} {name}"
        print(f"{label:52} {row['ms']:8.4f} {row['spread']:7.4f} {speed:8} {share}", flush=True)
    return rows


if __name__ == "__main__":
    main()
