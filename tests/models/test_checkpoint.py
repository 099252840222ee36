"""Safetensors into skeletons: layouts, stacking, dtypes, and one error for all that is wrong."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from models.common import (
    CheckpointError,
    Rule,
    conv_kernel,
    linear_kernel,
    load,
    patch_kernel,
    vector,
)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.proj = nnx.Linear(3, 5, use_bias=False, rngs=rngs)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.patch = nnx.Linear(8, 3, dtype=jnp.float32, param_dtype=jnp.bfloat16, rngs=rngs)
        self.blocks = nnx.vmap(Block)(rngs.split(4))
        self.convs = nnx.List([nnx.Conv(3, 2, (3, 1, 1), rngs=rngs) for _ in range(2)])
        self.gamma = nnx.Param(jnp.ones((3,)))


RULES = (
    Rule(r"patch\.weight", "patch.kernel", patch_kernel),
    Rule(r"patch\.bias", "patch.bias"),
    Rule(r"blocks\.(\d+)\.proj\.weight", "blocks.proj.kernel", linear_kernel, layer=1),
    Rule(r"convs\.(\d+)\.weight", r"convs.\1.kernel", conv_kernel),
    Rule(r"convs\.(\d+)\.bias", r"convs.\1.bias"),
    Rule(r"(gamma|tied_gamma)", "gamma", vector, alias=True),
)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    shapes = {"patch.weight": (3, 2, 1, 2, 2), "patch.bias": (3,), "gamma": (3, 1, 1)}
    shapes |= {f"blocks.{i}.proj.weight": (5, 3) for i in range(4)}
    shapes |= {f"convs.{i}.weight": (2, 3, 3, 1, 1) for i in range(2)}
    shapes |= {f"convs.{i}.bias": (2,) for i in range(2)}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def skeleton():
    return nnx.eval_shape(lambda: Net(nnx.Rngs(0)))


def load_from(tmp_path, tensors, **kw):
    save_file(tensors, tmp_path / "w.safetensors")
    return load(skeleton(), tmp_path / "w.safetensors", RULES, **kw)


def test_every_layout_lands_where_the_model_reads_it(tmp_path, tensors):
    net = load_from(tmp_path, tensors)
    for i in range(4):
        block = jax.tree.map(lambda x, i=i: x[i], net.blocks)
        np.testing.assert_array_equal(block.proj.kernel[...], tensors[f"blocks.{i}.proj.weight"].T)
    x = np.random.default_rng(1).standard_normal((2, 1, 2, 2)).astype(np.float32)
    expected = np.tensordot(tensors["patch.weight"], x, 4) + tensors["patch.bias"]
    assert net.patch.kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(net.patch(x.reshape(1, -1))[0], expected, atol=0.1)
    np.testing.assert_array_equal(
        net.convs[1].kernel[...], tensors["convs.1.weight"].transpose(2, 3, 4, 1, 0)
    )
    np.testing.assert_array_equal(net.gamma[...], tensors["gamma"][:, 0, 0])


def test_shards_prefixes_and_stored_bfloat16(tmp_path, tensors):
    tensors = {f"model.{k}": v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    names = sorted(tensors)
    save_file({k: tensors[k] for k in names[:5]}, tmp_path / "w-1.safetensors")
    save_file({k: tensors[k] for k in names[5:]}, tmp_path / "w-2.safetensors")
    net = load(skeleton(), tmp_path, RULES, rename=lambda k: k.removeprefix("model."))
    assert net.gamma.dtype == jnp.float32
    np.testing.assert_array_equal(
        net.gamma[...], tensors["model.gamma"].astype(np.float32)[:, 0, 0]
    )


def test_all_problems_in_one_error(tmp_path, tensors):
    del tensors["blocks.2.proj.weight"], tensors["patch.bias"]
    tensors["blocks.4.proj.weight"] = tensors["blocks.0.proj.weight"]
    tensors["blocks.3.proj.weight"] = np.zeros((6, 3), np.float32)
    tensors["convs.0.bias"] = np.zeros(2, np.int8)
    tensors["lora.up"] = np.zeros((1, 7), np.float32)
    tensors["gamma"] = np.zeros((3, 2), np.float32)
    tensors["convs.1.weight"] = np.zeros(4, np.float32)
    with pytest.raises(CheckpointError) as e:
        load_from(tmp_path, tensors)
    text = str(e.value)
    assert text.startswith("8 problems")
    for line in (
        r"missing: blocks.proj.kernel[2] (stored as blocks\.(\d+)\.proj\.weight)",
        "missing: patch.bias",
        "unused: blocks.4.proj.weight [5, 3], the model has no blocks.proj.kernel[4]",
        "misshapen: blocks.3.proj.weight [6, 3] gives [3, 6], blocks.proj.kernel[3] is [3, 5]",
        "misshapen: gamma [3, 2] gives [3, 2], gamma is [3]",
        "misshapen: convs.1.weight [4] gives []",
        "dtype: convs.0.bias is I8",
        "unused: lora.up [1, 7]",
    ):
        assert line in text


def test_a_weight_that_is_not_finite_is_named(tmp_path, tensors):
    tensors["blocks.2.proj.weight"][0, 0] = np.nan
    tensors["gamma"][0, 0] = np.inf
    want = r"(gamma|blocks\.2\.proj\.weight) has 1 NaN or Inf values; accepted: finite values"
    with pytest.raises(CheckpointError, match=want):
        load_from(tmp_path, tensors)


def test_tied_and_ignored_names(tmp_path, tensors):
    tensors["tied_gamma"] = tensors["gamma"].copy()
    tensors["decoder.x"] = np.zeros(1, np.float32)
    net = load_from(tmp_path, tensors, ignore=[r"decoder\..*"])
    np.testing.assert_array_equal(net.gamma[...], tensors["gamma"][:, 0, 0])


def test_the_same_tensor_in_two_shards_is_an_error(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"patch.bias": tensors["patch.bias"]}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="stored twice: patch.bias"):
        load(skeleton(), tmp_path, RULES)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"not a header")
    with pytest.raises(CheckpointError, match="qvg convert"):
        load(skeleton(), tmp_path / "w.pth", RULES)
    with pytest.raises(CheckpointError, match="not a readable"):
        load(skeleton(), tmp_path / "broken.safetensors", RULES)
    with pytest.raises(CheckpointError, match="no such file"):
        load(skeleton(), tmp_path / "absent.safetensors", RULES)
    with pytest.raises(CheckpointError, match="no such file"):
        (tmp_path / "empty").mkdir()
        load(skeleton(), tmp_path / "empty", RULES)
