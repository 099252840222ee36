"""The card of the page that says how large the memory is, and would be in bf16."""

from collections.abc import Sequence

from nicegui import ui

from qvg_jax.app.play.drawings import chart
from qvg_jax.app.play.player import Point
from qvg_jax.app.play.walk import Meter

__all__ = ["MeterCard"]


class MeterCard:
    """How many times smaller the memory is, two bars, the room that is left, and the curve over the walk."""

    def __init__(self, points: Sequence[Point]):
        """Builds it in the current NiceGUI element."""

        def bar(name, kind):
            with ui.element("div").classes("line").style("margin-top: 10px"):
                ui.label(name).classes("dim")
                value = ui.label().classes("number push")
            with ui.element("div").classes("track"):
                return value, ui.element("div").classes(f"fill {kind}")

        with ui.element("div").classes("card"):
            ui.label("memory now").classes("name")
            with ui.element("div").classes("line").style("margin-top: 8px; align-items: baseline"):
                self._times = ui.label().classes("big number").props("data-testid=times")
                ui.label("smaller than in bf16").classes("dim")
            self._long_run = ui.label().classes("long number").props("data-testid=longrun")
            self._why = ui.label().classes("dim")
            self._bf16, self._bf16_bar = bar("in bf16 it would be", "plain")
            self._is, self._is_bar = bar("it is", "")
            self._bf16.props("data-testid=bf16")
            self._is.props("data-testid=is")
            self._bits = (
                ui.label().classes("dim number").style("margin-top: 8px").props("data-testid=bits")
            )
            self._room, self._room_bar = bar("frames remembered", "room")
            self._room.props("data-testid=room")
            self._forgotten = ui.label().classes("dim").style("margin-top: 6px")
            self._chart = ui.echart(chart(points)).style("height: 160px; margin-top: 8px")
            self._chart.props(
                'role=img aria-label="size of the memory over the blocks of the walk"'
            )

    def show(self, meter: Meter) -> None:
        """Puts up a meter's numbers."""
        self._times.set_text(f"{meter.times_smaller:.1f}×")
        if meter.span_bits < 16:
            self._long_run.set_text(f"{16 / meter.span_bits:.1f}× in the long run")
            self._why.set_text(
                "It starts lower: the first and the newest blocks stay in bf16, and the others wait "
                f"for a whole span to be compressed. When its {meter.capacity} frames are full, it "
                f"is at least {meter.full_times:.1f}× smaller."
            )
        else:
            self._long_run.set_text("")
            self._why.set_text("This is bf16: nothing is compressed.")
        self._bf16.set_text(f"{meter.bf16_bytes / 1e6:.1f} MB")
        self._is.set_text(f"{meter.bytes / 1e6:.1f} MB")
        self._bf16_bar.style("width: 100%")
        self._is_bar.style(f"width: {min(100, 100 / meter.times_smaller):.1f}%")
        self._bits.set_text(
            f"{meter.span_bits:.2f} bits per element where compressed, {meter.bits:.2f} over all"
        )
        self._room.set_text(f"{meter.frames} of {meter.capacity}")
        self._room_bar.style(f"width: {100 * meter.frames / meter.capacity:.1f}%")
        self._forgotten.set_text(
            f"Full: the oldest {meter.forgotten} frames are forgotten."
            if meter.forgotten
            else "When it is full, the oldest frames will be forgotten."
        )

    def draw(self, points: Sequence[Point]) -> None:
        """Brings the curve up to the walk's points."""
        # Not through the element's options, which NiceGUI would watch point by point.
        self._chart.run_chart_method("setOption", chart(points))
