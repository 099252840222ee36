"""Parts of the HTML pages that the command writes: the frame of a page, tables, plots and pictures.

Pages are one file each and ask for nothing from elsewhere: styles, scripts and pictures are inside.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import UInt8
from PIL import Image

__all__ = ["COLOURS", "data_url", "document", "line_plot", "number", "picture_url", "table"]

COLOURS = ("#1f77d0", "#b85c12", "#1d7a55", "#8a3fae", "#b03066", "#5b6270")  # 4.5:1 on white
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d2129; background: #fff; }
table { border-collapse: collapse; margin: .6rem 0 1.4rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #dfe3e8; text-align: left; }
.pass { color: #1b7f4d; } .fail { color: #b3261e; } small { color: #5f6774; }
img, svg { max-width: 100%; } .wide { overflow-x: auto; }
.key { margin: .2rem 0; display: flex; flex-wrap: wrap; gap: 0 1.4rem; font-weight: 600; }
.key span::before { content: ""; display: inline-block; width: 1.2em; height: .28em;
  margin-right: .4em; vertical-align: middle; background: currentColor; }
.hover { position: absolute; background: #fff; border: 1px solid #b9c0ca; border-radius: 6px;
  padding: 4px 8px; font-size: 12px; pointer-events: none; font-variant-numeric: tabular-nums; }
"""
# "self" is for a video beside the page that is too large to be inside.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "media-src data: 'self' file:"
)
# The values of all curves where the pointer is, for every plot of the page.
HOVER = """
for (const svg of document.querySelectorAll('svg[data-plot]')) {
  const plot = JSON.parse(svg.dataset.plot), span = plot.x.at(-1) - plot.x[0] || 1;
  const make = (name, parent) =>
    parent.appendChild(document.createElementNS('http://www.w3.org/2000/svg', name));
  const line = make('line', svg), box = document.createElement('div');
  line.setAttribute('y1', 10); line.setAttribute('y2', plot.floor);
  line.setAttribute('stroke', '#1d2129'); line.style.display = 'none';
  box.className = 'hover'; box.hidden = true; document.body.append(box);
  svg.addEventListener('pointerleave', () => { line.style.display = 'none'; box.hidden = true; });
  svg.addEventListener('pointermove', event => {
    const frame = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / frame.width;
    const at = ((event.clientX - frame.left) * scale - plot.left) / (plot.right - plot.left);
    const wanted = plot.x[0] + at * span;
    let i = 0;
    plot.x.forEach((x, j) => { if (Math.abs(x - wanted) < Math.abs(plot.x[i] - wanted)) i = j; });
    const x = plot.left + (plot.x[i] - plot.x[0]) / span * (plot.right - plot.left);
    line.setAttribute('x1', x); line.setAttribute('x2', x); line.style.display = '';
    box.replaceChildren(`${plot.xName} ${plot.x[i]}`);
    for (const curve of plot.curves) {
      const row = document.createElement('div');
      row.textContent = `${curve.name}: ${curve.values[i]} ${plot.unit}`;
      row.style.color = curve.colour; box.append(row);
    }
    box.hidden = false;
    const room = document.documentElement.clientWidth - box.offsetWidth - 8;
    box.style.left = `${Math.max(0, Math.min(event.clientX + 14, room)) + scrollX}px`;
    box.style.top = `${event.clientY + 14 + scrollY}px`;
  });
}
"""
WIDTH, LEFT, BOTTOM = 900, 46, 28  # of a plot, in pixels


