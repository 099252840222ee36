"""One NaN in a decoder, a LoRA or latents is an error with its place, and never a black video."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.longcat.segments import to_frames
from models.runs.decode import decode
from qvg_jax.app.job import Arm, Block, Job, lockstep
from qvg_jax.app.play.walk import Walk
from qvg_jax.cache.health import NonFiniteError
from tests.support.fake_world import fake_world


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class OneGain:
    """A decoder with one weight."""

    gain: Any

    def decode(self, latents_BFZYX):
        return latents_BFZYX[:, :, :3] * self.gain

    def decode_stream(self, latents_BFZYX, past):
        return self.decode(latents_BFZYX), past


LATENTS = np.linspace(-1, 1, 2 * 3 * 4 * 4, dtype=np.float32).reshape(1, 2, 3, 4, 4)


def test_good_frames_are_decoded():
    frames, _ = decode(OneGain(jnp.float32(1)), jnp.asarray(LATENTS), None)
    assert frames.shape == (1, 2, 4, 4, 3) and int(frames.min()) == 0 and int(frames.max()) == 255
    assert to_frames(OneGain(jnp.float32(1)), LATENTS).shape == (1, 2, 4, 4, 3)


def test_a_bad_decoder_and_bad_latents_are_told_apart():
    bad = LATENTS.copy()
    bad[0, 1, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="latent frame 1 .* 1 NaN or Inf.*so have its latents"):
        decode(OneGain(jnp.float32(1)), jnp.asarray(bad), None)
    with pytest.raises(NonFiniteError, match="latent frame 0 .* 48 .*look at the decoder"):
        decode(OneGain(jnp.float32(np.nan)), jnp.asarray(LATENTS), None)
    with pytest.raises(NonFiniteError, match="latents of a clip"):
        to_frames(OneGain(jnp.float32(1)), bad)
    with pytest.raises(NonFiniteError, match="96 NaN or Inf values.*look at the decoder"):
        to_frames(OneGain(jnp.float32(np.inf)), LATENTS + 1.5)


def spoilt():
    """The fake world with frames of NaN where somebody presses d, over a cache that is well."""
    world = fake_world(tour_blocks=1)

    def step(cache, x):
        cache, frames = world.step(cache, x)
        return cache, jnp.where(x[1] == 3, jnp.nan, frames)

    return dataclasses.replace(world, step=step)


def test_frames_of_nan_end_a_walk_and_a_job():
    walk = Walk(spoilt())
    assert walk.step("w").frames_FHW3.shape == (4, 16, 24, 3)
    with pytest.raises(NonFiniteError, match="frames of block 2"):
        walk.step("d")
    with pytest.raises(NonFiniteError, match="the walk has ended"):
        walk.step("w")


def test_frames_of_nan_end_a_job():
    world = spoilt()
    inputs = world.inputs(0, iter("wwd"))
    job = Job(
        step=world.step, model="fake", cache=lambda state: state, config={}, truth=False,
        arms=(Arm(name="bf16", state=world.begin(0, world.codec("bf16"))),),
        blocks=(Block(x, None, None) for x in inputs),
        tour=0, frames=16, block_frames=4, height=16, width=24,
    )  # fmt: skip
    made = lockstep(job)
    assert [next(made).first for _ in range(3)] == [0, 4, 8]
    with pytest.raises(NonFiniteError, match="bf16: NaN or Inf in frames of block 3"):
        next(made)
