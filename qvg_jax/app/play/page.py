"""The page of `qvg play`: what one browser tab shows, and what it sends.

NiceGUI draws it: Vue and Quasar components driven from Python over one web socket, all files
served from its own package, so the page works without the internet. Frames travel as data URLs in
that socket: a frame of pocket world is 12 kB and reaches the browser in some 20 ms, far below
the time of a block, which is why nothing closer to the wire is needed.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from nicegui import events, ui

from qvg_jax.app.play.drawings import svg_map
from qvg_jax.app.play.meter_card import MeterCard
from qvg_jax.app.play.page_style import CSS, SCRIPT
from qvg_jax.app.play.places import said
from qvg_jax.app.play.player import Player
from qvg_jax.app.play.screen import Screen, image, picture

__all__ = ["Page"]

LARGEST_SEED = 2**31 - 1

# (key, arrow, letter) in three rows of three; None is a gap
PADS = (
    ("q", "⤓", "Q"), ("w", "↑", "W"), ("e", "⤒", "E"),
    ("a", "←", "A"), ("s", "↓", "S"), ("d", "→", "D"),
    (" ", "wait", "space"),
)  # fmt: skip
NAMES = {
    "w": "north", "s": "south", "a": "west", "d": "east", "up": "up", "down": "down", "stay": "wait",
}  # fmt: skip


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
        ui.colors(primary="#5cb4ff")  # NiceGUI's own is too dark for the background
        ui.add_css(CSS)
        ui.add_css(f":root {{ --aspect: {world.width / world.height}; }}")
        ui.add_head_html(SCRIPT)
        ui.keyboard(self._on_key, repeating=False, ignore=["input", "select", "textarea"])
        ui.on("away", lambda: self._let_go())
        self._blank = picture(np.full((world.height, world.width, 3), 24, np.uint8))
        with ui.element("div").classes("board"):
            with ui.element("div").classes("stack"):
                self._head(world.model)
                self._screen = Screen(self._blank)
                self._controls()
                self._places_card(world.truth is not None)
            with ui.element("div").classes("stack"):
                self._meter = MeterCard(self._player.points)
                self._codec_card(codecs)
                self._world_card()
        self.refresh()

    def _head(self, model: str) -> None:
        with ui.element("div").classes("line"):
            with ui.element("h1").classes("title"):
                ui.label(model.replace("-", " "))
            self._status = ui.label().classes("chip").props("data-testid=status role=status")
            self._place = (
                ui.label().classes("place").props("data-testid=place role=status aria-live=polite")
            )
            self._watching = ui.label().classes("dim push")

    def _controls(self) -> None:
        with ui.element("div").classes("card controls"):
            with ui.element("div").classes("keys").props('role=group aria-label="walk"'):
                for key, arrow, letter in PADS:
                    self._pad(key, arrow, letter)
            with ui.element("div").classes("stack").style("gap: 8px"):
                with ui.element("div").classes("line").style("gap: 8px"):
                    self._back = (
                        ui.button("walk back", on_click=self._player.go_back, color=None)
                        .props("no-caps unelevated data-testid=back")
                        .classes("first")
                    )
                    self._back.set_visibility(self._player.walk.world.toward is not None)
                    self._compare = ui.button("compare with bf16", on_click=self._on_compare).props(
                        "no-caps outline data-testid=compare"
                    )
                self._hint = ui.label().classes("dim")
                self._speed = ui.label().classes("dim number").props("data-testid=speed")

    def _places_card(self, has_truth: bool) -> None:
        with ui.element("div").classes("card places"):
            with ui.element("div"):
                ui.label("path").classes("name")
                self._map = ui.html(svg_map([]), sanitize=False).classes("map")
                self._map.props(
                    'role=img aria-label="map of the path and of the ground it has shown"'
                )
            with ui.element("div").classes("legend dim"):
                for kind, text in (
                    ("real", "shown to the model in real frames"),
                    ("made", "invented by the model, and remembered since"),
                    ("none", "never seen, or forgotten: a view of it is invented"),
                ):
                    with ui.element("div"):
                        ui.element("span").classes(f"swatch {kind}")
                        ui.label(text)
            self._truth = None
            if has_truth:
                with ui.element("div"):
                    ui.label("the real place").classes("name")
                    with ui.element("div").classes("view truth"):
                        self._truth = image("the real place of the newest frame", self._blank)
                    ui.label(
                        "Remembered frames should look like it, invented ones cannot. Seams in what is "
                        "invented are the model's: bf16 has them too."
                    ).classes("dim")

    def _pad(self, key: str, arrow: str, letter: str) -> None:
        action = self._player.walk.world.keys.get(key)
        if action is None:
            ui.element("div")
            return
        name = NAMES.get(action, action)
        button = ui.element("button").classes("key wide" if key == " " else "key")
        with button as pad:
            ui.label(arrow).classes("arrow")
            ui.label(letter).classes("letter")
        pad.props["type"], pad.props["aria-label"] = "button", f"{name} ({letter})"
        pad.props["title"] = name
        pad.props["data-testid"] = f"pad-{key.strip() or 'space'}"
        self._pads[action] = pad
        pad.on("pointerdown", lambda: self._press(action), [])
        for event in ("pointerup", "pointerleave", "pointercancel"):
            pad.on(event, lambda: self._release(action), [])

    def _codec_card(self, codecs: dict[str, str]) -> None:
        with ui.element("div").classes("card"):
            ui.label("codec").classes("name")
            self._codec = (
                ui.select(codecs, value=self._codec_shown, on_change=self._on_codec)
                .props('dense outlined options-dense dark aria-label="codec of the memory"')
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
                ui.button(icon="casino", on_click=self._on_any).props(
                    'outline data-testid=any aria-label="any world"'
                )
            ui.button("save the walk as mp4", icon="download", on_click=self._on_save).props(
                "outline no-caps"
            ).style("width: 100%; margin-top: 10px").props("data-testid=save")

    def show(self, turn: str, frame: str, truth: str | None) -> None:
        """Puts up one frame, as `picture` gives it, and the real one if it is known.

        Args:
            turn: which block it is of; in the document for those who measure.
        """
        self._screen.show(turn, frame)
        if self._truth is not None and truth is not None:
            self._truth.props["src"] = truth

    def show_twin(self, turn: str, frame: str) -> None:
        """Puts up one frame from the bf16 memory."""
        self._screen.show_twin(turn, frame)

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
            "Try this first: walk back over what the model was shown, and see it remember. Or steer: "
            f"W A S D or the arrow keys walk, E and Q go up and down, space waits. A press is {n} "
            "frames; hold the key to go on. The newest key wins."
        )
        self._back.set_text("stop" if player.going_back else "walk back")
        self._show_place(points)
        self._screen.refresh(player)
        self._compare.set_text("stop comparing" if player.comparing else "compare with bf16")
        if walk.codec != self._codec_shown:  # another tab, or this one's wish came true
            self._codec_shown = walk.codec
            self._codec.set_value(walk.codec)
        if seen is None or not points:
            self._speed.set_text("")
        else:
            self._speed.set_text(
                f"block {seen.number + 1}: {seen.seconds:.2f} s for {n} frames, seed {walk.seed}"
            )
            self._meter.show(points[-1].meter)
        if self.client.has_socket_connection:
            self._meter.draw(points)
        self._map.set_content(svg_map(points))

    def _show_place(self, points: Any) -> None:
        """Says whether the newest frame is remembered or invented."""
        point = points[-1] if points else None
        if point is None or point.share is None:
            self._place.classes(replace="place").set_text("")
            return
        kind, text = said(point.share, point.real)
        self._place.classes(replace=f"place {kind}").set_text(text)

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

    async def _on_compare(self) -> None:
        player = self._player
        await self._wish(asyncio.wrap_future(player.compare(not player.comparing)))

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
