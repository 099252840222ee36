"""Drawings for the page of `qvg play`: how the memory has grown, and where the walk has been."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from qvg_jax.app.play.places import Box, around
from qvg_jax.app.play.player import Point, in_memory

__all__ = ["chart", "svg_map"]

INK, DIM, LINE, REAL, MADE = "#f0f1f3", "#9ea4ae", "#2c3038", "#7a818d", "#5cb4ff"


def chart(points: Sequence[Point]) -> dict[str, Any]:
    """Options of an ECharts plot: megabytes over blocks, in bf16 and as they are, switches marked."""
    points = list(points)

    def curve(name, colour, value, **more):
        data = [[p.number + 1, round(value(p.meter) / 1e6, 3)] for p in points]
        style = {"lineStyle": {"width": 2, "color": colour}, "itemStyle": {"color": colour}}
        return {"name": name, "type": "line", "symbol": "none", "data": data} | style | more

    switches = [
        {"xAxis": after.number + 1, "label": {"formatter": after.codec}}
        for before, after in pairwise(points)
        if before.codec != after.codec
    ]
    mark = {
        "silent": True,
        "symbol": "none",
        "lineStyle": {"color": DIM, "type": "dashed"},
        "label": {"color": INK, "fontSize": 10, "position": "insideEndTop"},
        "data": switches,
    }
    axis = {
        "axisLabel": {"color": DIM, "fontSize": 10, "hideOverlap": True},
        "axisLine": {"lineStyle": {"color": LINE}},
        "splitLine": {"lineStyle": {"color": LINE}},
    }
    return {
        "animation": False,
        "grid": {"left": 34, "right": 10, "top": 26, "bottom": 36},
        "legend": {"top": 0, "right": 0, "textStyle": {"color": DIM, "fontSize": 11}},
        "tooltip": {"trigger": "axis"},
        "xAxis": axis
        | {
            "type": "value",
            "min": "dataMin",
            "max": "dataMax",
            "minInterval": 1,
            "name": "block",
            "nameLocation": "middle",
            "nameGap": 18,
            "nameTextStyle": {"color": DIM, "fontSize": 10},
        },
        "yAxis": axis | {"type": "value", "name": "MB", "nameTextStyle": {"color": DIM}},
        "series": [
            curve("in bf16", REAL, lambda meter: meter.bf16_bytes),
            curve(
                "now", MADE, lambda meter: meter.bytes, areaStyle={"opacity": 0.2}, markLine=mark
            ),
        ],
    }


def svg_map(points: Sequence[Point], *, width: int = 220, height: int = 130) -> str:
    """Where the walk has been, as SVG, north up.

    Filled is the ground that the memory has seen: grey in real frames, blue in frames that the model
    made, blank where it was forgotten. The lines are the path in the same colours, the frame is what the last
    picture shows, and the dot its middle.
    """
    points = list(points)
    if not points:
        return f'<svg viewBox="0 0 {width} {height}" width="100%" aria-hidden="true"></svg>'
    views = [p.view or (*p.place, *p.place) for p in points]
    left, top, right, bottom = around([*views, *(p.ground for p in points if p.ground)])
    scale = min((width - 12) / max(right - left, 1), (height - 12) / max(bottom - top, 1))
    scale = min(scale, 0.5)  # a short path stays small
    across, down = width / 2 - (left + right) / 2 * scale, height / 2 - (top + bottom) / 2 * scale

    def box(b: Box, look: str) -> str:
        x, y = across + b[0] * scale, down + b[1] * scale
        size = f'width="{(b[2] - b[0]) * scale:.1f}" height="{(b[3] - b[1]) * scale:.1f}"'
        return f'<rect x="{x:.1f}" y="{y:.1f}" {size} {look}/>'

    def at(point: Point) -> str:
        return f"{across + point.place[0] * scale:.1f},{down + point.place[1] * scale:.1f}"

    known = in_memory(points)
    ground = [
        f'<g opacity="{opacity}" fill="{colour}">'
        + "".join(box(p.ground, "") for p in known if p.ground and p.real == real)
        + "</g>"
        for real, colour, opacity in ((False, MADE, 0.3), (True, REAL, 0.5))
    ]
    tour = [at(p) for p in points if p.real]
    made = tour[-1:] + [at(p) for p in points if not p.real]
    line = '<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>'
    x, y = at(points[-1]).split(",")
    now = box(points[-1].view, f'fill="none" stroke="{INK}"') if points[-1].view else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" aria-hidden="true">'
        + "".join(ground)
        + line.format(" ".join(tour), REAL)
        + line.format(" ".join(made), MADE)
        + now
        + f'<circle cx="{x}" cy="{y}" r="4" fill="{INK}"/></svg>'
    )
