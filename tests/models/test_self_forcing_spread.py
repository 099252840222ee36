"""Self-Forcing on several devices: the frames of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.common.spread_weights import weight_specs
from models.common.wan_text import TextKV
from models.runs.devices import on_all_devices, plan_of
from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from models.self_forcing.entry import Options
from models.self_forcing.history import History
from models.self_forcing.params import random_dit, skeleton
from models.self_forcing.pipeline import Generation, SelfForcing
from qvg_jax.cache.plan import Plan
from qvg_jax.errors import UserError
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


def pipeline(plan):
    history = History.qvg(CODEC, span_frames=3, sink_frames=1, plan=plan)
    return SelfForcing(
        random_dit(CONFIG), sampler=SamplerConfig(steps=(1000, 500)), history=history
    )


@functools.cache
def on_one_device():
    return pipeline(None).generate(request(), chunk=5)


@pytest.mark.slow
def test_a_video_is_that_of_one_device():
    spread, sizes = pipeline(Plan(spans=2, split_tokens=True, split_weights=True)), []
    video = spread.generate(
        request(), chunk=5, progress=lambda *told: sizes.append(int(told[2].cache.num_spans))
    )
    assert sizes[0] >= 2
    np.testing.assert_allclose(video, on_one_device(), rtol=0, atol=1e-4)


def test_layers_lie_in_parts_and_everything_else_whole():
    state = nnx.split(skeleton(CONFIG))[1]
    placed = jax.tree.leaves(weight_specs(state, Plan(spans=4, split_weights=True)))
    kept = total = 0
    for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(state), placed, strict=True):
        share = 0.25 if "spans" in spec else 1
        assert all(part is None or not n % 4 for part, n in zip(spec, x.shape, strict=True))
        layers = jax.tree_util.keystr(path).startswith("['blocks']")
        assert layers or share == 1, path
        kept, total = kept + layers * share * x.size, total + layers * x.size
    assert 0.25 <= kept / total < 0.3
    whole = jax.tree.leaves(weight_specs(state, Plan(spans=4)))
    assert not any(any(spec) for spec in whole)


@pytest.mark.parametrize("split", [False, True])
def test_weights_in_parts_are_gathered_layer_by_layer(split):
    """Never all layers at once: that would take the memory which the parts save."""
    plan = Plan(spans=4, split_tokens=True, split_weights=split)
    model = on_all_devices(random_dit(CONFIG), plan)
    dtype = CONFIG.dtype
    text = jnp.zeros((CONFIG.layers, 1, CONFIG.text_slots, CONFIG.heads, CONFIG.head_dim), dtype)
    x_BFZYX = jnp.zeros((1, 3, CONFIG.latent_channels, 4, 4), dtype)

    @jax.jit
    def forward(model, x_BFZYX):
        see_nothing = lambda q, k, v, layer: v  # noqa: E731
        return model(x_BFZYX, jnp.ones((1,)), TextKV(text, text), see_nothing, plan=plan).flow_BFZYX

    program = forward.lower(model, x_BFZYX).compile().as_text()
    gathered = re.findall(r"= \(?f32\[([\d,]*)\][^=]* all-gather(?:-start)?\(", program)
    widths = {CONFIG.width, CONFIG.ffn_width}
    matrices = [g for g in gathered if {*map(int, g.split(","))} & widths]
    assert bool(matrices) == split
    assert all(g.split(",")[0] in ("1", str(CONFIG.width), str(CONFIG.ffn_width)) for g in matrices)


def test_options_become_a_plan():
    asked = dict(prompt="a fox", weights="random")
    assert plan_of(Options(**asked), ("spans",)) is None
    assert plan_of(Options(**asked, devices=1, plan="ring"), ("spans", "ring")) is None
    eight = Plan(spans=8, split_tokens=True)
    assert plan_of(Options(**asked, plan="spans"), ("spans",)) == eight
    assert plan_of(Options(**asked, devices=8), ("spans", "ring")) == eight
    parts = Plan(heads=2, split_tokens=True, split_weights=True)
    assert plan_of(Options(**asked, devices=2, split_weights=True), ("heads",)) == parts
    for more, message in (
        (dict(devices=9), "--devices 9 is not accepted: there are 8 devices"),
        (dict(split_weights=True), "--split-weights needs several devices: give --devices N"),
        (dict(devices=2, plan="ring"), "--plan ring is not accepted by this model: give spans"),
    ):
        with pytest.raises(UserError, match=message):
            plan_of(Options(**asked, **more), ("spans",))
