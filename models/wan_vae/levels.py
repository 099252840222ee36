"""What Wan2.2's VAE has beyond Wan2.1's: patches of pixels, and a way around every level.

The way around has no parameters. Going down, the numbers of a little box of frames, rows and
columns are put side by side in the channels, and neighbouring channels are averaged; going up,
channels are repeated and laid out as such boxes. It reads no earlier frames, so it has no past.

Features are channels-last, `[B, T, H, W, C]`, as in `layers`.

Source: Wan2.2's released code (`wan/modules/vae2_2.py`) and parameters.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from models.wan_vae.layers import Features, Past, run


class DownLevel(nnx.Module):
    """Layers that may halve frames and image, plus the averaged input."""

    def __init__(
        self,
        layers: Sequence[nnx.Module],
        channels_in: int,
        channels_out: int,
        temporal: bool,
        spatial: bool,
    ):
        self.downsamples = nnx.List(layers)
        self.channels = channels_out
        self.temporal = temporal
        self.box = (1 + temporal, 1 + spatial)
        _check_box(channels_in, channels_out, self.box)

    def __call__(self, x_BTHWC: Features, past: Past | None) -> tuple[Features, Past]:
        y, past = run(self.downsamples, x_BTHWC, past)
        return y + average_down(x_BTHWC, self.channels, *self.box), past


class UpLevel(nnx.Module):
    """Layers that double the image, and with `temporal` the frames, plus the repeated input.

    The last level (channels not given) doubles nothing and has no way around it.
    """

    def __init__(
        self,
        layers: Sequence[nnx.Module],
        channels_in: int | None = None,
        channels_out: int | None = None,
        temporal: bool = False,
    ):
        self.upsamples = nnx.List(layers)
        self.channels = channels_out
        self.temporal = temporal
        self.box = (1 + temporal, 2)
        if channels_in is not None:
            _check_box(channels_out, channels_in, self.box)

    def __call__(self, x_BTHWC: Features, past: Past | None) -> tuple[Features, Past]:
        y, after = run(self.upsamples, x_BTHWC, past)
        if self.channels is not None:
            around = duplicate_up(x_BTHWC, self.channels, *self.box)
            y = y + around[:, -y.shape[1] :]  # the first frame of a video is not doubled
        return y, after


def average_down(x_BTHWC: Features, channels: int, frames: int, side: int) -> Features:
    """Boxes of `frames` x `side` x `side` to one pixel of `channels` means.

    The numbers of a box lie in the order channel, frame, row, column; each mean is of the next
    C * box / `channels` of them. Where the frames do not fill a box (the first of a video), zeros
    come before them.
    """
    b, t, h, w, c = x_BTHWC.shape
    x = jnp.pad(x_BTHWC, ((0, 0), (-t % frames, 0), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(b, -1, frames, h // side, side, w // side, side, c)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], channels, -1).mean(-1)


def duplicate_up(x_BTHWC: Features, channels: int, frames: int, side: int) -> Features:
    """One pixel to a box of `frames` x `side` x `side` pixels of `channels`.

    Every number is repeated `channels` * box / C times in place; the results are the box in the
    order channel, frame, row, column.
    """
    b, t, h, w, c = x_BTHWC.shape
    x = jnp.repeat(x_BTHWC, channels * frames * side * side // c, -1)
    x = x.reshape(b, t, h, w, channels, frames, side, side)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, t * frames, h * side, w * side, channels)


def patchify(video_BTHWC: Features, side: int) -> Features:
    """Squares of pixels to one, their colours in the channels: colour, column, row."""
    b, t, h, w, c = video_BTHWC.shape
    x = video_BTHWC.reshape(b, t, h // side, side, w // side, side, c)
    x = x.transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(b, t, h // side, w // side, c * side * side)


def unpatchify(x_BTHWC: Features, side: int) -> Features:
    """The inverse of `patchify`."""
    b, t, h, w, c = x_BTHWC.shape
    x = x_BTHWC.reshape(b, t, h, w, c // side**2, side, side)
    x = x.transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(b, t, h * side, w * side, c // side**2)


def _check_box(fine, coarse, box):
    """Channels on the fine side, times the box, must be a multiple of those on the coarse side."""
    frames, side = box
    if fine * frames * side**2 % coarse:
        raise ValueError(
            f"shortcuts=True: the way around a level with {fine} channels on its fine and {coarse} "
            f"on its coarse side needs {fine} x {frames * side**2} to be a multiple of {coarse}"
        )
