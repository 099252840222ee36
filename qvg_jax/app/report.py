"""Reports: measurements of a run frame by frame, report.json, and a small table."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from qvg_jax.app.job import BASELINE, Job, Made
from qvg_jax.app.metrics import METRICS, Metric
from qvg_jax.app.versions import versions
from qvg_jax.cache.layout import Layout
from qvg_jax.files import replacing

__all__ = ["SEEN", "Record", "aligned", "configuration", "table", "write_json"]

SEEN = 0.95  # a frame has a ground truth if the tour has shown this share of its view
STRIP = 8  # frames of report.png's strip


class Record:
    """Collects what `lockstep` yields; a thousand frames cost it a few numbers each.

    `metrics` are functions `metric(frame_HW3, reference_HW3)`, known by their names.
    """

    def __init__(self, job: Job, metrics: Sequence[Metric] = METRICS):
        self._job, self._metrics = job, metrics
        self._names = [arm.name for arm in job.arms]
        self._layouts = {arm.name: job.cache(arm.state).layout for arm in job.arms}
        self._scores = {name: {} for name in self._names}
        self._sizes = {name: [] for name in self._names}
        self._seconds = {name: [] for name in self._names}
        self._parts = {name: [] for name in self._names}
        self._kept = {name: [] for name in self._names}
        self._ends, self._seen, self._last = [], [], {}
        self._first: dict[str, int] = {}  # frame, tour included, from which spans are read
        count = min(STRIP, job.frames)
        self._wanted = np.linspace(0, job.frames - 1, count).round().astype(int).tolist()
        self.strip: list[tuple[int, dict[str, UInt8[np.ndarray, "H W 3"]]]] = []

    def add(self, made: Made) -> None:
        """Takes in one block."""
        for name in self._names:
            self._sizes[name].append(made.bytes[name].in_use.total)
            self._seconds[name].append(made.seconds[name])
            self._parts[name].append(made.parts[name])
            self._kept[name].append(made.kept[name])
            if made.bytes[name].in_use.spans:  # a block reads what the blocks before it have left
                self._first.setdefault(name, made.first + made.count)
        self._ends.append(made.first + made.count)
        self._last = made.bytes
        for i in range(made.count):
            if (number := made.first + i - self._job.tour) >= 0:
                pictures = {name: made.frames[name][i] for name in self._names}
                truth = {}
                if made.truth_FHW3 is not None:
                    truth = {"truth": made.truth_FHW3[i]}
                    self._seen.append(float(made.seen_F[i]))
                self._add_frame(number, truth, pictures)

    def _add_frame(self, number, truth, pictures):
        for name, frame_HW3 in pictures.items():
            references = dict(truth)
            if self._job.baseline not in (None, name):
                references[BASELINE] = pictures[BASELINE]
            for other, reference_HW3 in references.items():
                for metric in self._metrics:
                    values = self._scores[name].setdefault(f"{metric.__name__}_vs_{other}", [])
                    values.append(round(metric(frame_HW3, reference_HW3), 4))
        if number in self._wanted:
            self.strip.append((number, truth | pictures))

    def report(self, **settings: Any) -> dict[str, Any]:
        """The content of report.json: JSON types only, all that varies between runs in "timings".

        Args:
            **settings: more entries for "config", such as fps.
        """
        job = self._job
        device = jax.devices()[0]
        units = {
            "psnr": "dB, 8-bit RGB, at most 100",
            "first_compressed_frame": "of the lists in frames, from 0; null: no span was encoded",
            "means": "over frames from first_compressed_frame on, which read compressed spans",
            "means_vs_truth": f"of these, the frames with seen_in_tour >= {SEEN}",
            "bytes": "of the device's buffers; bf16_would_be: K and V of the same tokens alone",
            "times_smaller": f"in_use.total of the {BASELINE} arm / in_use.total of this one",
            "block_seconds": "of each block; parts and all kept blocks (read again) included",
        }
        if not job.truth:
            del units["means_vs_truth"]
        return {
            "model": job.model,
            "versions": versions(),
            "device": f"{device.platform}: {device.device_kind}",
            "config": configuration(job, **settings),
            "units": units,
            "arms": {name: self._arm(name) for name in self._names},
            **({"seen_in_tour": [round(x, 4) for x in self._seen]} if job.truth else {}),
            "block_end_frames": self._ends,
            "warnings": self._warnings(),
            "timings": {
                "processors": len(os.sched_getaffinity(0)),
                "arms": {name: self._timing(name) for name in self._names},
            },
        }

    def _arm(self, name: str) -> dict[str, Any]:
        lay, last = self._layouts[name], self._last[name]
        kept = last.allocated.spans
        elements = lay.max_spans * lay.span_elements
        if not lay.max_spans:  # all is in the window, or the history is too short for a span
            kept = last.allocated.sink + last.allocated.window
            dense = lay.batch * lay.heads * lay.dense_blocks * lay.block_tokens * lay.head_dim
            elements = 2 * lay.layers * dense
        in_use = last.in_use._asdict() | {"total": last.in_use.total}
        base = self._job.baseline and self._last[BASELINE].in_use.total
        return {
            "codec": lay.key_codec.name,
            "bits_per_element": {
                "from_formats": lay.span_bits,
                "from_buffers": 8 * kept / elements if elements else 0.0,
            },
            **_history(lay),
            "bytes": {
                "tokens": last.tokens,
                "in_use": in_use,
                "allocated": last.allocated._asdict() | {"total": last.allocated.total},
                "bf16_would_be": last.bf16,
                "times_smaller": round(base / in_use["total"], 4) if base else None,
                "in_use_after_block": self._sizes[name],
            },
            "first_compressed_frame": self._first_compressed(name),
            "means": self._means(name),
            "frames": self._scores[name],
        }

    def _first_compressed(self, name: str) -> int | None:
        """The first generated frame that an arm made from compressed spans; None without one.

        An arm without spans, such as a bf16 window, is judged over the frames of the arms that have some.
        """
        own = self._first.get(name, min(self._first.values(), default=None))
        if own is None or own >= self._job.tour + self._job.frames:
            return None
        return max(0, own - self._job.tour)

    def _means(self, name: str) -> dict[str, float | None]:
        """Means of an arm's scores over the frames in which compression can be seen.

        Frames before the first encoded span equal those of bf16: they would count at the cap of
        100 dB and make short videos look close. If no span was read at all, there is no mean to
        bf16, and the one to the truth is over all frames.
        """
        first = self._first_compressed(name)

        def mean(key: str, values: list[float]) -> float | None:
            judged = np.arange(len(values)) >= (first or 0)
            if key.endswith("truth"):
                judged &= np.array(self._seen) >= SEEN
            elif first is None:
                return None
            return round(float(np.array(values)[judged].mean()), 4) if judged.any() else None

        return {key: mean(key, values) for key, values in self._scores[name].items()}

    def _warnings(self) -> list[str]:
        names = [n for n in self._names if n != BASELINE and self._first_compressed(n) is None]
        if not names:
            return []
        return [
            f"{', '.join(names)}: no frame was made from a compressed span, so nothing here tells of "
            f"compression; all {self._job.tour + self._job.frames} frames fit in the sink and the "
            "window: give more --frames"
        ]

    def _timing(self, name: str) -> dict[str, Any]:
        seconds, job = self._seconds[name], self._job
        frames = np.diff([0, *self._ends])
        real = np.array(self._ends) <= job.tour
        kept = np.array(self._kept[name])
        timed = np.arange(len(seconds)) > 0  # the first one waits for the compiler

        def rate(which: np.ndarray) -> float | None:
            spent = float(np.array(seconds)[which].sum())
            return round(int(frames[which].sum()) / spent, 3) if which.any() else None

        timing = {
            "seconds": round(sum(seconds), 3),
            "first_block_and_compilation_seconds": round(seconds[0], 3),
            "tour_frames_per_second": rate(timed & real & ~kept),
            "generated_frames_per_second": rate(timed & ~real & ~kept),
        }
        if parts := {key: None for part in self._parts[name] for key in part}:
            timing["block_seconds"] = [round(s, 4) for s in seconds]
            for key in parts:
                values = [round(part.get(key, 0.0), 4) for part in self._parts[name]]
                timing[f"block_{key}_seconds"] = values
        if kept.any():
            timing["kept_blocks"] = int(kept.sum())
        return timing


def configuration(job: Job, **settings: Any) -> dict[str, Any]:
    """The entry "config" of a job's report, with more of its settings, such as fps."""
    return {"tour_frames": job.tour, "frames": job.frames} | job.config | settings


