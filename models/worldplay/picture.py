"""A picture as the latent of a walk's first frame."""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from models.runs.pictures import as_video, pictures, upright
from models.wan_vae import WanVAE
from qvg_jax.errors import UserError

LEAST_KEPT = 0.5  # of a picture; what is cut off more is no longer that picture


def check_picture(path: str | Path, height: int, width: int) -> None:
    """Raises UserError if the file holds no picture, or one of quite another shape."""
    try:
        frame = next(upright(path))
    except UserError as error:
        raise UserError(f"--image {error}") from error
    ratio = (frame.width / frame.height) / (width / height)
    if min(ratio, 1 / ratio) < LEAST_KEPT:
        raise UserError(
            f"--image {path} is {frame.width} x {frame.height}: a video of {width} x {height} would "
            f"show {min(ratio, 1 / ratio):.0%} of it; accepted: a picture of about that shape"
        )


def picture_latent(
    vae: WanVAE, path: str | Path, height: int, width: int
) -> Float[np.ndarray, "1 Z Y X"]:
    """The latent of a picture, scaled to cover the frame and cut around its middle.

    The mean of the encoder's distribution, where the released code draws from it.
    """
    video = as_video([next(pictures(path, height, width))])
    return np.asarray(_encode(vae, video))[:, 0]


@jax.jit
def _encode(vae, video):
    return vae.encode_stream(video)[0]
