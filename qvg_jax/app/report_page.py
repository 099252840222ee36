"""report.html: a run on one page, without other files: its video arm over arm, plots, frames and numbers."""

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from qvg_jax.app.film import Film, View
from qvg_jax.app.headline import headlines, mean_label, title
from qvg_jax.app.html_parts import (
    COLOURS,
    data_url,
    document,
    line_plot,
    number,
    picture_url,
    table,
)
from qvg_jax.app.job import BASELINE
from qvg_jax.app.metrics import PSNR_CAP
from qvg_jax.app.report import SEEN
from qvg_jax.app.report_page_style import CSS, SCRIPT
from qvg_jax.files import replacing

__all__ = ["write_report_page"]

LARGEST_VIDEO = 64 << 20  # bytes that become part of the page; a larger video is read beside it
TOP_DB = 60.0  # of plots: equal frames count as 100


def write_report_page(
    path: str | os.PathLike,
    report: Mapping[str, Any],
    strip: Sequence[tuple[int, Mapping[str, UInt8[np.ndarray, "H W 3"]]]],
    film: Film,
    video: Path,
    command: str = "",
) -> None:
    """Writes a report as HTML; the file appears whole or not at all.

    Args:
        path: where the page appears.
        report: what `Record.report` returns.
        strip: frames to look at, as in `Record.strip`.
        film: what the video shows, and where.
        video: video.mp4, which becomes part of the page.
        command: the command that asked for the run; "" if it was not one.
    """
    parts = [
        f"<h1>{escape(title(report))}</h1>",
        "<ul class='headlines'>"
        + "".join(f"<li>{escape(said)}</li>" for said in headlines(report).values())
        + "</ul>",
        *(f"<p class='warning'>Warning: {escape(said)}.</p>" for said in report["warnings"]),
        _viewer(report, film, video),
        "<h2>Frame by frame</h2>",
        *_plots(report),
        "<h2>Frames</h2>",
        _strip(strip),
        "<h2>Numbers</h2>",
        _numbers(report),
        "<h2>How it was made</h2>",
        f"<pre><code>{escape(command)}</code></pre>" if command else "",
        f"<p>On {escape(report['device'])}. Versions: {escape(_versions(report))}.</p>",
        "<details><summary>All settings</summary>"
        f"<pre>{escape(json.dumps(report['config'], indent=2, ensure_ascii=False))}</pre></details>",
    ]
    html = document(f"qvg: {report['model']}", parts, style=CSS, script=SCRIPT)
    with replacing(path) as partial:
        Path(partial).write_text(html, encoding="utf-8")


def _viewer(report: Mapping[str, Any], film: Film, video: Path) -> str:
    """The video with one view over another, and a slider that wipes between them."""
    inside = video.stat().st_size <= LARGEST_VIDEO
    source = data_url(video.read_bytes(), "video/mp4") if inside else video.name
    if len(film.views) == 1:
        return f"<video controls loop class='alone' src='{source}'></video>"
    config = report["config"]
    left, right = _first_views(film.views)
    about = {
        "views": [{"name": view.name, "box": view.box} for view in film.views],
        "fps": config["fps"],
        "first": film.first,
        "tour": config["tour_frames"],
        "frames": config["frames"],
    }

    def choice(name: str, chosen: int) -> str:
        options = "".join(
            f"<option value='{i}'{' selected' if i == chosen else ''}>{escape(view.name)}</option>"
            for i, view in enumerate(film.views)
        )
        return f"<label>{name} <select id='{name}'>{options}</select></label>"

    # A canvas cuts the views out of the one video, so that they never run apart.
    return (
        f"<section class='viewer' data-about='{escape(json.dumps(about), quote=True)}' "
        "aria-label='The video, one arm over another'>"
        f"<video muted loop playsinline preload='auto' src='{source}'></video>"
        "<canvas role='img' aria-label='The chosen arms, one left and one right of a line'></canvas>"
        "<label class='row'>wipe <input type='range' id='wipe' min='0' max='100' value='50' "
        "aria-label='where the line between left and right is, in percent'></label>"
        f"<div class='row'>{choice('left', left)}{choice('right', right)}</div>"
        "<div class='row'><button type='button' id='play'>play</button>"
        "<input type='range' id='time' min='0' max='1000' value='0' aria-label='time'>"
        "<output id='frame'></output></div></section>"
    )


def _first_views(views: Sequence[View]) -> tuple[int, int]:
    """What the page begins with: bf16 on the left, if it is there, and the last other arm."""
    names = [view.name for view in views]
    arms = [i for i, name in enumerate(names) if "difference" not in name and name != "truth"]
    left = names.index(BASELINE) if BASELINE in names else 0
    return left, arms[-1]