def write_json(path: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """Writes a report, lists of numbers on one line; the file appears whole or not at all."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[[\s\d.,eE+-]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text)
    with replacing(path) as partial:
        Path(partial).write_text(text + "\n", encoding="utf-8")


def table(report: Mapping[str, Any]) -> str:
    """The main numbers of a report as text: a line for each arm, and the report's warnings."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    scores = [
        (f"{metric.upper()} {other}", f"{metric}_vs_{other}", form)
        for other in ("truth", BASELINE)
        for metric, form in (("psnr", ".2f"), ("ssim", ".3f"))
        if any(f"{metric}_vs_{other}" in arm["means"] for arm in report["arms"].values())
    ]
    rows = [("arm", "bits/element", "cache MB", "smaller", *(s[0] for s in scores), "frames/s")]
    for name, arm in report["arms"].items():
        means, size = arm["means"], arm["bytes"]
        smaller = size["times_smaller"]
        speed = report["timings"]["arms"][name]["generated_frames_per_second"]
        rows.append(
            (
                name,
                show(arm["bits_per_element"]["from_buffers"], ".3f"),
                show(size["in_use"]["total"] / 1e6, ".1f"),
                "-" if smaller is None else f"{smaller:.2f}x",
                *(show(means.get(key), form) for _, key, form in scores),
                show(speed, ".2f"),
            )
        )
    return "\n".join([aligned(rows), *(f"warning: {said}" for said in report["warnings"])])


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as columns, numbers to the right and words to the left, with a rule below the head."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [any(cell[:1].isalpha() for cell in column[1:]) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _history(lay: Layout) -> dict[str, Any]:
    """What the report of an arm says about heads without a history; nothing where all have one."""
    found = lay.history
    if found is None:
        return {}
    return {
        "heads_with_history": {
            "count": found.full,
            "of": found.layers * found.heads,
            "by_layer": list(found.counts),
            "local_blocks": found.local_blocks,
        }
    }
