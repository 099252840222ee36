"""Videos that begin with given frames: an image, or a video to go on from."""

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from models.runs.pictures import as_video, pictures
from models.self_forcing.config import SelfForcingConfig
from models.wan_vae import Past, WanVAE
from qvg_jax.errors import UserError


def initial_latents(
    vae: WanVAE,
    config: SelfForcingConfig,
    path: str | Path,
    *,
    image: bool,
    frames: int,
    height: int,
    width: int,
) -> Float[np.ndarray, "1 F Z Y X"]:
    """Latents of an image (one frame) or of a video (whole blocks, a ragged end is left out).

    Frames are scaled to cover the size and cut around their middle. Their rate is not changed: the
    model expects 16 frames a second.

    Args:
        vae: its encoder runs piece by piece, in constant memory.
        config: gives the frames of a block.
        path: any file that FFmpeg reads.
        image: whether only the first frame is wanted.
        frames: latent frames of the whole video; the given ones must leave room for a block.
        height, width: of the video, in pixels.

    Raises:
        UserError: the file cannot be read, or is too short or too long.
    """
    n, stride = config.frames_per_block, vae.config.temporal_stride
    given = pictures(path, height, width)
    if image:
        return np.asarray(_encode(vae, as_video([next(given)]), None)[0])
    parts, past = [], None
    most = (frames - 1) // n - 1 if frames % n else frames // n - 1
    count = 1 + stride * (n - 1)  # the first latent frame is one picture
    while len(piece := list(itertools.islice(given, count))) == count:
        if len(parts) == most:
            raise UserError(
                f"--video {path} has more than the {most * n} latent frames that leave room for a "
                f"block of new ones in --frames {frames}; give more frames or a shorter video"
            )
        latents, past = _encode(vae, as_video(piece), past)
        parts.append(np.asarray(latents))
        count = stride * n
    if not parts:
        raise UserError(
            f"--video {path} has {len(piece)} frames; accepted: at least {count}, one block"
        )
    return np.concatenate(parts, axis=1)


@functools.partial(jax.jit, donate_argnames="past")
def _encode(vae: WanVAE, video: Any, past: Past | None) -> tuple[jax.Array, Past]:
    return vae.encode_stream(video, past)
