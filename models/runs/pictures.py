"""Images and videos of the user as frames of the size that a model wants, the right way up."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from qvg_jax.errors import UserError, printable

MOST_PIXELS = 2**26  # of a picture: 8,192 x 8,192
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEGREES = {90: 8, 180: 3, 270: 6}  # a video's rotation, counterclockwise, as an EXIF orientation


def pictures(path: str | Path, height: int, width: int) -> Iterator[Image.Image]:
    """The frames of an image or a video, scaled to cover the size and cut around their middle.

    Args:
        path: any file that FFmpeg reads.
        height, width: in pixels.

    Raises:
        UserError: the file cannot be read, or holds no picture.
    """
    for picture in upright(path):
        yield ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def upright(path: str | Path) -> Iterator[Image.Image]:
    """The frames of an image or a video as a viewer shows them.

    A camera that is held sideways stores what its sensor saw, and beside it how to turn that: in
    EXIF of an image, in the display matrix of a video.

    Args:
        path: any file that FFmpeg reads. It is read as a file whatever its name, such as "12:30.png",
            and nothing else is opened that it may refer to, such as the address of a playlist.

    Raises:
        UserError: the file cannot be read, is larger than `MOST_PIXELS`, or holds no picture.
    """
    found = False
    try:
        orientation = _orientation(path)
        # No protocol is named "none": a playlist can open nothing.
        with (
            open(path, "rb") as data,
            av.open(data, options={"protocol_whitelist": "none"}) as file,
        ):
            _check_pixels(path, *_size(file))
            for frame in file.decode(video=0):
                _check_pixels(path, frame.width, frame.height)
                found, picture = True, frame.to_image()
                turn = _DEGREES.get(frame.rotation % 360) if orientation is None else orientation
                yield picture.transpose(_TURNS[turn]) if turn in _TURNS else picture
    except UserError:
        raise
    except (OSError, IndexError, ValueError, MemoryError, av.FFmpegError) as error:
        # Some of FFmpeg's errors are OSErrors, some ValueErrors.
        what = printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)
        raise UserError(f"{path}: not readable as an image or a video ({what})") from error
    if not found:
        raise UserError(f"{path}: holds no picture")


def _orientation(path: str | Path) -> int | None:
    """The EXIF orientation of an image, from its headers alone; None for a video."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            _check_pixels(path, image.width, image.height)
            with contextlib.suppress(
                Exception
            ):  # a torn EXIF block is no reason to refuse a picture
                return int(image.getexif().get(_EXIF_ORIENTATION, 1))
            return 1
    except Image.UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {error}; accepted: at most {MOST_PIXELS} pixels") from error


def _size(file: Any) -> tuple[int, int]:
    """Width and height that a file says its pictures have."""
    context = file.streams.video[0].codec_context
    if context is None:
        raise ValueError("FFmpeg has no decoder for it")
    return context.width, context.height


def _check_pixels(path: str | Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{path} is {width} x {height}; accepted: pictures of at most {MOST_PIXELS} pixels"
        )


def as_video(pictures: Sequence[Image.Image]) -> Float[np.ndarray, "1 T 3 Y X"]:
    """Pictures of one size as a video in [-1, 1], as VAEs read it."""
    video = np.stack([np.asarray(p.convert("RGB"), np.float32) for p in pictures])
    return np.moveaxis(video / 127.5 - 1, -1, 1)[None]
