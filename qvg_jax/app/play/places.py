"""What of a view the memory has seen before: remembered from real frames, invented earlier, or new."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

__all__ = ["Box", "Share", "around", "said", "share"]

SAMPLES = 24  # points of a view along each side

type Box = tuple[float, float, float, float]  # left, top, right, bottom on the ground


class Share(NamedTuple):
    """Parts of a view; they add up to 1."""

    real: float  # that real frames in the memory show
    invented: float  # that only frames in the memory show which the model has made
    new: float  # that no frame in the memory shows


def around(boxes: Iterable[Box]) -> Box:
    """The smallest box that holds all of these."""
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def share(view: Box, remembered: Iterable[tuple[Box, bool]]) -> Share:
    """Says what of a view is known.

    Args:
        view: what a frame shows.
        remembered: what each block in the memory shows, and whether it is of real frames.
    """
    left, top, right, bottom = view
    middles = (np.arange(SAMPLES) + 0.5) / SAMPLES
    x, y = left + middles * (right - left), (top + middles * (bottom - top))[:, None]
    real = np.zeros((SAMPLES, SAMPLES), bool)
    made = real.copy()
    for (a, b, c, d), is_real in remembered:
        inside = (a <= x) & (x <= c) & (b <= y) & (y <= d)
        if is_real:
            real |= inside
        else:
            made |= inside
    return Share(float(real.mean()), float((made & ~real).mean()), float((~made & ~real).mean()))


def said(part: Share, real: bool) -> tuple[str, str]:
    """A kind ("real", "remembered", "mixed" or "invented") and a sentence about a block's last frame.

    Args:
        part: what of the frame was known before the block.
        real: whether the block is of real frames.
    """
    if real:
        return "real", "real frames, shown to the model"
    if part.new > 0.9:
        return "invented", "invented: this place is not in the memory"
    if part.new > 0.05:
        return "mixed", f"{1 - part.new:.0%} remembered, {part.new:.0%} invented"
    if part.real > 0.9:
        return "remembered", "remembered from real frames"
    if part.real > 0.1:
        return (
            "remembered",
            f"remembered: {part.real:.0%} from real frames, the rest invented before",
        )
    return "remembered", "remembered as the model invented it before"
