"""Names, shapes and counts of LongCat's parameters, its shards and its LoRA; no vectors needed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from models.common.checkpoint import CheckpointError
from models.common.lora import merge_lora
from models.longcat.config import LongCatConfig
from models.longcat.params import RULES, load_dit, skeleton
from tests.support.checkpoint_shapes import longcat_shapes

TINY = LongCatConfig(
    layers=2,
    width=24,
    heads=2,
    mlp_ratio=1,
    latent_channels=4,
    out_channels=5,
    time_width=8,
    condition_width=10,
    text_width=6,
    dtype=jnp.float32,
)


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in longcat_shapes(TINY).items()}


def leaves(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in flat}


def test_released_checkpoint_has_its_published_size():
    config = LongCatConfig.longcat_video()
    assert (config.head_dim, config.ffn_width) == (128, 11008)
    shapes = longcat_shapes(config)
    assert len(shapes) == 1022
    assert sum(np.prod(s) for s in shapes.values()) == 13_581_071_424
    ours = jax.tree.leaves(nnx.state(skeleton(config), nnx.Param))
    assert sum(np.prod(v.shape) for v in ours) == 13_581_071_424
    assert {v.dtype for v in ours} == {jnp.dtype(jnp.bfloat16)}


def split(weights, folder, parts=3):
    """Saves shards and their index; returns the file names."""
    names = [f"w-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    where = {key: names[i % parts] for i, key in enumerate(weights)}
    for name in names:
        save_file({k: x for k, x in weights.items() if where[k] == name}, folder / name)
    (folder / "w.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return names


def test_shards_load_like_one_file(weights, tmp_path):
    save_file(weights, tmp_path / "whole.safetensors")
    (tmp_path / "shards").mkdir()
    names = split(weights, tmp_path / "shards")
    whole = leaves(load_dit(tmp_path / "whole.safetensors", TINY))
    one_by_one = [tmp_path / "shards" / name for name in names]
    for source in (tmp_path / "shards", one_by_one):
        parts = leaves(load_dit(source, TINY))
        assert parts.keys() == whole.keys()
        for name in whole:
            np.testing.assert_array_equal(parts[name], whole[name])
    stored = weights["blocks.1.ffn.w3.weight"]
    np.testing.assert_array_equal(whole["blocks.ffn.up.kernel"][1], stored.T)


@pytest.mark.parametrize("index", ["kept", "gone", "broken"])
def test_missing_shards_are_named(weights, tmp_path, index):
    names = split(weights, tmp_path)
    (tmp_path / names[1]).unlink()
    said = f"1 shards are missing: {names[1]}"
    if index == "gone":
        (tmp_path / "w.safetensors.index.json").unlink()
    if index == "broken":
        (tmp_path / "w.safetensors.index.json").write_text("{}")
        said = "not an index"
    with pytest.raises(CheckpointError, match=said):
        load_dit(tmp_path, TINY)
    if index == "kept":
        with pytest.raises(CheckpointError, match=said):
            load_dit([tmp_path / names[0], tmp_path / names[2]], TINY)


def test_wrong_checkpoint_lists_every_problem(weights, tmp_path):
    del weights["blocks.1.pre_crs_attn_norm.bias"]
    weights["final_layer.linear.bias"] = weights["final_layer.linear.bias"][:-1]
    weights["blocks.2.ffn.w1.weight"] = weights["blocks.0.ffn.w1.weight"]
    weights["pos_embed"] = np.zeros(3, np.float32)
    save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_dit(tmp_path / "wrong.safetensors", TINY)
    for part in ("cross_norm.bias[1]", "final_layer.linear.bias", "blocks.2", "pos_embed"):
        assert part in str(error.value)


def test_other_variants_are_refused():
    sizes = dict(depth=2, hidden_size=24, num_heads=2)
    assert LongCatConfig.from_json(sizes).head_dim == 12
    changes = (
        dict(patch_size=[2, 2, 2]),
        dict(enable_bsa=True),
        dict(bsa_params=dict(chunk_3d_shape_q=[4, 4]), enable_bsa=True),
        dict(bsa_params=dict(sparse=0.5), enable_bsa=True),
    )
    for change in changes:
        with pytest.raises(ValueError, match=next(iter(change))):
            LongCatConfig.from_json(sizes | change)
    with pytest.raises(ValueError, match="no depth"):
        LongCatConfig.from_json({"hidden_size": 24, "num_heads": 2})
    with pytest.raises(ValueError, match="heads=5"):
        LongCatConfig.from_json(sizes | dict(num_heads=5))


GROUPS = {"attn.qkv": 3, "attn.proj": 1, "cross_attn.kv_linear": 2, "ffn.w2": 1}


def lora_tensors(rank=3):
    """Pairs for some matrices of every layer, and one of the head."""
    rng = np.random.default_rng(1)
    shapes = longcat_shapes(TINY)
    modules = {f"blocks.{i}.{m}": g for i in range(TINY.layers) for m, g in GROUPS.items()}
    tensors = {}
    for module, g in (modules | {"final_layer.linear": 1}).items():
        n_out, n_in = shapes[module + ".weight"]
        at = "lora___lorahyphen___" + module.replace(".", "___lorahyphen___")
        tensors[f"{at}.lora_down.weight"] = rng.normal(size=(g * rank, n_in))
        for j in range(g):
            block = f".blocks.{j}" if g > 1 else ""
            tensors[f"{at}.lora_up{block}.weight"] = rng.normal(size=(n_out // g, rank))
        tensors[f"{at}.alpha_scale"] = np.asarray(0.5)
    return {k: np.asarray(x, np.float32) for k, x in tensors.items()}


def key_of(module, part):
    return f"lora___lorahyphen___{module.replace('.', '___lorahyphen___')}.{part}"


def test_lora_is_added_to_its_matrices_and_can_be_taken_out(weights, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    lora = lora_tensors()
    save_file(lora, tmp_path / "lora.safetensors")
    before = leaves(load_dit(tmp_path / "w.safetensors", TINY))
    options = dict(multiplier=0.7, rank=3)
    model = load_dit(tmp_path / "w.safetensors", TINY)
    model = merge_lora(model, tmp_path / "lora.safetensors", RULES, **options)
    after = leaves(model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    kernels = ("self_attn.qkv", "self_attn.out", "cross_attn.kv", "ffn.down")
    assert changed == {f"blocks.{n}.kernel" for n in kernels} | {"head.project.kernel"}
    down = lora[key_of("blocks.1.attn.qkv", "lora_down.weight")].reshape(3, 3, -1)
    ups = [lora[key_of("blocks.1.attn.qkv", f"lora_up.blocks.{j}.weight")] for j in range(3)]
    delta = 0.7 * 0.5 * np.concatenate([u @ d for u, d in zip(ups, down, strict=True)])
    name = "blocks.self_attn.qkv.kernel"
    delta = delta.T.reshape(before[name][1].shape)
    np.testing.assert_allclose(after[name][1], before[name][1] + delta, rtol=0, atol=1e-5)
    model = merge_lora(model, tmp_path / "lora.safetensors", RULES, multiplier=-0.7)
    for name, x in leaves(model).items():
        np.testing.assert_allclose(x, before[name], rtol=0, atol=1e-5)


def without(part):
    return lambda t: {k: x for k, x in t.items() if part not in k}


def with_rank(module, rank):
    """Replaces the pairs of one module by those of another rank."""
    other = lora_tensors(rank)
    at = key_of(module, "")
    return lambda t: t | {k: x for k, x in other.items() if k.startswith(at)}


WRONG = {
    "another rank than asked for": (lambda t: t, "rank: the file has rank 3, asked for is 8"),
    "two ranks": (with_rank("blocks.0.attn.proj", 2), "rank: the file has several, 2, 3"),
    "ranks that do not meet": (
        lambda t: t | {key_of("blocks.0.attn.proj", "lora_up.weight"): np.zeros((24, 2), "f")},
        "misshapen: blocks.0.attn.proj",
    ),
    "wrong width": (
        lambda t: t | {key_of("blocks.1.ffn.w2", "lora_down.weight"): np.zeros((3, 7), "f")},
        "misshapen: blocks.1.ffn.w2",
    ),
    "a layer too many": (
        lambda t: t | {k.replace("___1___", "___2___"): x for k, x in t.items()},
        "unused: blocks.2",
    ),
    "a layer too few": (without("___1___"), r"missing: blocks.self_attn.qkv.kernel\[1\]"),
    "no scale": (without("alpha_scale"), "missing: parts of blocks.0.attn.qkv"),
    "a block too few": (without("blocks.1.weight"), "missing: parts of blocks.0.attn.qkv"),
    "another model's names": (
        lambda t: {"lora_A.weight": np.zeros((3, 24), "f")},
        "unused: lora_A.weight",
    ),
    "nothing": (lambda t: {}, "holds no LoRA"),
    "NaN": (
        lambda t: {k: np.asarray(x * np.float32("nan")) for k, x in t.items()},
        "NaN or Inf values; accepted: finite",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lora_says_what_is_wrong(tmp_path, case):
    change, said = WRONG[case]
    save_file(change(lora_tensors()), tmp_path / "lora.safetensors")
    rank = 8 if case == "another rank than asked for" else None
    with pytest.raises(CheckpointError, match=said):
        merge_lora(skeleton(TINY), tmp_path / "lora.safetensors", RULES, rank=rank)
