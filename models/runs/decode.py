"""Blocks of latents become blocks of video as they are made, in constant memory."""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.runs.saved_latents import SavedLatents
from models.wan_vae import Past, WanVAE, to_uint8
from qvg_jax.app.job import Played
from qvg_jax.cache.health import CacheBytes, CacheFullError, NonFiniteError

log = logging.getLogger(__name__)


class Source(NamedTuple):
    """The latents of one arm, and what decoding them needs to know."""

    arm: str
    latents: Iterator[Any]  # [B, F, Z, Y, X], block by block: given, stored, then new ones
    given: int  # latent frames at the start that the user gave
    stored: int  # latent frames after them that an earlier run has made
    size: Callable[[], CacheBytes]  # of the cache, after the newest block
    decode_last: bool = False  # all latents first, so that cache and decoder are never together


class _Block(NamedTuple):
    latents_BFZYX: Any
    seconds: float
    size: CacheBytes
    old: bool


@functools.partial(jax.jit, donate_argnames="past")
def decode_frame(
    vae: WanVAE, latent_B1ZYX: Any, past: Past | None
) -> tuple[jax.Array, Past, jax.Array]:
    """One latent frame decoded, in a program of its own: bytes, the new past, the count of NaN and Inf."""
    video, past = vae.decode_stream(latent_B1ZYX, past)
    return to_uint8(video), past, (~jnp.isfinite(video)).sum(dtype=jnp.int32)


def decode(vae: WanVAE, latents_BFZYX: Any, past: Past | None) -> tuple[jax.Array, Past]:
    """The next latent frames of a video as uint8 [B, T, Y, X, 3], and the decoder's new past.

    A program for one frame, called for each: in a loop over them XLA keeps every weight of the
    convolutions a second time, in another layout, and the frames' pixels in float32.

    Raises:
        NonFiniteError: the latents, or frames of finite latents, have NaN or Inf. As bytes they
            would be a black picture.
    """
    parts, bad = [], []
    for i in range(latents_BFZYX.shape[1]):
        video, past, count = decode_frame(vae, latents_BFZYX[:, i : i + 1], past)
        parts.append(video)
        bad.append(count)
    if any(bad := [int(count) for count in jax.device_get(bad)]):
        frame = next(i for i, count in enumerate(bad) if count)
        finite = bool(jnp.isfinite(latents_BFZYX[:, : frame + 1]).all())
        raise NonFiniteError(
            f"frames of latent frame {frame} of this block have {bad[frame]} NaN or Inf values: "
            + (
                "the latents are finite, so look at the decoder"
                if finite
                else "so have its latents"
            )
        )
    return jnp.concatenate(parts, 1), past


def play(
    source: Source, xs: Iterator[Any], *, vae: WanVAE, saved: SavedLatents
) -> Iterator[Played]:
    """Decodes a block for each x, which only says that a block is wanted; saves new latents.

    Nothing is made, on disk or device, before the first block is asked for.
    """
    past, blocks = None, _made(source, saved)
    blocks = _all_first(source.arm, blocks) if source.decode_last else blocks
    for _, block in zip(xs, blocks, strict=False):  # one at a time, and none before it is wanted
        begin = time.perf_counter()
        video, past = decode(vae, jnp.asarray(block.latents_BFZYX), past)
        frames = np.asarray(video)[0]
        parts = {"generate": block.seconds, "decode": time.perf_counter() - begin}
        yield Played(frames, block.size, parts, kept=block.old)


def _made(source: Source, saved: SavedLatents) -> Iterator[_Block]:
    """Yields blocks of latents as they are made; a new one is on disk before the next begins."""
    frame, number, begin = 0, 0, time.perf_counter()
    for latents_BFZYX in source.latents:
        seconds = time.perf_counter() - begin
        old = frame < source.given + source.stored
        if frame >= source.given:
            if not old:
                saved.add(source.arm, number, latents_BFZYX)
            number += 1
        frame += latents_BFZYX.shape[1]
        yield _Block(latents_BFZYX, seconds, source.size(), old)
        begin = time.perf_counter()


def _all_first(arm: str, blocks: Iterator[_Block]) -> Iterator[_Block]:
    """Yields the blocks once all of them are made, with their latents in host memory.

    An error in the middle is raised after the blocks before it.
    """
    done: list[_Block] = []
    error: Exception | None = None
    try:
        for block in blocks:
            done.append(block._replace(latents_BFZYX=np.asarray(block.latents_BFZYX)))
            log.info("%s: latents of block %d in %.1f s", arm, len(done), block.seconds)
    except (NonFiniteError, CacheFullError) as e:
        error = e
    yield from done
    if error is not None:
        raise error
