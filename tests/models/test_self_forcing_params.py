"""Names, shapes and counts of the Self-Forcing transformer's parameters; no vectors needed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from models.common.checkpoint import CheckpointError
from models.self_forcing.config import SelfForcingConfig
from models.self_forcing.params import load_dit, skeleton
from tests.support.checkpoint_shapes import wan_shapes

TINY = SelfForcingConfig(
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

PAIRS = ("self_attn", "attn1"), ("cross_attn", "attn2")
TO_DIFFUSERS = (
    (r"text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"time_projection\.1", "condition_embedder.time_proj"),
    (r"norm3", "norm2"),
    (r"ffn\.0", "ffn.net.0.proj"),
    (r"ffn\.2", "ffn.net.2"),
    (r"head\.modulation", "scale_shift_table"),
    (r"(blocks\.\d+)\.modulation", r"\1.scale_shift_table"),
    (r"head\.head", "proj_out"),
    (r"(self|cross)_attn\.([qkv])\.", r"\1_attn.to_\2."),
    (r"(self|cross)_attn\.o\.", r"\1_attn.to_out.0."),
    *PAIRS,
)


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in wan_shapes(TINY).items()}


def leaves(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in flat}


def test_released_checkpoint_has_its_published_size():
    config = SelfForcingConfig.wan_1_3b()
    shapes = wan_shapes(config)
    assert len(shapes) == 825
    assert sum(np.prod(s) for s in shapes.values()) == 1_418_996_800
    ours = jax.tree.leaves(nnx.state(skeleton(config), nnx.Param))
    assert sum(np.prod(v.shape) for v in ours) == 1_418_996_800
    assert {v.dtype for v in ours} == {jnp.dtype(jnp.bfloat16)}


def test_wrapped_and_diffusers_names_load_the_same_model(weights, tmp_path):
    save_file(weights, tmp_path / "plain.safetensors")
    wrapped = {f"model._fsdp_wrapped_module.{k}": v for k, v in weights.items()}
    save_file(wrapped, tmp_path / "wrapped.safetensors")

    def rename(name):
        for pattern, replacement in TO_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        return name

    save_file({rename(k): v for k, v in weights.items()}, tmp_path / "diffusers.safetensors")
    first, *others = (
        leaves(load_dit(tmp_path / f"{kind}.safetensors", TINY))
        for kind in ("plain", "wrapped", "diffusers")
    )
    for other in others:
        assert first.keys() == other.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], other[name])
    stored = weights["blocks.1.cross_attn.k.weight"]
    np.testing.assert_array_equal(first["blocks.cross_attn.k.kernel"][1], stored.T)


def test_wrong_checkpoint_lists_every_problem(weights, tmp_path):
    del weights["blocks.1.norm3.bias"]
    weights["head.modulation"] = weights["head.modulation"][:, :1]
    weights["blocks.2.modulation"] = weights["blocks.0.modulation"]
    weights["img_emb.proj.0.weight"] = np.zeros(3, np.float32)
    save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_dit(tmp_path / "wrong.safetensors", TINY)
    for part in ("blocks.cross_norm.bias[1]", "head.modulation", "blocks.2", "img_emb.proj.0"):
        assert part in str(error.value)


def test_other_wan_variants_are_refused():
    sizes = dict(dim=24, num_heads=2, num_layers=2, ffn_dim=40, in_dim=4, out_dim=4, freq_dim=8)
    sizes |= dict(text_len=7, eps=1e-6)
    assert SelfForcingConfig.from_wan(sizes).head_dim == 12
    for change in (dict(model_type="i2v"), dict(qk_norm=False), dict(patch_size=[2, 2, 2])):
        with pytest.raises(ValueError, match=next(iter(change))):
            SelfForcingConfig.from_wan(sizes | change)
