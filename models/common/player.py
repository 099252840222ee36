"""Blocks of latents become blocks of video as they are made, in constant memory."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.common.kept import Kept
from models.wan_vae import Past, WanVAE, to_uint8
from qvg_jax.compare import Played
from qvg_jax.health import CacheBytes


class Source(NamedTuple):
    """What the frames of one arm come from."""

    arm: str
    latents: Iterator[Any]  # [B, F, Z, Y, X], block by block: given ones, kept ones, new ones
    given: int  # latent frames that are no one's work
    stored: int  # latent frames after them that an earlier run has made
    size: Callable[[], CacheBytes]  # of the cache, after the newest block


@functools.partial(jax.jit, donate_argnames="past")
def decode_frame(vae: WanVAE, latent_B1ZYX: Any, past: Past | None) -> tuple[jax.Array, Past]:
    """`decode` of one latent frame."""
    video, past = vae.decode_stream(latent_B1ZYX, past)
    return to_uint8(video), past


def decode(vae: WanVAE, latents_BFZYX: Any, past: Past | None) -> tuple[jax.Array, Past]:
    """The next latent frames of a video as uint8 [B, T, Y, X, 3], and the decoder's new past.

    A program for one frame, called for each: in a loop over them XLA keeps every weight of the
    convolutions a second time, in another layout, and the frames' pixels in float32.
    """
    parts = []
    for i in range(latents_BFZYX.shape[1]):
        video, past = decode_frame(vae, latents_BFZYX[:, i : i + 1], past)
        parts.append(video)
    return jnp.concatenate(parts, 1), past


def play(source: Source, xs: Iterator[Any], *, vae: WanVAE, kept: Kept) -> Iterator[Played]:
    """Decodes a block for each x, which only says that a block is wanted; keeps new latents.

    Nothing is made, on disk or device, before the first block is asked for.
    """
    past, frame, number = None, 0, 0
    for _ in xs:
        begin = time.perf_counter()
        latents_BFZYX = next(source.latents)
        made = time.perf_counter()
        video, past = decode(vae, latents_BFZYX, past)
        frames = np.asarray(video)[0]
        old = frame < source.given + source.stored
        if frame >= source.given:
            if not old:
                kept.add(source.arm, number, latents_BFZYX)
            number += 1
        frame += latents_BFZYX.shape[1]
        parts = {"generate": made - begin, "decode": time.perf_counter() - made}
        yield Played(frames, source.size(), parts, kept=old)