def document(title: str, parts: Sequence[str], *, style: str = "", script: str = "") -> str:
    """A whole page.

    Args:
        title: of the window, as text.
        parts: of the body, as HTML; empty ones are left out.
        style, script: CSS and JavaScript beside the usual.
    """
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><main>"
        + "\n".join(filter(None, parts))
        + f"</main><script>{HOVER}{script}</script></body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the cells are HTML already."""
    top = "".join(f"<th scope='col'>{h}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    # Reachable by keyboard, for it scrolls where the window is narrow.
    return f"<div class='wide' tabindex='0'><table><tr>{top}</tr>{body}</table></div>"


def number(value: float | None, form: str) -> str:
    """A formatted number; "-" for None."""
    return "-" if value is None else format(value, form)


def data_url(data: bytes, kind: str) -> str:
    """Bytes as a URL that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def picture_url(frame_HW3: UInt8[np.ndarray, "H W 3"]) -> str:
    """A frame as the URL of a PNG."""
    file = io.BytesIO()
    Image.fromarray(frame_HW3).save(file, "png")
    return data_url(file.getvalue(), "image/png")


def line_plot(
    curves: Mapping[str, tuple[str, Sequence[float]]],
    x: Sequence[float],
    *,
    title: str,
    top: float,
    step: float,
    height: int = 260,
    bottom: float = 0.0,
    labels: Mapping[str, str] | None = None,
    x_name: str = "frame",
    unit: str = "",
    behind: str | None = None,
    shaded: Sequence[tuple[float, float]] = (),
) -> str:
    """Curves over frames as SVG, with a key above; the page's script shows the values at the pointer.

    Args:
        curves: colour and values by name.
        x: frame numbers of the values.
        title: what a reader that cannot see the plot is told.
        top, bottom: range of the vertical axis; curves are cut off there.
        step: between lines of the grid.
        height: of the picture.
        labels: what the key says of a curve; its name if left out.
        x_name, unit: of the axes.
        behind: the curve that is drawn thick and light, so that the others do not hide it.
        shaded: ends of fields that are shaded, in frames.
    """
    right, floor = WIDTH - 10, height - BOTTOM
    x0, x1 = float(x[0]), float(max(x[-1], x[0] + 1))

    def across(value: np.ndarray | float) -> np.ndarray:
        return LEFT + (np.asarray(value) - x0) / (x1 - x0) * (right - LEFT)

    def up(value: np.ndarray | float) -> np.ndarray:
        inside = np.clip(value, bottom, top)
        # An axis without height, of curves that are zero throughout, draws them on the floor.
        return floor - (inside - bottom) / (top - bottom or 1) * (floor - 10)

    parts = []
    for begin, end in shaded:
        left = float(across(max(begin, x0)))
        width = float(across(min(end, x1))) - left
        if width > 0:
            parts.append(
                f"<rect x='{left:.1f}' y='10' width='{width:.1f}' height='{floor - 10}' "
                "fill='#eef0f3'/>"
            )
    for value in np.arange(np.ceil(bottom / step) * step, top + step / 2, step):
        y = float(up(value))
        parts.append(
            f"<line x1='{LEFT}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' stroke='#dfe3e8'/>"
            f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end' font-size='11'>{value:g}</text>"
        )
    for name, (colour, values) in curves.items():
        points = " ".join(
            f"{a:.1f},{b:.1f}"
            for a, b in zip(across(np.asarray(x)), up(np.asarray(values)), strict=True)
        )
        thick = name == behind and len(curves) > 1
        look = "stroke-width='5' stroke-opacity='.35'" if thick else "stroke-width='1.5'"
        parts.append(
            f"<polyline points='{points}' fill='none' stroke='{colour}' {look} "
            f"stroke-linejoin='round'/>"
        )
    parts.append(
        f"<text x='{LEFT}' y='{height - 8}' font-size='11'>{escape(x_name)} {x[0]:g}</text>"
        f"<text x='{right}' y='{height - 8}' font-size='11' text-anchor='end'>{x[-1]:g}</text>"
    )
    if unit:
        parts.append(f"<text x='4' y='9' font-size='11'>{escape(unit)}</text>")
    shown = {
        "x": [float(value) for value in x],
        "left": LEFT, "right": right, "floor": floor, "unit": unit, "xName": x_name,
        "curves": [
            {"name": name, "colour": colour, "values": [round(float(v), 3) for v in values]}
            for name, (colour, values) in curves.items()
        ],
    }  # fmt: skip
    key = "".join(
        f"<span style='color: {colour}'>{escape((labels or {}).get(name, name))}</span>"
        for name, (colour, _) in curves.items()
    )
    return (
        f"<p class='key'>{key}</p><svg viewBox='0 0 {WIDTH} {height}' role='img' "
        f"aria-label='{escape(title, quote=True)}' "
        f"data-plot='{escape(json.dumps(shown), quote=True)}'>{''.join(parts)}</svg>"
    )
