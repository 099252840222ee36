"""The page of `qvg play`: what one browser tab shows, and what it sends.

NiceGUI draws it: Vue and Quasar components driven from Python over one web socket, all files
served from its own package, so the page works without the internet. Frames travel as data URLs in
that socket: a frame of pocket world is 12 kB and reaches the browser in some 20 ms, far below
the time of a block, which is why nothing closer to the wire is needed.
"""

import asyncio
import base64
import io
import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from nicegui import events, ui
from PIL import Image

from qvg_jax.app.play.drawings import chart, svg_map
from qvg_jax.app.play.page_style import CSS, SCRIPT
from qvg_jax.app.play.player import Player

__all__ = ["Page", "picture"]

LOSSLESS_PIXELS = 200_000  # larger frames go to the browser as JPEG
LARGEST_SEED = 2**31 - 1

PADS = (("q", "Q"), ("w", "W"), ("e", "E"), ("a", "A"), ("s", "S"), ("d", "D"))
NAMES = {"w": "north", "s": "south", "a": "west", "d": "east", "up": "up", "down": "down"}


def picture(frame_HW3: UInt8[np.ndarray, "H W 3"]) -> str:
    """A frame as a data URL: PNG, or JPEG if it is large."""
    kind = "png" if frame_HW3[..., 0].size <= LOSSLESS_PIXELS else "jpeg"
    file = io.BytesIO()
    Image.fromarray(frame_HW3).save(file, kind, **({"quality": 92} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


class Page:
    """One tab. It shows the player's state and keeps none of its own but which keys are down."""

    def __init__(
        self,
        player: Player,
        codecs: dict[str, str],
        save: Callable[[], Awaitable[str]],
    ):
        """Builds the page in the current NiceGUI client.

        Args:
            player: whose walk it is.
            codecs: names to choose from, with what to show for each.
            save: makes an mp4 of the walk and returns its path.
        """
        self._player, self._save = player, save
        self.client = ui.context.client
        self._pads: dict[str, ui.element] = {}
        self._codec_shown = player.walk.codec
        world = player.walk.world
        ui.add_css(CSS)
        ui.add_css(f":root {{ --aspect: {world.width / world.height}; }}")
        ui.add_head_html(SCRIPT)
        ui.keyboard(self._on_key, repeating=False, ignore=["input", "select", "textarea"])
        ui.on("away", lambda: self._let_go())
        blank = picture(np.full((world.height, world.width, 3), 24, np.uint8))
        with ui.element("div").classes("board"):
            with ui.element("div").classes("stack"):
                self._head(world.model)
                self._frame = ui.interactive_image(blank).classes("frame")
                self._controls(blank, world.truth is not None)
            with ui.element("div").classes("stack"):
                self._meter_card()
                self._codec_card(codecs)
                self._world_card()
        self.refresh()

    def _head(self, model: str) -> None:
        with ui.element("div").classes("line"):
            ui.label(model.replace("-", " ")).classes("title")
            self._status = ui.label().classes("chip").props("data-testid=status")
            self._watching = ui.label().classes("dim push")

    def _controls(self, blank: str, has_truth: bool) -> None:
        with ui.element("div").classes("card controls"):
            with ui.element("div").classes("keys"):
                for key, cap in PADS:
                    self._pad(key, cap)
            with ui.element("div").classes("stack").style("gap: 4px"):
                self._hint = ui.label().classes("dim")
                self._speed = ui.label().classes("dim number").props("data-testid=speed")
            with ui.element("div"):
                ui.label("the way").classes("name")
                self._map = ui.html(svg_map([]), sanitize=False).classes("view")
            self._truth = None
            if has_truth:
                with ui.element("div"):
                    ui.label("the real world there").classes("name")
                    self._truth = ui.interactive_image(blank).classes("view truth")
                    ui.tooltip(
                        "Where the walk has been before, the frame should be this one. Elsewhere "
                        "the model invents."
                    )

    def _pad(self, key: str, cap: str) -> None:
        action = self._player.walk.world.keys.get(key)
        if action is None:
            ui.element("div")
            return
        with ui.element("div").classes("key").props(f"data-testid=pad-{key}") as pad:
            ui.label(cap)
            ui.tooltip(NAMES.get(action, action))
        self._pads[action] = pad
        pad.on("pointerdown", lambda: self._press(action), [])
        for event in ("pointerup", "pointerleave", "pointercancel"):
            pad.on(event, lambda: self._release(action), [])

    def _meter_card(self) -> None:
        def bar(name, kind):
            with ui.element("div").classes("line").style("margin-top: 10px"):
                ui.label(name).classes("dim")
                value = ui.label().classes("number push")
            with ui.element("div").classes("track"):
                return value, ui.element("div").classes(f"fill {kind}")

        with ui.element("div").classes("card"):
            ui.label("the cache, its memory").classes("name")
            with ui.element("div").classes("line").style("margin-top: 8px; align-items: baseline"):
                self._times = ui.label().classes("big number").props("data-testid=times")
                ui.label("smaller than in bf16").classes("dim")
            self._bf16, self._bf16_bar = bar("bf16 would be", "plain")
            self._is, self._is_bar = bar("is", "")
            self._bf16.props("data-testid=bf16")
            self._is.props("data-testid=is")
            self._bits = (
                ui.label().classes("dim number").style("margin-top: 8px").props("data-testid=bits")
            )
            self._room, self._room_bar = bar("frames remembered", "room")
            self._forgotten = ui.label().classes("dim").style("margin-top: 6px")
            self._chart = ui.echart(chart(self._player.points)).style(
                "height: 150px; margin-top: 8px"
            )

    def _codec_card(self, codecs: dict[str, str]) -> None:
        with ui.element("div").classes("card"):
            ui.label("codec").classes("name")
            self._codec = (
                ui.select(codecs, value=self._codec_shown, on_change=self._on_codec)
                .props("dense outlined options-dense dark")
                .style("width: 100%; margin-top: 6px")
                .props("data-testid=codec")
            )
            ui.label(
                "A switch decodes the compressed memory and encodes it again: what the codec "
                "before has lost stays lost. The first block and the newest ones are bf16 "
                "under every codec."
            ).classes("dim").style("margin-top: 8px")

    def _world_card(self) -> None:
        with ui.element("div").classes("card"):
            ui.label("world").classes("name")
            with ui.element("div").classes("line").style("margin-top: 6px; flex-wrap: nowrap"):
                # Without min and max: with them the field may replace a seed that is none by one
                # that is, before a click on the button has been heard.
                self._seed = (
                    ui.number("seed", value=self._player.walk.seed, step=1)
                    .props("dense outlined dark")
                    .style("flex: 1")
                    .props("data-testid=seed")
                )
                self._seed.on("keydown.enter", self._on_seed)
                ui.button("new world", on_click=self._on_seed).props("outline no-caps").props(
                    "data-testid=go"
                )
                ui.button(icon="casino", on_click=self._on_any).props("outline").props(
                    "data-testid=any"
                )
            ui.button("save the walk as mp4", icon="download", on_click=self._on_save).props(
                "outline no-caps"
            ).style("width: 100%; margin-top: 10px").props("data-testid=save")

    def show(self, turn: str, frame: str, truth: str | None) -> None:
        """Puts up one frame, as `picture` gives it, and the real one if it is known.

        Args:
            turn: which block it is of; in the document for those who measure.
        """
        self._frame.props(f"data-turn={turn}").set_source(frame)
        if self._truth is not None and truth is not None:
            self._truth.set_source(truth)

    def refresh(self, watching: int = 1) -> None:
        """Brings everything but the frames up to the player's state."""
        player = self._player
        walk, seen, points = player.walk, player.seen, player.points
        phase = player.phase
        self._status.classes(replace=f"chip {phase}").set_text(player.word or "ready: your keys")
        self._watching.set_text(
            f"{watching} tabs see this walk, and each can steer it" if watching > 1 else ""
        )
        n = walk.world.block_frames
        self._hint.set_text(
            f"W A S D or the arrow keys walk, E and Q go up and down, space waits. A press is {n} "
            "frames; hold the key to go on. The newest key wins."
        )
        if walk.codec != self._codec_shown:  # another tab, or this one's wish came true
            self._codec_shown = walk.codec
            self._codec.set_value(walk.codec)
        if seen is None or not points:
            self._speed.set_text("")
        else:
            self._speed.set_text(
                f"block {seen.number + 1}: {seen.seconds:.2f} s for {n} frames, seed {walk.seed}"
            )
            self._show_meter(points[-1].meter)
        # Not through the element's options, which NiceGUI would watch point by point.
        if self.client.has_socket_connection:
            self._chart.run_chart_method("setOption", chart(points))
        self._map.set_content(svg_map(points))

    def _show_meter(self, meter: Any) -> None:
        self._times.set_text(f"{meter.times_smaller:.1f}×")
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

    def _on_key(self, e: events.KeyEventArguments) -> None:
        name = e.key.name
        action = self._player.walk.world.keys.get(name.lower())
        held = e.modifiers.ctrl or e.modifiers.alt or e.modifiers.meta
        if action is None:
            return
        if e.action.keyup:
            self._release(action)
        elif not (e.action.repeat or held):
            self._press(action)

    def _press(self, action: str) -> None:
        self._player.press(self.client.id, action)
        if action in self._pads:
            self._pads[action].classes("down")

    def _release(self, action: str) -> None:
        self._player.release(self.client.id, action)
        if action in self._pads:
            self._pads[action].classes(remove="down")

    def _let_go(self) -> None:
        self._player.leave(self.client.id)
        for pad in self._pads.values():
            pad.classes(remove="down")

    async def _on_codec(self, e: events.ValueChangeEventArguments) -> None:
        self._codec.run_method("blur")  # or the keys would go to it
        if e.value != self._codec_shown:
            await self._wish(asyncio.wrap_future(self._player.switch(e.value)))
            self._codec_shown = self._player.walk.codec
            self._codec.set_value(self._codec_shown)

    async def _on_seed(self) -> None:
        self._seed.run_method("blur")
        value = self._seed.value
        if value is None or value != int(value) or not 0 <= value <= LARGEST_SEED:
            ui.notify(f"seed: a whole number from 0 to {LARGEST_SEED}", type="warning")
            return
        await self._wish(asyncio.wrap_future(self._player.restart(int(value))))

    async def _on_any(self) -> None:
        self._seed.set_value(random.randrange(10_000))
        await self._on_seed()

    async def _on_save(self) -> None:
        path = await self._wish(self._save())
        if path:
            ui.download.file(path, "walk.mp4")

    async def _wish(self, wanted: Awaitable[Any]) -> Any:
        """Waits for what was asked; what is refused is said on the page."""
        try:
            return await wanted
        except (ValueError, OSError) as error:
            ui.notify(str(error), type="negative", multi_line=True)
            return None
