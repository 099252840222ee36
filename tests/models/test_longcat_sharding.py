"""LongCat with its heads on eight devices, and on one: the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.common.lora import merge_lora
from models.longcat.config import LongCatConfig
from models.longcat.params import RULES, load_dit, random_dit
from models.longcat.pipeline import LongCat, Prompt
from models.longcat.sampler import StepInput, cached_step
from models.longcat.schedule import standard
from models.longcat.sharding import AXIS, heads_mesh, placement, spread
from qvg_jax.codecs import presets
from tests.support import tiny_longcat
from tests.support.checkpoint_shapes import longcat_shapes

CONFIG = LongCatConfig(
    layers=2, width=96, heads=8, mlp_ratio=1, latent_channels=4, out_channels=4, time_width=8,
    condition_width=16, text_width=6, dtype=jnp.float32,
)  # fmt: skip
CODEC = presets.qvg(num_centroids=4, group=12, cold_iters=2, warm_start=False, reseed=False)
KEY = jax.random.key(5)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


GIVEN, NOISE = normal(3, 1, 2, 4, 4, 4), normal(4, 1, 2, 4, 4, 4)
PROMPT = Prompt(
    text_BUE=normal(1, 1, 7, 6),
    mask_BU=np.arange(7)[None] < 4,
    negative_BUE=normal(2, 1, 7, 6),
    negative_mask_BU=np.ones((1, 7), bool),
)


@pytest.fixture(scope="module")
def mesh():
    return heads_mesh(CONFIG, jax.devices()[:8])


@functools.cache
def pipelines():
    """With one device and with eight."""
    one, mesh = random_dit(CONFIG), heads_mesh(CONFIG, jax.devices()[:8])
    codecs = dict(key_codec=CODEC, value_codec=CODEC)
    return LongCat(one, **codecs), LongCat(spread(one, mesh), **codecs, mesh=mesh)


def test_each_device_has_its_share_of_the_weights(mesh):
    model = pipelines()[1].model
    place = placement(mesh)
    made = random_dit(CONFIG, device=place)
    for kind in (model, made):
        blocks = kind.blocks
        for kernel, shape in (
            (blocks.self_attn.qkv.kernel, (2, 96, 3, 12)),
            (blocks.self_attn.out.kernel, (2, 12, 96)),
            (blocks.cross_attn.kv.bias, (2, 2, 12)),
            (blocks.ffn.gate.kernel, (2, 96, CONFIG.ffn_width // 8)),
            (blocks.ffn.down.kernel, (2, CONFIG.ffn_width // 8, 96)),
            (blocks.cross_norm.scale, (2, 96)),
        ):
            assert kernel[...].addressable_shards[0].data.shape == shape


def test_a_checkpoint_is_loaded_to_where_it_belongs(mesh, tmp_path):
    shapes = longcat_shapes(CONFIG)
    save_file(
        {name: normal(len(name), *s) for name, s in shapes.items()}, tmp_path / "w.safetensors"
    )
    one = load_dit(tmp_path / "w.safetensors", CONFIG)
    apart = load_dit(tmp_path / "w.safetensors", CONFIG, device=placement(mesh))
    kernel = apart.blocks.self_attn.qkv.kernel[...]
    assert kernel.addressable_shards[3].data.shape == (2, 96, 3, 12)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(apart), strict=True):
        np.testing.assert_array_equal(x, y)
    save_file(tiny_longcat.lora(3, CONFIG), tmp_path / "lora.safetensors")
    one, apart = (merge_lora(m, tmp_path / "lora.safetensors", RULES) for m in (one, apart))
    kernels = [m.blocks.self_attn.out.kernel[...] for m in (one, apart)]
    np.testing.assert_allclose(*kernels, rtol=0, atol=1e-6)
    assert kernels[1].addressable_shards[3].data.shape == (2, 12, 96)


def test_the_condition_cache_is_the_same_and_lies_with_its_heads():
    one, apart = (pipeline.remember(jnp.asarray(GIVEN), key=KEY) for pipeline in pipelines())
    equal, total = 0, 0
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(apart), strict=True):
        if x.dtype == jnp.uint8 and x.ndim > 3:  # codes, cluster numbers, scales: bytes
            equal, total = equal + int((x == y).sum()), total + x.size
        else:
            np.testing.assert_allclose(x, y, rtol=0, atol=3e-2 if x.ndim > 3 else 0)
    assert total and equal / total > 0.999  # rounding decides a few
    codes = [x for x in jax.tree.leaves(apart.span_k) if x.dtype == jnp.uint8]
    assert codes and all(x.addressable_shards[0].data.shape[3] == 1 for x in codes)


def test_a_denoising_evaluation_is_the_same_and_attention_stays_on_its_device():
    one, apart = pipelines()
    cache = one.remember(jnp.asarray(GIVEN), key=KEY)
    text_kv, guidance_B = one._start(PROMPT, GIVEN, NOISE, standard(), 4.0)
    step = StepInput(*(jnp.float32(x) for x in (900, 0.9, 0.8)))
    want, _ = jax.jit(cached_step)(one.model, text_kv, guidance_B, cache, NOISE, step)
    with apart.on_devices():
        # The same cache: codes that rounding decides have no say here.
        places = jax.tree.map(lambda x: x.sharding, apart.remember(jnp.asarray(GIVEN), key=KEY))
        cache = jax.device_put(jax.device_get(cache), places)
        text_kv, guidance_B = apart._start(PROMPT, GIVEN, NOISE, standard(), 4.0)
        inputs = (apart.model, text_kv, guidance_B, cache, NOISE, step)
        program = jax.jit(cached_step).lower(*inputs).compile()
        got, _ = program(*inputs)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    # Partial results are added up; heads, their queries and their cache are never exchanged.
    text = program.as_text()
    assert "all-reduce(" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


def test_a_whole_loop_runs_on_eight_devices():
    options = dict(schedule=standard(2), guidance=4.0, key=KEY)
    one, apart = (p.continue_video(PROMPT, GIVEN, NOISE, **options) for p in pipelines())
    assert np.linalg.norm(apart - one) / np.linalg.norm(one) < 1e-2
    one, apart = (p.text_to_video(PROMPT, NOISE, schedule=standard(2)) for p in pipelines())
    np.testing.assert_allclose(apart, one, rtol=0, atol=1e-4)


def test_numbers_of_devices_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ValueError, match="3 devices do not divide heads=8"):
        heads_mesh(CONFIG, jax.devices()[:3])
    assert heads_mesh(CONFIG, jax.devices()[:1]) is None
    wide = dataclasses.replace(LongCatConfig.longcat_video(), dtype=jnp.float32)
    assert heads_mesh(wide, jax.devices()[:8]).shape == {AXIS: 8}
