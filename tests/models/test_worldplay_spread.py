"""WorldPlay on several devices: the frames of one device, by spans, by heads and by a ring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.worldplay.cameras import CameraPath
from models.worldplay.config import SamplerConfig, WorldPlayConfig
from models.worldplay.entry import Options
from models.worldplay.history import History
from models.worldplay.params import WEIGHTS
from models.worldplay.pipeline import WorldPlay
from models.worldplay.request import Walk
from models.worldplay.settings import PLANS, settle
from qvg_jax.cache.plan import Plan
from qvg_jax.errors import UserError
from tests.support import tiny_worldplay
from tests.support.cache_model import coarse

CONFIG = WorldPlayConfig(
    layers=2, width=32, heads=2, ffn_width=32, latent_channels=4, out_channels=4, time_width=8,
    text_width=6, text_slots=5, rope_frames=16, frames_per_block=2, dtype=jnp.float32,
)  # fmt: skip


def video(plan, progress=None, share=False):
    history = History.qvg(coarse(7), storage="single", span_blocks=1, plan=plan)
    text_BUE = np.random.default_rng(0).normal(size=(1, 4, CONFIG.text_width)).astype(np.float32)
    walk = Walk(
        text_BUE=text_BUE,
        path=CameraPath.from_string("w-3,right-4"),
        latent_height=4,
        latent_width=4,
        noise=jax.random.key(1),
    )
    pipeline = WorldPlay(
        WEIGHTS.random(CONFIG),
        sampler=SamplerConfig(steps=(1000.0, 500.0)),
        history=history,
        share_weights=share,
    )
    weights = [x for x in jax.tree.leaves(nnx.state(pipeline.model.blocks)) if x.ndim > 1]
    here = sum(x.addressable_shards[0].data.nbytes for x in weights)
    assert (here < 0.6 * sum(x.nbytes for x in weights)) == share
    return pipeline.generate(walk, chunk=4, progress=progress)


@functools.cache
def on_one_device():
    return video(None)


@pytest.mark.slow
@pytest.mark.parametrize("axis", PLANS)
def test_a_walk_is_that_of_one_device(axis):
    spans = []
    got = video(
        Plan(**{axis: 2}, split_tokens=True),
        lambda *told: spans.append(int(told[2].cache.num_spans)),
        share=axis == "spans",
    )
    assert spans[-1] >= 2 and got.shape == (1, 8, 4, 4, 4)
    np.testing.assert_allclose(got, on_one_device(), rtol=0, atol=1e-4)


def test_a_context_that_is_made_anew_is_not_shared():
    with pytest.raises(ValueError, match="plan spans=2 needs semantics='append'.*plan=None"):
        History(semantics="recompute", plan=Plan(spans=2))


def test_devices_that_cannot_share_a_walk_are_named_before_anything_is_loaded():
    size = dict(height=tiny_worldplay.HEIGHT, width=tiny_worldplay.WIDTH, actions="w-7")
    asked = functools.partial(Options, prompt="a fox", weights="random", **size)
    sizes = tiny_worldplay.sizes()
    two = settle(asked(devices=2, codec=tiny_worldplay.CODEC), sizes)
    assert two.cache(tiny_worldplay.CODEC).layout.plan == Plan(spans=2, split_tokens=True)
    for more, message in (
        (dict(devices=5), "plan spans=5 does not divide"),
        (dict(devices=4, plan="heads"), "plan heads=4 does not divide heads=2"),
        (dict(share_weights=True), "--share-weights is for several devices"),
        (dict(devices=5, plan="ring"), "q has .* tokens, and plan ring=5 .* a multiple of 5"),
    ):
        with pytest.raises(UserError, match=message):
            settle(asked(codec=tiny_worldplay.CODEC, **more), sizes)
