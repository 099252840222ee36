"""One arm of the command: clip after clip, each kept as latents, until all frames are there."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray, UInt8

from models.longcat.pipeline import LongCat, Prompt
from models.longcat.segments import VideoVAE, next_clip, segment_noise, to_frames
from models.longcat.settings import Settings
from models.runs.saved_latents import SavedLatents
from qvg_jax.app.job import Played
from qvg_jax.cache.health import CacheBytes, Regions

NOTHING = CacheBytes(allocated=Regions(*[0] * 5), in_use=Regions(*[0] * 5), bf16=0, tokens=0)

log = logging.getLogger(__name__)


class Source(NamedTuple):
    """What the frames of one arm come from."""

    arm: str
    pipeline: LongCat
    vae: VideoVAE
    prompt: Prompt
    settings: Settings
    key: PRNGKeyArray
    saved: SavedLatents
    size: CacheBytes  # of the condition cache
    first: Callable[[], np.ndarray]  # the first clip, the same for all arms: it reads no cache
    given_BTYX3: UInt8[np.ndarray, "1 T Y X 3"] | None = None  # frames to go on from


def play(source: Source, xs: Iterator[Any]) -> Iterator[Played]:
    """The frames that each clip adds, for each x, which only says that they are wanted.

    Clips of an earlier run are read and decoded, so what follows goes on from the same frames.
    """
    settings, saved = source.settings, source.saved
    F, given = settings.segments.latent_frames, settings.segments.num_cond_frames
    stored, tail = saved.read(source.arm), source.given_BTYX3
    if tail is not None:
        next(xs)
        yield Played(tail[0], NOTHING)
    for number, _ in enumerate(xs):
        begin = time.perf_counter()
        clip_BFZYX = stored[:, number * F : (number + 1) * F]
        old, fresh = bool(clip_BFZYX.shape[1]), tail is None
        if not old:
            segment = number + settings.continued
            clip_BFZYX = source.first() if fresh else _next(source, tail, segment)
        made = time.perf_counter()
        frames_BTYX3 = to_frames(source.vae, clip_BFZYX)
        if not old:
            saved.add(source.arm, number, clip_BFZYX)
        tail = frames_BTYX3[:, -given:]
        parts = {"generate": made - begin, "decode": time.perf_counter() - made}
        new = frames_BTYX3[0] if fresh else frames_BTYX3[0, given:]
        yield Played(new, NOTHING if fresh else source.size, parts, kept=old)


def first_clip(
    pipeline: LongCat,
    prompt: Prompt,
    settings: Settings,
    key: PRNGKeyArray,
    image_B1ZYX: Float[np.ndarray, "1 1 Z Y X"] | None = None,
) -> Float[np.ndarray, "1 F Z Y X"]:
    """Latents of a clip from a prompt alone, or from a prompt and its first frame."""
    noise = segment_noise(key, 0, settings.clip)
    options = dict(schedule=settings.first, guidance=settings.guidance)
    options |= dict(progress=_telling("first clip"))
    if image_B1ZYX is None:
        clip = pipeline.text_to_video(prompt, noise, **options)
    else:
        clip = pipeline.image_to_video(prompt, image_B1ZYX, noise[:, 1:], **options)
    return np.asarray(clip)


def _next(source: Source, tail_BTYX3: np.ndarray, segment: int) -> np.ndarray:
    settings = source.settings
    return next_clip(
        source.pipeline,
        source.vae,
        source.prompt,
        tail_BTYX3,
        key=source.key,
        segment=segment,
        segments=settings.segments,
        schedule=settings.next,
        guidance=settings.guidance,
        progress=_telling(f"{source.arm}: segment {segment}"),
    )


def _telling(what: str):
    def tell(done: int, steps: int, _) -> None:
        log.info(f"{what}, {done} of {steps} denoising steps")

    return tell


def image_latent(
    vae: VideoVAE, video_B13YX: Float[np.ndarray, "1 1 3 Y X"]
) -> Float[np.ndarray, "1 1 Z Y X"]:
    """The normalised latent of a picture."""
    return np.asarray(jax.jit(lambda vae, x: vae.encode(x))(vae, jnp.asarray(video_B13YX)))
