"""WorldPlay at the sizes of its release: shapes, and bytes of the caches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from models.common.wan_text import TextKV
from models.worldplay.block import BlockInput, Frames, State, generate_block
from models.worldplay.config import SamplerConfig, WorldPlayConfig
from models.worldplay.history import History, make_cache, side_by_side
from models.worldplay.params import random_dit, skeleton
from qvg_jax.codecs import presets


def test_bytes_of_a_span_of_the_true_length():
    """One head and 7,040 tokens; heads and layers are multiples of it."""
    codec, rng = presets.qvg(), np.random.default_rng(0)
    packed_bf16 = 2 * 2 * 7040 * 128 * 2  # K and V, both encodings, two bytes
    for form, encodings, least in ((side_by_side(codec), 2, 5.8), (codec, 1, 11)):
        x = jnp.asarray(rng.normal(size=(1, encodings, 7040, 128)), jnp.bfloat16)
        packed, _ = jax.jit(form.encode)(x, form.init(x.shape, x.dtype))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
        assert size == form.nbytes(x.shape) and packed_bf16 > least * 2 * size


def form_of(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def test_released_size_traces_with_caches_of_the_published_size():
    config = WorldPlayConfig.wan_5b()
    size = dict(frames=48, latent_height=44, latent_width=80)

    def cache_of(history):
        return jax.eval_shape(lambda: make_cache(config, history, **size))

    frames = 44  # of 48: the last block is never read
    published = cache_of(History())
    dense = sum(x.size * 2 for x in (published.dense_k, published.dense_v))
    assert dense == frames * 648_806_400  # bytes of bf16
    elements = dense / 2
    codec, spans = presets.qvg(), {}
    for storage in ("packed", "single"):
        cache = cache_of(History.qvg(codec, storage=storage))
        lay = cache.layout
        assert (lay.span_tokens, lay.max_spans, lay.window_blocks) == (7040, 5, 2)
        bits = lay.key_codec.bits_per_element(lay.span_shape)
        leaves = jax.tree.leaves((cache.span_k, cache.span_v))
        spans[storage] = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
        stored = 2 * 30 * 5 * math.prod(lay.span_shape)
        assert abs(8 * spans[storage] / stored - bits) < 1e-6
    share = 40 / 44  # of the frames are in spans
    assert 5.8 < 2 * elements * share / spans["packed"] < 5.9
    assert 11 < 2 * elements * share / spans["single"] < 12

    history = History.qvg(codec)
    text = jax.ShapeDtypeStruct((30, 1, 512, 24, 128), jnp.bfloat16)

    def like(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def frames_like(F):
        return Frames(like(1, F, 4, 4), like(1, F, 3, 3), like(1, F))

    state = State(
        cache=cache_of(history),
        text_kv=TextKV(text, text),
        latents_BFZYX=like(1, 48, 48, 44, 80, dtype=jnp.bfloat16),
        frames=frames_like(48),
        blocks=like(dtype=jnp.int32),
    )
    noise, given = like(1, 4, 48, 44, 80), like(4, dtype=bool)
    x = BlockInput(noise, frames_like(4), noise, given, like(44, dtype=jnp.int32))
    assert form_of(jax.eval_shape(lambda: random_dit(config))) == form_of(skeleton(config))
    step = functools.partial(generate_block, sampler=SamplerConfig(), history=history)
    after, latents, _ = jax.eval_shape(step, skeleton(config), state, x)
    assert (latents.shape, latents.dtype) == (noise.shape, jnp.bfloat16)
    assert form_of(after) == form_of(state)
