"""The measurement of `qvg verify`: videos of a protocol with bf16 and with codecs, in one environment.

Every video is a run of `generate` with a folder of its own. The frames of the arms are compared with
those of the bf16 arm, window by window, and put beside what others measured with the same weights.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qvg_jax.app.generate import Outcome
from qvg_jax.app.job import BASELINE
from qvg_jax.app.metrics import Metric
from qvg_jax.app.model_entry import GenerateOptions, ModelEntry
from qvg_jax.app.protocol import Protocol, VerifyOptions, Window
from qvg_jax.app.report import aligned, write_json
from qvg_jax.app.verify_page import write_page
from qvg_jax.files import replacing, writable_folder

__all__ = ["Case", "cases", "summary_table", "verify"]

RANDOM = "random"
NOT_JUDGED = "not judged"

# run(options, metrics) makes one video
type Runner = Callable[[GenerateOptions, Sequence[Metric]], Outcome]


@dataclasses.dataclass(frozen=True)
class Case:
    """One video of a protocol: a name and the options of its run."""

    name: str
    options: Any


def cases(entry: ModelEntry, options: GenerateOptions, how: VerifyOptions) -> list[Case]:
    """The videos of a model's protocol, with what its user asks for instead.

    Args:
        entry: a model with a protocol.
        options: of the model; a prompt stands for all those of the protocol, a codec or `compare`
            for its recipes, and each video has the next seed.
        how: how many videos.
    """
    protocol = entry.protocol
    assert protocol is not None
    fields = {f.name: f.default for f in dataclasses.fields(options)}
    changes: dict[str, Any] = {
        name: value
        for name, value in ({"frames": protocol.frames} | dict(protocol.options)).items()
        if getattr(options, name) == fields[name]
    }
    asked = options.codecs
    if {*asked} - {BASELINE} == {entry.default_codec}:
        asked += protocol.recipes
    first, *rest = dict.fromkeys((*asked, BASELINE))
    changes |= dict(codec=first, compare=tuple(rest))
    given = getattr(options, "prompt", None)
    prompts = (given,) if given else protocol.prompts or (None,)
    found = []
    for i in range(how.videos or len(prompts)):
        name = f"video-{i + 1:02d}"
        own = dict(seed=options.seed + i, out=options.out / name)
        if protocol.prompts:
            own["prompt"] = prompts[i % len(prompts)]
        found.append(Case(name, dataclasses.replace(options, **(changes | own))))
    return found


def verify(
    entry: ModelEntry,
    options: GenerateOptions,
    how: VerifyOptions,
    run: Runner,
    metrics: Sequence[Metric],
) -> dict[str, Any] | None:
    """Makes the videos, writes verify.json and verify.html to `options.out`.

    With the option `resume`, a video whose report is there for the same options is not made again,
    and one that was interrupted goes on.

    Args:
        entry, options, how: as in `cases`.
        run: `run(options, metrics)` makes one video and its report.
        metrics: what compares frames.

    Returns:
        The content of verify.json; None if the user interrupted the run.
    """
    protocol = entry.protocol
    assert protocol is not None
    out = writable_folder(options.out)
    made = []
    for case in cases(entry, options, how):
        report = _made(case, run, metrics)
        if report is None:
            return None
        made.append((case, report))
    result = summary(entry.name, protocol, made, [m.__name__ for m in metrics])
    write_json(out / "verify.json", result)
    picture = options.out / made[0][0].name / "report.png"
    write_page(out / "verify.html", result, picture)
    return result


def _made(case: Case, run: Runner, metrics: Sequence[Metric]) -> dict[str, Any] | None:
    """The report of one video; None if it was interrupted."""
    options = case.options
    folder = writable_folder(options.out)
    asked = {
        name: str(value)
        for name, value in dataclasses.asdict(options).items()
        if name not in ("out", "resume", "restart")
    }
    asked["metrics"] = ",".join(m.__name__ for m in metrics)
    note, report = folder / "verified_options.json", folder / "report.json"
    done = getattr(options, "resume", False) and note.is_file() and report.is_file()
    if done and json.loads(note.read_text()) == asked:
        return json.loads(report.read_text())
    outcome = run(options, metrics)
    if outcome.report is None:
        return None
    with replacing(note) as partial:
        Path(partial).write_text(json.dumps(asked, indent=1) + "\n")
    return outcome.report


def summary(
    model: str,
    protocol: Protocol,
    made: Sequence[tuple[Case, dict[str, Any]]],
    metrics: Sequence[str],
) -> dict[str, Any]:
    """The content of verify.json, as JSON types.

    Args:
        model: name of the model.
        protocol: what the reports were made for.
        made: each video with its report.
        metrics: names of the metrics.
    """
    reports = [report for _, report in made]
    arms = [name for name in reports[0]["arms"] if name != BASELINE]
    table = [
        {
            "codec": arm,
            "window": window.name,
            "bits_per_element": reports[0]["arms"][arm]["bits_per_element"]["from_formats"],
            "times_smaller": reports[0]["arms"][arm]["bytes"]["times_smaller"],
            **{metric: _mean(reports, arm, metric, window) for metric in metrics},
        }
        for arm in arms
        for window in protocol.windows
    ]
    random = any(case.options.weights == RANDOM for case, _ in made)
    bands = [_judged(band, table, random) for band in protocol.bands]
    verdicts = {band["verdict"] for band in bands} - {NOT_JUDGED}
    return {
        "model": model,
        "verdict": "fail" if "fail" in verdicts else "pass" if verdicts else NOT_JUDGED,
        "weights": RANDOM if random else reports[0]["config"].get("weights"),
        "device": reports[0]["device"],
        "versions": reports[0]["versions"],
        "windows": [dataclasses.asdict(w) for w in protocol.windows],
        "table": table,
        "bands": bands,
        "published": [dataclasses.asdict(row) for row in protocol.published],
        "notes": list(protocol.notes),
        "videos": [
            {
                "name": case.name,
                "prompt": getattr(case.options, "prompt", None),
                "seed": case.options.seed,
                "config": report["config"],
                "frames": {
                    arm: {m: report["arms"][arm]["frames"][f"{m}_vs_{BASELINE}"] for m in metrics}
                    for arm in arms
                },
            }
            for case, report in made
        ],
    }


def _mean(
    reports: Sequence[dict[str, Any]], arm: str, metric: str, window: Window
) -> dict[str, float] | None:
    """Mean over videos of the mean over a window's frames, and the videos' extremes."""
    means = []
    for report in reports:
        values = report["arms"][arm]["frames"][f"{metric}_vs_{BASELINE}"]
        if part := values[window.first : window.end]:
            means.append(float(np.mean(part)))
    if not means:
        return None
    named = dict(mean=np.mean(means), least=min(means), most=max(means))
    return {name: round(float(value), 4) for name, value in named.items()}


def _judged(band: Any, table: Sequence[dict[str, Any]], random: bool) -> dict[str, Any]:
    """A band with what was measured: "pass", "fail", or "not judged" and why."""
    rows = [r for r in table if (r["codec"], r["window"]) == (band.recipe, band.window)]
    value = rows[0]["psnr"]["mean"] if rows and rows[0]["psnr"] else None
    if random:
        verdict, because = NOT_JUDGED, "the weights are random"
    elif value is None:
        verdict, because = NOT_JUDGED, "no such arm, or too few frames"
    else:
        verdict, because = "pass" if value >= band.least else "fail", ""
    return dataclasses.asdict(band) | dict(measured=value, verdict=verdict, because=because)


def summary_table(result: dict[str, Any]) -> str:
    """The table of a verification as text, and the bands below it."""
    metrics = [m for m in ("psnr", "ssim", "lpips") if m in result["table"][0]]
    rows = [("codec", "bits", "frames", *(m.upper() for m in metrics))]
    for row in result["table"]:
        means = ("-" if row[m] is None else f"{row[m]['mean']:.3f}" for m in metrics)
        rows.append((row["codec"], f"{row['bits_per_element']:.3f}", row["window"], *means))
    lines = [aligned(rows), ""]
    for band in result["bands"]:
        got = "-" if band["measured"] is None else f"{band['measured']:.2f}"
        because = f" ({band['because']})" if band["because"] else ""
        lines.append(
            f"{band['verdict']}{because}: {band['recipe']}, {band['window']}: PSNR {got} dB, "
            f"least {band['least']:g} dB"
        )
    return "\n".join([*lines, f"verdict: {result['verdict']}"])
