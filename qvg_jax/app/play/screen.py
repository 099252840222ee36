"""The screen of the page: the walk's picture, and over it the one that a memory in bf16 gives."""

import base64
import io

import numpy as np
from jaxtyping import UInt8
from nicegui import ui
from PIL import Image

from qvg_jax.app.play.player import Player

__all__ = ["Screen", "image", "picture"]

LOSSLESS_PIXELS = 200_000  # larger frames go to the browser as JPEG


def picture(frame_HW3: UInt8[np.ndarray, "H W 3"]) -> str:
    """A frame as a data URL: PNG, or JPEG if it is large."""
    kind = "png" if frame_HW3[..., 0].size <= LOSSLESS_PIXELS else "jpeg"
    file = io.BytesIO()
    Image.fromarray(frame_HW3).save(file, kind, **({"quality": 92} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def image(alt: str, source: str) -> ui.element:
    """A picture with the words that stand for it."""
    element = ui.element("img")
    element.props["alt"], element.props["src"] = alt, source
    return element


class Screen:
    """A picture that can be wiped: bf16 on the left of a line, the compressed memory on the right."""

    def __init__(self, blank: str):
        """Builds it in the current NiceGUI element; `blank` is shown before the first frame."""
        with ui.element("div").classes("frame") as self._frame:
            self._image = image("the newest frame of the walk", blank)
            with ui.element("div").classes("twin") as self._twin:
                self._twin_image = image("the same frame from a memory in bf16", blank)
            self._twin_label = ui.label("bf16").classes("tag left")
            self._own_label = ui.label().classes("tag right")
        with ui.element("div").classes("card wipe line") as self._wipe:
            ui.html(
                '<label class="dim">bf16 <input type="range" id="wipe" min="0" max="100" value="50" '
                'aria-label="where the line between bf16 (left) and the compressed memory (right) '
                'is, in percent"> compressed</label>',
                sanitize=False,
            ).style("flex: 1")
            self._follows = ui.label().classes("dim number").props("data-testid=follows")

    def show(self, turn: str, frame: str) -> None:
        """Puts up a frame of the walk; `turn` says in the document which block it is of."""
        self._frame.props["data-turn"] = turn
        self._image.props["src"] = frame

    def show_twin(self, turn: str, frame: str) -> None:
        """Puts up a frame from the bf16 memory."""
        self._twin.props["data-turn"] = turn
        self._twin_image.props["src"] = frame

    def refresh(self, player: Player) -> None:
        """Shows the bf16 picture and the slider while there is one to compare with."""
        there = player.twin_seen is not None
        for element in (self._twin, self._twin_label, self._own_label, self._wipe):
            element.set_visibility(there)
        behind = player.behind
        self._own_label.set_text(player.walk.codec)
        self._twin.classes(**({"add": "behind"} if behind else {"remove": "behind"}))
        same = "the same block in both" if there else ""
        self._follows.set_text(f"bf16 follows: {behind} blocks to go" if behind else same)
