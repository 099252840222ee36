"""verify.html: one page without other files, to be attached to an issue."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from qvg_jax.app.html_parts import COLOURS, data_url, document, line_plot, number, table
from qvg_jax.files import replacing

__all__ = ["write_page"]

TOP_DB = 60.0  # curves are cut off above


def write_page(path: str | os.PathLike, result: Mapping[str, Any], picture: Path) -> None:
    """Writes a verification as HTML; the file appears whole or not at all.

    Args:
        path: where the page appears.
        result: the content of verify.json.
        picture: report.png of the first video, which becomes part of the page.
    """
    model, verdict = escape(result["model"]), result["verdict"]
    weights = result["weights"]
    files = weights if isinstance(weights, str) else ", ".join(weights or ()) or "its own"
    parts = [
        f"<h1>qvg verify {model}: <span class='{verdict}'>{verdict}</span></h1>",
        f"<p>Device: {escape(result['device'])}. Weights: {escape(files)}. "
        f"{len(result['videos'])} videos; versions: {escape(_versions(result))}.</p>",
        "<h2>Distance to the bf16 run</h2>",
        _measured(result),
        "<h2>Bands</h2>" + _bands(result["bands"]) if result["bands"] else "",
        "<h2>What others measured</h2>" + _published(result) if result["published"] else "",
        *(f"<p><small>{escape(note)}</small></p>" for note in result["notes"]),
        "<h2>PSNR of each frame, mean of the videos</h2>",
        _plot(result["videos"]),
        "<h2>Videos</h2>",
        _videos(result["videos"]),
        _image(picture),
    ]
    html = document(f"qvg verify {result['model']}", parts)
    with replacing(path) as partial:
        Path(partial).write_text(html, encoding="utf-8")


def _measured(result: Mapping[str, Any]) -> str:
    forms = {"psnr": ".2f", "ssim": ".3f", "lpips": ".3f"}
    metrics = [m for m in forms if m in result["table"][0]]
    rows = []
    for row in result["table"]:
        cells = []
        for m in metrics:
            value = row[m]
            if value is None:
                cells.append("-")
                continue
            spread = f"{value['least']:{forms[m]}} to {value['most']:{forms[m]}}"
            cells.append(f"{value['mean']:{forms[m]}} <small>({spread})</small>")
        bits, smaller = (
            number(row["bits_per_element"], ".3f"),
            number(row["times_smaller"], ".2f"),
        )
        rows.append((escape(row["codec"]), bits, smaller, escape(row["window"]), *cells))
    return table(("codec", "bits", "times smaller", "frames", *map(str.upper, metrics)), rows)


def _bands(bands: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for b in bands:
        verdict = f"<span class='{b['verdict']}'>{b['verdict']}</span>"
        because = f" <small>({escape(b['because'])})</small>" if b["because"] else ""
        got = number(b["measured"], ".2f")
        who, why = (escape(b["recipe"]), escape(b["window"])), escape(b["why"])
        rows.append((verdict + because, *who, got, f"{b['least']:g}", why))
    return table(("verdict", "codec", "frames", "PSNR", "least", "why"), rows)


def _published(result: Mapping[str, Any]) -> str:
    """Numbers of others, each beside ours of the nearest recipe and the same frames."""
    ours = {(r["codec"], r["window"]): r["psnr"] for r in result["table"]}
    rows = []
    for p in result["published"]:
        here = ours.get((p["ours"], p["window"]))
        where = escape(p["window"] or "not stated")
        theirs = (f"{p['psnr']:.2f}", number(p["ssim"], ".3f"), number(p["lpips"], ".3f"))
        mine = "-" if here is None else f"{here['mean']:.2f}"
        rows.append((escape(p["recipe"]), where, *theirs, mine, escape(p["source"])))
    head = ("codec", "frames", "PSNR", "SSIM", "LPIPS", "PSNR here", "source")
    return table(head, rows)


def _videos(videos: Sequence[Mapping[str, Any]]) -> str:
    rows = [(v["name"], str(v["seed"]), escape(v["prompt"] or "-")) for v in videos]
    return table(("folder", "seed", "prompt"), rows)


def _plot(videos: Sequence[Mapping[str, Any]]) -> str:
    """PSNR over frames as SVG, a line for each codec."""
    arms = list(videos[0]["frames"])
    count = min(len(v["frames"][arm]["psnr"]) for v in videos for arm in arms)
    curves = {
        arm: (
            COLOURS[i % len(COLOURS)],
            np.mean([v["frames"][arm]["psnr"][:count] for v in videos], 0).tolist(),
        )
        for i, arm in enumerate(arms)
    }
    title = "PSNR of each frame to the bf16 run, mean of the videos"
    return line_plot(curves, range(count), title=title, top=TOP_DB, step=10.0, unit="dB")


def _image(picture: Path) -> str:
    return (
        f"<img alt='report of the first video' src='{data_url(picture.read_bytes(), 'image/png')}'>"
    )


def _versions(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in result["versions"].items())
