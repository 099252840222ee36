"""Names, shapes and counts of the WorldPlay transformer's parameters; no vectors needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from models.common.checkpoint import CheckpointError
from models.worldplay.config import WorldPlayConfig
from models.worldplay.params import load_dit, skeleton
from tests.support.checkpoint_shapes import worldplay_shapes

TINY = WorldPlayConfig(
    layers=2,
    width=24,
    heads=2,
    ffn_width=40,
    latent_channels=4,
    out_channels=5,
    time_width=8,
    text_width=6,
    text_slots=7,
    dtype=jnp.float32,
)


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in worldplay_shapes(TINY).items()}


def leaves(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in flat}


def test_released_model_has_its_published_size():
    config = WorldPlayConfig.wan_5b()
    count = sum(np.prod(s) for s in worldplay_shapes(config).values())
    assert round(count / 1e9, 2) == 5.29
    assert f"{count:,}" in WorldPlayConfig.wan_5b.__doc__
    ours = jax.tree.leaves(nnx.state(skeleton(config), nnx.Param))
    assert sum(np.prod(v.shape) for v in ours) == count
    prope = [n for n in worldplay_shapes(config) if "prope" in n]
    assert round(sum(np.prod(worldplay_shapes(config)[n]) for n in prope) / 1e6) == 283


def test_wrapped_names_load_the_same_model(weights, tmp_path):
    save_file(weights, tmp_path / "plain.safetensors")
    wrapped = {f"model._fsdp_wrapped_module.{k}": v for k, v in weights.items()}
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    first, other = (
        leaves(load_dit(tmp_path / f"{kind}.safetensors", TINY)) for kind in ("plain", "wrapped")
    )
    assert first.keys() == other.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], other[name])
    stored = weights["blocks.1.attn1.to_out_prope.0.weight"]
    np.testing.assert_array_equal(first["blocks.prope_out.kernel"][1], stored.T)
    np.testing.assert_array_equal(
        first["project.kernel"], weights["condition_embedder.time_proj.weight"].T
    )


def test_a_plain_wan_checkpoint_is_refused_by_every_name_it_lacks(weights, tmp_path):
    wan = {k: v for k, v in weights.items() if "prope" not in k and "action" not in k}
    wan["image_embedder.norm1.weight"] = np.zeros(3, np.float32)
    save_file(wan, tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_dit(tmp_path / "wan.safetensors", TINY)
    parts = ("blocks.prope_out.kernel[1]", "blocks.prope_out.bias[0]", "action.up.kernel")
    for part in (*parts, "action.down.bias", "image_embedder.norm1"):
        assert part in str(error.value)