def _plots(report: Mapping[str, Any]) -> list[str]:
    arms = report["arms"]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(arms)}
    plots = []
    for reference, known in (("truth", "seen_in_tour" in report), (BASELINE, BASELINE in arms)):
        shown = [name for name in arms if name != reference]
        if not known or not shown:
            continue
        values = {name: arms[name]["frames"][f"psnr_vs_{reference}"] for name in shown}
        frames = range(1, 1 + len(values[shown[0]]))
        what = "the ground truth" if reference == "truth" else "the bf16 arm"
        fields, note = _shaded(report, shown, reference)
        measured = [v for one in values.values() for v in one if v < PSNR_CAP] or [0.0, TOP_DB]
        said = f"PSNR of each generated frame to {what}"
        plot = line_plot(
            {name: (colours[name], values[name]) for name in shown},
            frames,
            title=f"{said}: " + ", ".join(mean_label(report, name, reference) for name in shown),
            top=min(TOP_DB, 5 * np.ceil(max(measured) / 5 + 0.1)),
            bottom=max(0, min(TOP_DB - 10, 5 * np.floor(min(measured) / 5 - 0.1))),
            step=5.0,
            labels={name: mean_label(report, name, reference) for name in shown},
            x_name="generated frame",
            unit="dB",
            behind=BASELINE,
            shaded=fields,
        )
        plots += [f"<h3>{said}</h3>", plot, f"<p><small>{note}</small></p>"]
    sizes = {name: np.array(a["bytes"]["in_use_after_block"]) / 1e6 for name, a in arms.items()}
    largest = max(float(size.max()) for size in sizes.values())
    step = 10.0 ** np.floor(np.log10(max(largest, 1e-3)))
    plots += [
        "<h3>KV cache in use</h3>",
        line_plot(
            {name: (colours[name], size) for name, size in sizes.items()},
            report["block_end_frames"],
            title="Megabytes of the KV cache in use after each block",
            top=1.1 * largest,
            step=step if largest / step > 2.5 else step / 2,
            height=200,
            labels={name: f"{name}: {size[-1]:.1f} MB at the end" for name, size in sizes.items()},
            unit="MB",
            behind=BASELINE,
            shaded=[(0, report["config"]["tour_frames"])],
        ),
        "<p><small>Teeth: the newest blocks wait in bf16 until a whole span can be compressed. "
        "Grey: the tour of real frames.</small></p>"
        if report["config"]["tour_frames"]
        else "<p><small>Teeth: the newest blocks wait in bf16 until a whole span can be "
        "compressed.</small></p>",
    ]
    return plots


def _shaded(
    report: Mapping[str, Any], shown: Sequence[str], reference: str
) -> tuple[list[tuple[float, float]], str]:
    """Fields of frames that the means leave out, and what to say of them."""
    firsts = [report["arms"][name]["first_compressed_frame"] for name in shown]
    first = min((f for f in firsts if f is not None), default=0)
    fields: list[tuple[float, float]] = [(0.5, first + 0.5)] if first else []
    notes = ["frames before the first compressed span"] if first else []
    if reference == "truth":
        unseen = np.array(report["seen_in_tour"]) < SEEN
        edges = np.flatnonzero(np.diff(np.r_[0, unseen, 0])) + 0.5
        fields += [(float(a), float(b)) for a, b in edges.reshape(-1, 2)]
        notes += ["places that the tour did not show"] if unseen.any() else []
    means = "Means are over the frames that are not grey." if notes else ""
    return fields, f"Grey: {' and '.join(notes)}. {means}" if notes else ""


def _strip(strip: Sequence[tuple[int, Mapping[str, UInt8[np.ndarray, "H W 3"]]]]) -> str:
    names = list(strip[0][1])
    rows = []
    for name in names:
        cells = [f"<b>{escape(name)}</b>"]
        for number_, frames in strip:
            alt = escape(f"{name}, generated frame {number_ + 1}", quote=True)
            cells.append(f"<img class='frame' alt='{alt}' src='{picture_url(frames[name])}'>")
        rows.append(cells)
    return table(("", *(f"frame {n + 1}" for n, _ in strip)), rows).replace(
        "class='wide'", "class='wide strip'"
    )


def _numbers(report: Mapping[str, Any]) -> str:
    keys = [k for k in next(reversed(report["arms"].values()))["means"]]
    head = ("arm", "bits per element", "cache MB", "times smaller", "compressed from frame")
    rows = []
    for name, arm in report["arms"].items():
        size, first = arm["bytes"], arm["first_compressed_frame"]
        speed = report["timings"]["arms"][name]["generated_frames_per_second"]
        forms = (".2f" if key.startswith("psnr") else ".3f" for key in keys)
        rows.append(
            (
                escape(name),
                number(arm["bits_per_element"]["from_buffers"], ".3f"),
                number(size["in_use"]["total"] / 1e6, ".1f"),
                number(size["times_smaller"], ".2f"),
                "-" if first is None else str(first + 1),
                *(number(arm["means"].get(k), form) for k, form in zip(keys, forms, strict=True)),
                number(speed, ".2f"),
            )
        )
    named = (" to ".join((k[: k.index("_")].upper(), k[k.rindex("_") + 1 :])) for k in keys)
    return table((*head, *named, "frames/s"), rows)


def _versions(report: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in report["versions"].items())
