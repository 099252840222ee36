"""Blocks of latents become blocks of video as they are made, in constant memory."""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from models.self_forcing.kept import Kept
from models.self_forcing.pipeline import Request, SelfForcing
from models.wan_vae import Past, WanVAE, to_uint8
from qvg_jax.compare import Played
from qvg_jax.health import cache_bytes


class Source(NamedTuple):
    """What the frames of one arm come from."""

    arm: str
    pipeline: SelfForcing
    request: Request  # without `done_BFZYX`
    vae: WanVAE
    kept: Kept


@functools.partial(jax.jit, donate_argnames="past")
def decode(vae: WanVAE, latents_BFZYX: Any, past: Past | None) -> tuple[jax.Array, Past]:
    """The next latent frames of a video as uint8 [B, T, Y, X, 3], and the decoder's new past."""
    video, past = vae.decode_stream(latents_BFZYX, past)
    return to_uint8(video), past


def play(source: Source, xs: Iterator[Any]) -> Iterator[Played]:
    """Generates and decodes a block for each x, which only says that a block is wanted.

    Latents of an earlier run are read, go through the clean pass and are decoded; the caches of
    transformer and decoder are then what they were, and generation goes on. Nothing is made, on
    disk or device, before the first block is asked for.
    """
    arm, pipeline, request, vae, kept = source
    stored = kept.read(arm)
    given = 0 if request.initial_BFZYX is None else request.initial_BFZYX.shape[1]
    sizes, past, frame, number = [], None, 0, 0

    def look(done, total, state):
        sizes[:] = [cache_bytes(state.cache)]

    room = request.frames - given
    request = dataclasses.replace(request, done_BFZYX=stored[:, :room])
    blocks = pipeline.stream(request, progress=look)
    for _ in xs:
        begin = time.perf_counter()
        latents_BFZYX = next(blocks)
        made = time.perf_counter()
        video, past = decode(vae, latents_BFZYX, past)
        frames = np.asarray(video)[0]
        old = frame < given + stored.shape[1]
        if frame >= given:
            if not old:
                kept.add(arm, number, latents_BFZYX)
            number += 1
        frame += latents_BFZYX.shape[1]
        parts = {"generate": made - begin, "decode": time.perf_counter() - made}
        yield Played(frames, sizes[0], parts, kept=old)
