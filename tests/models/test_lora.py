"""LoRA files in every naming, merged into the same matrices of a Wan transformer."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from models.common.checkpoint import CheckpointError
from models.common.lora import merge_lora
from models.common.wan_names import RULES
from models.self_forcing.config import SelfForcingConfig
from models.self_forcing.params import WEIGHTS
from tests.support.tiny_worldplay import drawn

TINY = SelfForcingConfig(
    layers=2, width=24, heads=2, ffn_width=40, time_width=8, text_width=6, text_slots=7,
    dtype=jnp.float32,
)  # fmt: skip
MODULES = ("self_attn.q", "cross_attn.o", "ffn.2")
OUR_PATHS = ("blocks.self_attn.q", "blocks.cross_attn.o", "blocks.ffn.down")
RANK = 3
DIFFUSERS = {"self_attn.q": "attn1.to_q", "cross_attn.o": "attn2.to_out.0", "ffn.2": "ffn.net.2"}


def pairs():
    """(down, up) of each module of each layer."""
    rng = np.random.default_rng(1)
    made = {}
    for i in range(TINY.layers):
        for name in MODULES:
            n_in = TINY.ffn_width if name == "ffn.2" else TINY.width
            down, up = rng.normal(size=(RANK, n_in)), rng.normal(size=(TINY.width, RANK))
            made[f"blocks.{i}.{name}"] = down.astype(np.float32), up.astype(np.float32)
    return made


def _diffusers(module):
    for ours, theirs in DIFFUSERS.items():
        module = module.replace(ours, theirs)
    return module


NAMINGS = {
    "peft": lambda m: (f"base_model.model.{m}.lora_A.weight", f"base_model.model.{m}.lora_B.weight"),
    "peft with an adapter's name, of a wrapped model": lambda m: (
        f"base_model.model.model._fsdp_wrapped_module.{m}.lora_A.default.weight",
        f"base_model.model.model._fsdp_wrapped_module.{m}.lora_B.default.weight",
    ),
    "diffusers": lambda m: (
        f"transformer.{_diffusers(m)}.lora_A.weight", f"transformer.{_diffusers(m)}.lora_B.weight",
    ),
    "diffusers of old": lambda m: (f"unet.{m}.lora.down.weight", f"unet.{m}.lora.up.weight"),
    "a node editor's": lambda m: (
        f"diffusion_model.{m}.lora_down.weight", f"diffusion_model.{m}.lora_up.weight",
    ),
    "kohya": lambda m: (
        f"lora_unet_{m.replace('.', '_')}.lora_down.weight",
        f"lora_unet_{m.replace('.', '_')}.lora_up.weight",
    ),
}  # fmt: skip


def leaves(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in flat}


def fresh():
    """A model of its own: merging donates its matrices."""
    graphdef, state = nnx.split(drawn(WEIGHTS, TINY))
    return nnx.merge(graphdef, nnx.from_flat_state(
        [(p, v.replace(jnp.array(v[...]))) for p, v in nnx.to_flat_state(state)]))  # fmt: skip


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_changes_the_same_matrices(naming, alpha, tmp_path):
    tensors = {}
    for module, (down, up) in pairs().items():
        down_name, up_name = NAMINGS[naming](module)
        tensors |= {down_name: down, up_name: up}
        if alpha is not None:
            stem = next(down_name.partition(x)[0] for x in (".lora_", ".lora.") if x in down_name)
            tensors[stem + ".alpha"] = np.asarray(alpha, np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    before = leaves(drawn(WEIGHTS, TINY))
    after = leaves(merge_lora(fresh(), tmp_path / "lora.safetensors", RULES))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"{path}.kernel" for path in OUR_PATHS}
    scale = 1.0 if alpha is None else alpha / RANK
    for name, path in zip(MODULES, OUR_PATHS, strict=True):
        for i in range(TINY.layers):
            down, up = pairs()[f"blocks.{i}.{name}"]
            want = before[f"{path}.kernel"][i] + scale * (up @ down).T
            np.testing.assert_allclose(after[f"{path}.kernel"][i], want, rtol=0, atol=1e-4)


def test_an_alpha_of_the_caller_and_a_name_that_no_matrix_has(tmp_path):
    tensors = {}
    for module, (down, up) in pairs().items():
        names = NAMINGS["peft"](module)
        tensors |= dict(zip(names, (down, up), strict=True))
    save_file(tensors, tmp_path / "lora.safetensors")
    before = leaves(drawn(WEIGHTS, TINY))["blocks.ffn.down.kernel"]
    merged = merge_lora(fresh(), tmp_path / "lora.safetensors", RULES, alpha=6.0)
    down, up = pairs()["blocks.1.ffn.2"]
    got = leaves(merged)["blocks.ffn.down.kernel"][1] - before[1]
    np.testing.assert_allclose(got, 2 * (up @ down).T, rtol=0, atol=1e-4)
    tensors |= {"base_model.model.blocks.0.moe.lora_A.weight": np.zeros((3, 24), np.float32)}
    tensors |= {"blocks.0.self_attn.q.dora_scale": np.zeros(24, np.float32)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError) as error:
        merge_lora(WEIGHTS.skeleton(TINY), tmp_path / "lora.safetensors", RULES)
    said = str(error.value)
    assert "2 problems" in said and "blocks.0.moe" in said and "dora_scale" in said
