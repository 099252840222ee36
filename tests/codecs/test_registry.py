"""The registry of recipes: names, overrides, bits, what `auto` is, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import registry
from qvg_jax.codecs import presets

pytestmark = pytest.mark.usefixtures("strict_dtypes")


SHAPE = (2, 3, 40, 32)


def test_every_preset_builds_and_names_itself():
    shape = (1, 1, 300, 128)
    bits = {name: presets.get(name).bits_per_element(shape) for name in presets.PRESETS}
    assert {"qvg", "qvg-4bit", "qvg-pro", "qvg-pro-4bit", "rtn", "rtn-4bit", "bf16"} <= set(bits)
    assert bits["bf16"] == 16 and bits["rtn"] == 2.5
    for name in ("qvg", "qvg-pro", "rtn"):
        assert bits[f"{name}-4bit"] - bits[name] == pytest.approx(2)
    assert all(presets.get(name).name == name for name in presets.PRESETS)


def test_preset_overrides():
    small = presets.get("qvg", num_centroids=64, group=32)
    assert small.nbytes((1, 1, 100, 64)) == 100 * (16 + 2 + 1) + 64 * 64 * 2
    assert presets.get("bf16", dtype=jnp.float32).bits_per_element(SHAPE) == 32


def test_bad_presets():
    accepted = "qvg, qvg-4bit, qvg-pro, qvg-pro-4bit, qvg-asym, rtn, rtn-4bit, quarot, .*, bf16, auto, kivi"
    with pytest.raises(ValueError, match=f"codec='zip' is not known; accepted: {accepted}"):
        presets.get("zip")
    with pytest.raises(ValueError, match="codec='rtn' does not accept.*num_centroids"):
        presets.get("rtn", num_centroids=4)
    with pytest.raises(ValueError, match="bits=6"):
        presets.get("qvg", bits=6)


def test_pairs_and_singles():
    for name in presets.PRESETS:
        key_codec, value_codec = presets.pair(name)
        assert key_codec is value_codec and key_codec == presets.get(name)
    for name in presets.PAIRS:
        assert presets.pair(name) == presets.pair(name)
        assert [codec.name for codec in presets.pair(name)] == [name, name]
        with pytest.raises(ValueError, match=f"codec='{name}' has one codec for K.*presets.pair"):
            presets.get(name)
    with pytest.raises(ValueError, match="codec='zip' is not known; accepted: qvg, .*, klt-tiny"):
        presets.pair("zip")
    with pytest.raises(ValueError, match="codec='kivi' does not accept.*budget"):
        presets.pair("kivi", budget=2.0)
    assert not set(presets.PRESETS) & set(presets.PAIRS)
    same, other = presets.pair("klt"), presets.pair("klt", value_gain=1.0)
    assert same[0] == same[1] and other[0] != other[1]


@pytest.mark.parametrize(
    ("name", "bits"),
    [  # by hand, for a span of 37,440 tokens of 128 channels
        ("kivi", 2 + 32 / 128),
        ("quarot", 2 + 16 / 128),
        ("turboquant", 2 + 8 / 128),
        ("nvfp4", 4 + 8 / 16),
        ("pca", 2 + 32 / 128 + 8 / 128),
        ("qvg-asym", 2 + 16 / 128 + 8 / 128 + 16 * 256 / 37_440),
        ("midrise", 2 + 8 / 128 + 8 / 128 + 8 * 256 / 37_440),
        ("kmeans-e8", 2 + 8 / 128 + 8 / 128 + 8 * 256 / 37_440),
        ("midrise-1bit", 1 + 8 / 128 + 2 * (8 / 128 + 8 * 256 / 37_440)),
    ],
)
def test_bits_of_a_long_span(name, bits):
    for codec in presets.pair(name):
        assert codec.bits_per_element((1, 1, 37_440, 128)) == pytest.approx(bits, abs=4e-3)


def test_a_recipe_can_say_what_encodes_it():
    x = jax.random.normal(jax.random.key(0), (1, 2, 64, 32), jnp.bfloat16)
    plain, chosen = (
        presets.get("qvg", num_centroids=8, group=16, **more) for more in ({}, {"encoder": "xla"})
    )
    state = plain.init(x.shape, x.dtype)
    for a, b in zip(*(jax.tree.leaves(c.encode(x, state)) for c in (plain, chosen)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert presets.get("qvg", num_centroids=8, group=16, encoder="xla") == chosen
    for codec in presets.pair("midrise-k1v3", num_centroids=8, encoder="triton"):
        if jax.default_backend() == "cpu":
            with pytest.raises(NotImplementedError, match="implementation='triton'.*'xla' serves"):
                codec.encode(x, codec.init(x.shape, x.dtype))
    with pytest.raises(ValueError, match="encoder='cuda' is not accepted.*mosaic"):
        presets.get("qvg", encoder="cuda")
    with pytest.raises(ValueError, match="codec='bf16' has no encoders"):
        presets.get("bf16", encoder="xla")


def test_auto_is_the_cautious_recipe_unless_a_models_loop_says_otherwise():
    assert presets.recommended() == presets.recommended("worldplay") == "dither"
    assert presets.recommended("pocket-world") == "midrise-k2v4"
    shape = (1, 1, 1024, 128)
    for asked, name in ((dict(), "dither"), (dict(model="pocket-world"), "midrise-k2v4")):
        ours, theirs = presets.pair("auto", **asked), presets.pair(name)
        assert [c.nbytes(shape) for c in ours] == [c.nbytes(shape) for c in theirs]
        assert {c.name for c in ours} == {"auto"}
    assert presets.auto(num_centroids=8)[1].nbytes(shape) < presets.auto()[1].nbytes(shape)
    with pytest.raises(ValueError, match="codec='dither' does not accept"):
        presets.auto(mood=1)


@pytest.mark.parametrize("model", registry.BUILT_IN)
def test_every_models_default_is_what_auto_recommends(model):
    assert registry.named(model).default_codec.partition(":")[0] == presets.recommended(model)
