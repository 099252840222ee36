"""The image as the network is told it: a mask, and the latents of a video that begins with it."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from models.runs.pictures import as_video, pictures
from models.wan_vae import Past, WanVAE

MASK_CHANNELS = 4


def image_condition(
    latents_BFZYX: Float[np.ndarray, "B F Z Y X"], *, given: int = 1
) -> Float[np.ndarray, "B F Z Y X"]:
    """Mask, then latents: all channels of the mask are 1 in the frames that hold the image.

    Args:
        latents_BFZYX: the VAE's, of a video of the image and gray frames (0 in [-1, 1]) after it.
        given: first latent frames that hold an image; 0 if there is none.
    """
    B, F, _, Y, X = latents_BFZYX.shape
    mask = np.zeros((B, F, MASK_CHANNELS, Y, X), np.float32)
    mask[:, :given] = 1
    return np.concatenate([mask, np.asarray(latents_BFZYX, np.float32)], 2)


def picture_condition(
    vae: WanVAE, path: str | Path | None, *, frames: int, height: int, width: int
) -> Float[np.ndarray, "1 F Z Y X"]:
    """The condition of a walk that begins with a picture, or with nothing.

    The picture is scaled to cover the frame and cut around its middle. Without one the mask is 0
    and all frames are gray, which the released model was not trained for.

    Args:
        vae: its encoder runs one latent frame at a time, in constant memory.
        path: any file that FFmpeg reads, or None.
        frames: latent frames of the walk.
        height, width: of the video, in pixels.

    Raises:
        UserError: the file cannot be read.
    """
    gray = np.zeros((1, vae.config.temporal_stride, 3, height, width), np.float32)
    first = gray[:, :1] if path is None else as_video([next(pictures(path, height, width))])
    parts, past = [], None
    for i in range(frames):
        latents, past = _encode(vae, gray if i else first, past)
        parts.append(np.asarray(latents))
    return image_condition(np.concatenate(parts, 1), given=int(path is not None))


@functools.partial(jax.jit, donate_argnames="past")
def _encode(vae: WanVAE, video: Any, past: Past | None) -> tuple[jax.Array, Past]:
    return vae.encode_stream(video, past)
