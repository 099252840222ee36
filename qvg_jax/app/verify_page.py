"""verify.html: one page without other files, to be attached to an issue."""

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from qvg_jax.files import replacing

__all__ = ["write_page"]

COLOURS = ("#1f77d0", "#e0812a", "#2a9d6f", "#a454c4", "#c2407a", "#5b6270")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d2129; background: #fff; }
table { border-collapse: collapse; margin: .6rem 0 1.4rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #dfe3e8; text-align: left; }
.pass { color: #1b7f4d; } .fail { color: #b3261e; } small { color: #6a7280; }
img, svg { max-width: 100%; }
"""
WIDTH, HEIGHT, LEFT, BOTTOM = 900, 260, 46, 28  # of the plot, in pixels
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
    html = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>qvg verify {model}</title><style>{STYLE}</style></head><body>"
        + "\n".join(filter(None, parts))
        + "</body></html>\n"
    )
    with replacing(path) as partial:
        Path(partial).write_text(html, encoding="utf-8")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the cells are HTML already."""
    top = "".join(f"<th>{h}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


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
            _number(row["bits_per_element"], ".3f"),
            _number(row["times_smaller"], ".2f"),
        )
        rows.append((escape(row["codec"]), bits, smaller, escape(row["window"]), *cells))
    return _table(("codec", "bits", "times smaller", "frames", *map(str.upper, metrics)), rows)


def _bands(bands: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for b in bands:
        verdict = f"<span class='{b['verdict']}'>{b['verdict']}</span>"
        because = f" <small>({escape(b['because'])})</small>" if b["because"] else ""
        got = _number(b["measured"], ".2f")
        who, why = (escape(b["recipe"]), escape(b["window"])), escape(b["why"])
        rows.append((verdict + because, *who, got, f"{b['least']:g}", why))
    return _table(("verdict", "codec", "frames", "PSNR", "least", "why"), rows)


def _published(result: Mapping[str, Any]) -> str:
    """Numbers of others, each beside ours of the nearest recipe and the same frames."""
    ours = {(r["codec"], r["window"]): r["psnr"] for r in result["table"]}
    rows = []
    for p in result["published"]:
        here = ours.get((p["ours"], p["window"]))
        where = escape(p["window"] or "not stated")
        theirs = (f"{p['psnr']:.2f}", _number(p["ssim"], ".3f"), _number(p["lpips"], ".3f"))
        mine = "-" if here is None else f"{here['mean']:.2f}"
        rows.append((escape(p["recipe"]), where, *theirs, mine, escape(p["source"])))
    head = ("codec", "frames", "PSNR", "SSIM", "LPIPS", "PSNR here", "source")
    return _table(head, rows)


def _videos(videos: Sequence[Mapping[str, Any]]) -> str:
    rows = [(v["name"], str(v["seed"]), escape(v["prompt"] or "-")) for v in videos]
    return _table(("folder", "seed", "prompt"), rows)


def _plot(videos: Sequence[Mapping[str, Any]]) -> str:
    """PSNR over frames as SVG, a line for each codec."""
    arms = list(videos[0]["frames"])
    count = min(len(v["frames"][arm]["psnr"]) for v in videos for arm in arms)
    right, floor = WIDTH - 10, HEIGHT - BOTTOM
    lines = []
    for db in range(0, int(TOP_DB) + 1, 10):
        y = floor - db / TOP_DB * (floor - 10)
        lines.append(
            f"<line x1='{LEFT}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' stroke='#dfe3e8'/>"
            f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end' font-size='11'>{db}</text>"
        )
    for i, arm in enumerate(arms):
        mean = np.mean([v["frames"][arm]["psnr"][:count] for v in videos], 0)
        x = LEFT + np.arange(count) / max(count - 1, 1) * (right - LEFT)
        y = floor - np.clip(mean, 0, TOP_DB) / TOP_DB * (floor - 10)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        colour = COLOURS[i % len(COLOURS)]
        lines.append(
            f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='1.5'/>"
            f"<text x='{right - 8}' y='{24 + 15 * i}' text-anchor='end' font-size='12' "
            f"fill='{colour}'>{escape(arm)}</text>"
        )
    lines.append(
        f"<text x='{LEFT}' y='{HEIGHT - 8}' font-size='11'>frame 0</text>"
        f"<text x='{right}' y='{HEIGHT - 8}' font-size='11' text-anchor='end'>{count - 1}</text>"
    )
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>{''.join(lines)}</svg>"


def _image(picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode("ascii")
    return f"<img alt='report of the first video' src='data:image/png;base64,{data}'>"


def _versions(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in result["versions"].items())
