"""Frames of several arms side by side, with labels: the pictures that the mp4 is made of."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

__all__ = ["COLUMNS", "Panel", "Sheet", "difference"]

BACKGROUND, INK, DIM = (17, 19, 23), (240, 241, 243), (158, 164, 174)
TOUR, GENERATED, EMPTY = (122, 129, 141), (92, 180, 255), (44, 48, 56)
GAP, TITLE, FOOT = 12, 58, 44  # pixels: between panels, above them, below them
COLUMNS, WIDEST = 4, 1600  # panels and pixels that a row may take
ENLARGED = 10  # times, of differences


class Panel(NamedTuple):
    """One picture and what is written above it."""

    frame_HW3: UInt8[np.ndarray, "H W 3"]
    title: str
    note: str = ""


def difference(
    frame_HW3: UInt8[np.ndarray, "H W 3"], reference_HW3: UInt8[np.ndarray, "H W 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """What a frame has more (brighter) or less (darker) than another one, ten times enlarged around grey."""
    change = frame_HW3.astype(np.int32) - reference_HW3
    return np.clip(128 + ENLARGED * change, 0, 255).astype(np.uint8)


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # The fonts that come with matplotlib: the same letters on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


class Sheet:
    """Draws frames of one size next to each other, enlarged by a whole number.

    Pixels become squares (nearest neighbour): nothing is smoothed over. Above each panel stand its
    title and a note, below all of them a time line: frames of the tour, then generated ones.
    More than four panels take more than one row.
    """

    def __init__(
        self,
        panels: int,
        height: int,
        width: int,
        *,
        tour: int,
        frames: int,
        columns: int | None = None,
    ):
        """Lays out a sheet.

        Args:
            panels: number of panels.
            height, width: size of a frame in pixels.
            tour, frames: real frames at the start, and generated frames after them.
            columns: panels of a row; None for rows of about the same length.
        """
        rows = -(-panels // (columns or COLUMNS))
        self._columns = columns or -(-panels // rows)
        self.scale = max(1, min(4, ((WIDEST - GAP) // self._columns - GAP) // width))
        self._panels, self._tour, self._frames = panels, tour, frames
        self._frame = height * self.scale, width * self.scale
        self._foot = rows * (TITLE + self._frame[0])  # where the time line's strip begins
        size = self._foot + FOOT, GAP + self._columns * (self._frame[1] + GAP)
        self.height, self.width = (n + n % 2 for n in size)  # yuv420p wants even sides

    def box(self, panel: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a panel's picture on the sheet."""
        row, column = divmod(panel, self._columns)
        left = GAP + column * (self._frame[1] + GAP)
        top = TITLE + row * (TITLE + self._frame[0])
        return left, top, left + self._frame[1], top + self._frame[0]

    def draw(self, panels: Sequence[Panel | None], number: int) -> UInt8[np.ndarray, "H2 W2 3"]:
        """The sheet of frame `number` (from 0, tour first); the place of a None stays empty."""
        if len(panels) != self._panels:
            raise ValueError(f"{len(panels)} panels for a sheet of {self._panels}")
        sheet = Image.new("RGB", (self.width, self.height), BACKGROUND)
        pen = ImageDraw.Draw(sheet)
        for i, panel in enumerate(panels):
            if panel is None:
                continue
            left, top, right, bottom = self.box(i)
            picture = Image.fromarray(panel.frame_HW3)
            picture = picture.resize((right - left, bottom - top), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top))
            room = right - left
            _text(pen, (left, top - 36), panel.title, 17, INK, room, bold=True)
            _text(pen, (left, top - 14), panel.note, 14, DIM, room)
        self._time_line(pen, number)
        return np.asarray(sheet)

    def _time_line(self, pen: ImageDraw.ImageDraw, number: int) -> None:
        middle = self._foot + FOOT // 2
        if number < self._tour:
            text, colour = f"real frame {number + 1} of {self._tour}", TOUR
        else:
            text, colour = f"generated frame {number - self._tour + 1} of {self._frames}", GENERATED
        longest = max(
            f"real frame {self._tour} of {self._tour}",
            f"generated frame {self._frames} of {self._frames}",
            key=len,
        )
        left, right = GAP, self.width - 2 * GAP - _font(14).getlength(longest)
        at = lambda n: left + (right - left) * n / (self._tour + self._frames)  # noqa: E731
        pen.rectangle((left, middle - 2, right, middle + 2), fill=EMPTY)
        done = number + 1
        pen.rectangle((left, middle - 2, at(min(done, self._tour)), middle + 2), fill=TOUR)
        if done > self._tour:
            pen.rectangle((at(self._tour), middle - 2, at(done), middle + 2), fill=GENERATED)
        pen.text((self.width - GAP, middle), text, font=_font(14), fill=colour, anchor="rm")


def _text(pen, at, text, size, fill, room, bold=False):
    """Text with its middle at height at[1], in smaller letters if it does not fit into `room`."""
    while size > 8 and _font(size, bold).getlength(text) > room:
        size -= 1
    pen.text(at, text, font=_font(size, bold), fill=fill, anchor="lm")
