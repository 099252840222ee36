"""Drawings for the page of `qvg play`: how the cache has grown, and the way that was walked."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from qvg_jax.app.play.player import Point

__all__ = ["chart", "svg_map"]

INK, DIM, LINE, REAL, MADE = "#f0f1f3", "#9ea4ae", "#2c3038", "#7a818d", "#5cb4ff"


def chart(points: Sequence[Point]) -> dict[str, Any]:
    """Options of an ECharts plot: megabytes over frames, bf16 and as it is, switches marked."""
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
        "grid": {"left": 34, "right": 10, "top": 26, "bottom": 22},
        "legend": {"top": 0, "right": 0, "textStyle": {"color": DIM, "fontSize": 11}},
        "tooltip": {"trigger": "axis"},
        "xAxis": axis | {"type": "value", "min": "dataMin", "max": "dataMax", "minInterval": 1},
        "yAxis": axis | {"type": "value", "name": "MB", "nameTextStyle": {"color": DIM}},
        "series": [
            curve("bf16", REAL, lambda meter: meter.bf16_bytes),
            curve("is", MADE, lambda meter: meter.bytes, areaStyle={"opacity": 0.2}, markLine=mark),
        ],
    }


def svg_map(points: Sequence[Point], *, width: int = 176, height: int = 104) -> str:
    """The way as SVG, north up: grey the tour, blue what was walked, a dot where it has come to."""
    places = [p.place for p in points]
    if not places:
        return f'<svg viewBox="0 0 {width} {height}" width="100%"></svg>'
    xs, ys = zip(*places, strict=True)
    scale = min((width - 20) / max(max(xs) - min(xs), 1), (height - 20) / max(max(ys) - min(ys), 1))
    scale = min(scale, 0.5)  # a short way stays small
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2

    def at(place):
        x, y = ((v - m) * scale for v, m in zip(place, middle, strict=True))
        return f"{width / 2 + x:.1f},{height / 2 + y:.1f}"

    tour = [at(p.place) for p in points if p.real]
    made = tour[-1:] + [at(p.place) for p in points if not p.real]
    line = '<polyline points="{}" fill="none" stroke="{}" stroke-width="2" opacity="0.85"/>'
    x, y = at(places[-1]).split(",")
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%">'
        + line.format(" ".join(tour), REAL)
        + line.format(" ".join(made), MADE)
        + f'<circle cx="{x}" cy="{y}" r="4" fill="{INK}"/></svg>'
    )
