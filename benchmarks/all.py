"""All tables of kernels on any NVIDIA GPU in one command: `python -m benchmarks.all --json mine.json`.

It takes less than six minutes: what has not begun by then is left out, and said. Attention to a compressed
cache stands beside dense attention to the same keys in bf16, encoding beside a copy of the span. The ratios
are compared with the last accepted ones of the same device in `benchmarks/accepted.json`: the exit code is 1
if one is more than `--tolerance` above them, 2 without a GPU. Times are not compared: clocks differ.

A device that is not there yet is welcome: send the JSON, which names it. `--accept` writes this run's ratios
as the device's accepted ones, `--tiny` runs the whole program at small sizes on any machine.
"""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import attention_cases, encode, kernels
from benchmarks.attention_cases import Row
from benchmarks.common import positive
from qvg_jax.app.report import aligned
from qvg_jax.backends import capability, no_hopper, no_triton
from qvg_jax.codecs import presets

ACCEPTED = Path(__file__).with_name("accepted.json")
BUDGET = 330.0  # seconds after which nothing new begins
ROWS = ("self-forcing", "longcat", "worldplay", "few queries", "64 channels")
TINY = (Row("tiny", 2, 16, 256, 2),)
TINY_CODECS = {"rtn": lambda: presets.get("rtn")}


def main(argv: list[str] | None = None) -> int:
    """Measures, compares, prints and writes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--tolerance", type=float, default=0.08, help="of a ratio; 0.08 is 8 %%")
    parser.add_argument("--accepted", type=Path, default=ACCEPTED, help="file of accepted ratios")
    parser.add_argument("--accept", action="store_true", help="write this run's ratios there")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any machine")
    asked = parser.parse_args(argv)
    if not asked.tiny and (capability() or (0,)) < (8, 0):
        platform = jax.devices()[0].platform
        print(
            f"benchmarks.all: no NVIDIA GPU of compute capability 8.0 or more, the default device is "
            f"{platform}; accepted: such a GPU, or --tiny",
            file=sys.stderr,
        )
        return 2
    result = measure(asked.repeats, tiny=asked.tiny)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    found = ratios(result)
    known = json.loads(asked.accepted.read_text()) if asked.accepted.is_file() else {}
    slower = compared(result["device"], found, known, asked.tolerance)
    if asked.accept:
        entry = {"date": result["date"], "jax": result["jax"], "ratios": found}
        known[result["device"]] = entry | {"source": "python -m benchmarks.all --accept"}
        asked.accepted.write_text(json.dumps(known, indent=1) + "\n")
        print(f"wrote the ratios of {result['device']} to {asked.accepted}")
    return 1 if slower else 0


def measure(repeats: int, *, tiny: bool = False) -> dict[str, Any]:
    """Both tables, with the device, the date, and what the time did not suffice for."""
    begin = time.monotonic()
    hopper, until = no_hopper() is None, begin + BUDGET
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    reads = ["mosaic_fp8", "mosaic", "cudnn", "xla"] if hopper else ["cudnn", "xla"]
    if tiny:
        reads, rows, rival = ["xla"], TINY, "xla"
        codecs, shapes, by = TINY_CODECS, ["3x1536"], "xla"
    else:
        rows = [row for row in attention_cases.ROWS if row.name in ROWS]
        rival, codecs, shapes = "cudnn", encode.CODECS, encode.LARGE
        by = "mosaic" if hopper else "triton" if no_triton() is None else "xla"
    attention = kernels.attention_table(repeats, None, reads, rows=rows, rival=rival, until=until)
    encoding = encode.codec_rows(shapes, codecs, by, repeats, until=until)
    measured = {entry["row"] for entry in attention}
    left_out = [f"attention: {row.name}" for row in rows if row.name not in measured]
    measured = {(f"{e['heads']}x{e['tokens']}", e["what"]) for e in encoding}
    left_out += [
        f"encode: {shape}, {name}"
        for shape in shapes
        for name in codecs
        if (shape, f"{name}, {by}") not in measured
    ]
    for name in left_out:
        print(f"left out: {name}")
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(time.monotonic() - begin, 1),
        "rival_of_attention": f"{rival} bf16",
        "attention": attention,
        "encode": encoding,
        "left_out": left_out,
    }


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """The ratios of a result by name: of dense bf16 attention, and of a copy of the span."""
    found = {}
    for entry in result["attention"]:
        if "ratio" in entry and entry["read"] != result["rival_of_attention"]:
            found[f"attention: {entry['row']}, {entry['read']}"] = round(entry["ratio"], 4)
    copies = {(e["heads"], e["tokens"]): e["ms"] for e in result["encode"] if e["what"] == "copy"}
    for entry in result["encode"]:
        shape = entry["heads"], entry["tokens"]
        if entry["what"] != "copy" and shape in copies:
            name = f"encode: {shape[0]}x{shape[1]}, {entry['what']}"
            found[name] = round(entry["ms"] / copies[shape], 3)
    return found


def compared(
    device: str, found: dict[str, float], known: dict[str, Any], tolerance: float
) -> list[str]:
    """Prints ratios beside the accepted ones of the device; returns the names of those that are worse."""
    if device not in known:
        print(
            f"\n{device} has no accepted ratios; known: {', '.join(known) or 'none'}. Send the JSON, or "
            "run with --accept"
        )
        return []
    accepted, slower = known[device]["ratios"], []
    rows = [("ratio", "accepted", "now", "")]
    for name in sorted(accepted.keys() | found.keys()):
        was, now = accepted.get(name), found.get(name)
        verdict = ""
        if was is not None and now is not None:
            if now > was * (1 + tolerance):
                slower.append(name)
                verdict = "slower"
            elif now < was * (1 - tolerance):
                verdict = "faster"
        cells = ("-" if x is None else f"{x:.3f}" for x in (was, now))
        rows.append((name, *cells, verdict))
    print(f"\naccepted on {known[device]['date']}, {known[device]['source']}:\n{aligned(rows)}")
    if slower:
        print(f"slower by more than {tolerance:.0%}: {'; '.join(slower)}")
    return slower


if __name__ == "__main__":
    raise SystemExit(main())
