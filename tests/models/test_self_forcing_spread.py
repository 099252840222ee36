"""Self-Forcing on several devices: the frames of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.runs.devices import plan_of, shared_weight_bytes
from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from models.self_forcing.entry import Options
from models.self_forcing.history import History
from models.self_forcing.params import random_dit
from models.self_forcing.pipeline import Generation, SelfForcing
from models.self_forcing.settings import settle
from qvg_jax.cache.plan import Plan
from qvg_jax.errors import UserError
from tests.support import tiny_self_forcing as tiny
from tests.support.cache_model import coarse

CONFIG = SelfForcingConfig(
    layers=2, width=24, heads=2, ffn_width=32, latent_channels=4, out_channels=4, time_width=8,
    text_width=6, text_slots=5, dtype=jnp.float32,
)  # fmt: skip
CODEC = coarse(7)


def request():
    text_BUE = np.random.default_rng(0).normal(size=(1, 4, CONFIG.text_width)).astype(np.float32)
    size = dict(frames=12, latent_height=4, latent_width=4)
    return Generation(text_BUE=text_BUE, noise=jax.random.key(1), **size)


def pipeline(plan, **more):
    history = History.qvg(CODEC, span_frames=3, sink_frames=1, plan=plan)
    return SelfForcing(
        random_dit(CONFIG), sampler=SamplerConfig(steps=(1000, 500)), history=history, **more
    )


@functools.cache
def on_one_device():
    return pipeline(None).generate(request(), chunk=5)


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True])
def test_a_video_is_that_of_one_device(share):
    spread, sizes = pipeline(Plan(spans=2, split_tokens=True), share_weights=share), []
    weights = [x for x in jax.tree.leaves(nnx.state(spread.model)) if x.ndim > 1]
    here = sum(x.addressable_shards[0].data.nbytes for x in weights)
    parts = here / sum(x.nbytes for x in weights)
    assert (0.5 <= parts < 0.7) if share else parts == 1
    if share:  # what `qvg plan` says: these, and one layer that is gathered
        told = shared_weight_bytes(spread.model, 2)
        assert here < told < here + sum(x.nbytes for x in weights) / CONFIG.layers
    video = spread.generate(
        request(), chunk=5, progress=lambda *told: sizes.append(int(told[2].cache.num_spans))
    )
    assert sizes[0] >= 2
    np.testing.assert_allclose(video, on_one_device(), rtol=0, atol=1e-4)


def test_options_become_a_plan():
    asked = dict(prompt="a fox", weights="random")
    assert plan_of(Options(**asked), ("spans",)) is None
    assert plan_of(Options(**asked, devices=1, plan="ring"), ("spans", "ring")) is None
    eight = Plan(spans=8, split_tokens=True)
    assert plan_of(Options(**asked, plan="spans"), ("spans",)) == eight
    assert plan_of(Options(**asked, devices=8), ("spans", "ring")) == eight
    for more, message in (
        (dict(devices=9), "--devices 9 is not accepted: there are 8 devices"),
        (dict(devices=2, plan="ring"), "--plan ring is not accepted by this model: give spans"),
    ):
        with pytest.raises(UserError, match=message):
            plan_of(Options(**asked, **more), ("spans",))
    with pytest.raises(UserError, match="--share-weights is for several devices"):
        settle(Options(**asked, share_weights=True), tiny.sizes())
    with pytest.raises(UserError, match="--devices 4: q has 18 tokens.*a multiple of 4"):
        size = dict(height=tiny.HEIGHT, width=tiny.WIDTH, frames=12, codec="bf16")
        settle(Options(**asked, **size, devices=4, plan="ring"), tiny.sizes())
