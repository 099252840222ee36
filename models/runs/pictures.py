"""Images and videos of the user as frames of the size that a model wants."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from qvg_jax.errors import UserError


def pictures(path: str | Path, height: int, width: int) -> Iterator[Image.Image]:
    """The frames of an image or a video, scaled to cover the size and cut around their middle.

    Args:
        path: any file that FFmpeg reads.
        height, width: in pixels.

    Raises:
        UserError: the file cannot be read, or holds no picture.
    """
    try:
        with av.open(str(path)) as file:
            found = False
            for frame in file.decode(video=0):
                found = True
                yield ImageOps.fit(frame.to_image(), (width, height), Image.Resampling.LANCZOS)
    except (OSError, IndexError, av.FFmpegError) as error:  # some of FFmpeg's are OSErrors
        raise UserError(f"{path}: not readable as an image or a video ({error})") from error
    if not found:
        raise UserError(f"{path}: holds no picture")


def as_video(pictures: Sequence[Image.Image]) -> Float[np.ndarray, "1 T 3 Y X"]:
    """Pictures of one size as a video in [-1, 1], as VAEs read it."""
    video = np.stack([np.asarray(p.convert("RGB"), np.float32) for p in pictures])
    return np.moveaxis(video / 127.5 - 1, -1, 1)[None]
