"""What video.mp4 shows of a job: its arms beside each other, and what compression changed."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from qvg_jax.app.job import BASELINE, Job, Made
from qvg_jax.app.panels import COLUMNS, Panel, Sheet, difference
from qvg_jax.app.report import SEEN

__all__ = ["Film", "View"]

REAL_SHOWN = 24  # frames of a tour at most: in all panels they are the same


class View(NamedTuple):
    """One panel of the film, and where it is on a frame."""

    name: str  # "truth", an arm, or "10 x difference, ARM"
    box: tuple[int, int, int, int]  # left, top, right, bottom


class Film:
    """Draws the frames of video.mp4.

    The truth, if somebody knows it, and the arms stand side by side; beside or below each compressed
    arm is its difference to bf16, ten times enlarged. A single arm without a truth is shown as it is.

    Attributes:
        first: number of the first frame that is shown (from 0, tour first). Of a long tour through a known
            world that is near its end; a user's own video is shown whole.
        views: the panels.
    """

    def __init__(self, job: Job):
        """Lays out the panels of a job."""
        self._job = job
        self.first = max(0, job.tour - REAL_SHOWN) if job.truth else 0
        names = [arm.name for arm in job.arms]
        pictures = (["truth"] if job.truth else []) + names
        compared = [name for name in names if job.baseline not in (None, name)]
        self._cells: list[tuple[str, bool] | None] = [(name, False) for name in pictures]
        if len(pictures) + len(compared) > COLUMNS:  # each difference below its arm
            rows = -(-len(pictures) // COLUMNS)
            columns = -(-len(pictures) // rows)
            self._cells += [None] * (rows * columns - len(pictures))
            for name in pictures:
                self._cells.append((name, True) if name in compared else None)
        else:
            self._cells += [(name, True) for name in compared]
            columns = len(self._cells)
        self._sheet: Sheet | None = None
        self.views = [View(pictures[0], (0, 0, job.width, job.height))]
        if len(self._cells) > 1:
            size = dict(tour=job.tour, frames=job.frames, columns=columns)
            self._sheet = sheet = Sheet(len(self._cells), job.height, job.width, **size)
            self.views = [
                View(f"10 x difference, {cell[0]}" if cell[1] else cell[0], sheet.box(i))
                for i, cell in enumerate(self._cells)
                if cell is not None
            ]

    def draw(self, made: Made, i: int) -> UInt8[np.ndarray, "H W 3"]:
        """The film's frame of picture `i` of a block."""
        if self._sheet is None:
            return made.frames[self._job.arms[0].name][i]
        panels = [cell and self._panel(*cell, made, i) for cell in self._cells]
        return self._sheet.draw(panels, made.first + i)

    def _panel(self, name: str, is_difference: bool, made: Made, i: int) -> Panel:
        job = self._job
        if name == "truth" and made.truth_FHW3 is not None and made.seen_F is not None:
            real, known = made.first + i < job.tour, made.seen_F[i] >= SEEN
            note = (
                "given to all arms" if real else "seen in the tour" if known else "not in the tour"
            )
            return Panel(made.truth_FHW3[i], "real frames" if real else "ground truth", note)
        frame_HW3 = made.frames[name][i]
        if is_difference:
            changed = difference(frame_HW3, made.frames[BASELINE][i])
            return Panel(changed, f"10 x difference, {name}", f"to {BASELINE}; grey: none")
        arm = next(arm for arm in job.arms if arm.name == name)
        size = made.bytes[name].in_use.total
        bits = job.cache(arm.state).layout.span_bits
        note = f"{bits:.4g} bits per element, {size / 1e6:.1f} MB"
        if job.baseline not in (None, name) and size:  # there may be no cache yet
            note += f" ({made.bytes[BASELINE].in_use.total / size:.1f}x smaller)"
        return Panel(frame_HW3, f"{name} cache", note)
