"""Caches with a codec for each layer, and what a cache says of itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qvg_jax as qvg
from qvg_jax.cache.operations import KVCache, append, compress
from tests.support.cache_model import coarse
from tests.support.token_caches import F32, QUERY, SIZES, filled, make, read, tokens


@pytest.mark.slow
def test_each_layer_is_read_by_its_own_codec():
    one, other = coarse(7), coarse(2)
    kv = jnp.concatenate([tokens(29), tokens(29, seed=1, layers=1)], 1)
    mixed = make(layers=3, key_codec=[one, other, one], value_codec=[other, F32, F32])
    mixed = filled(mixed, kv, SIZES)
    assert int(mixed.num_spans) == 2
    for layer, (key_codec, value_codec) in enumerate([(one, other), (other, F32), (one, F32)]):
        alone = make(layers=1, key_codec=key_codec, value_codec=value_codec)
        alone = filled(alone, kv[:, layer : layer + 1], SIZES)
        want = read(alone, QUERY, "xla", 0)
        for by in ("xla", "cudnn"):
            got = read(mixed, QUERY, by, jnp.int32(layer))
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert len(mixed.span_k) == len(mixed.span_v) == 2
    assert "2 x coarse 7 + 1 x coarse 2" in mixed.layout.key_codec.name
    assert len(repr(mixed)) < 300


def test_lists_of_codecs_say_what_is_wrong():
    with pytest.raises(
        ValueError, match="key_codec is a list of 3; accepted: 2, one for each layer"
    ):
        make(key_codec=[F32] * 3)
    with pytest.raises(
        ValueError, match=r"key_codec='tuple' is not a qvg_jax Codec.*presets\.pair"
    ):
        make(key_codec=qvg.presets.pair("kivi"))
    with pytest.raises(
        ValueError, match=r"value_codec='midrise' is not a qvg_jax Codec.*presets\.pair"
    ):
        make(value_codec="midrise")
    assert make(key_codec=[F32, F32]).layout.key_codec == F32
    mixed = make(key_codec=[F32, coarse(7)])
    with pytest.raises(NotImplementedError, match="recode: codecs that differ by layer"):
        qvg.recode(mixed, F32, F32)


def test_the_summary_tells_compression_by_layer():
    mixed = make(layers=3, key_codec=[qvg.presets.get("rtn"), F32, F32], head_dim=64)
    found = qvg.summary(mixed)
    assert [(x.first, x.last, x.key_codec) for x in found.layers] == [(0, 0, "rtn"), (1, 2, "f32")]
    rtn = qvg.bits_per_element(qvg.presets.get("rtn"), mixed.layout.span_shape)
    assert found.layers[0].bits == (rtn + 32) / 2 and found.layers[1].ratio == 0.5
    assert mixed.layout.span_bits == pytest.approx(((rtn + 64) / 3 + 32) / 2)
    text = str(found)
    assert "1-2" in text and "in use for 0 tokens" in text
    window = qvg.summary(make(max_spans=0, window_blocks=2, overflow="drop"))
    assert [(x.key_codec, x.bits) for x in window.layers] == [("float32", 32.0)]
    shapes = jax.eval_shape(lambda: mixed)
    assert qvg.summary(shapes).layers == found.layers and "in use" not in str(qvg.summary(shapes))


def test_the_repr_of_a_cache_is_short_and_never_fails():
    cache = KVCache.create(
        heads=2, head_dim=64, block_tokens=8, span_blocks=2, max_spans=3, pos_dims=0
    )
    block = jnp.ones((1, 1, 8, 2, 64))
    filled = cache
    for _ in range(6):
        filled = compress(append(filled, block, block))
    assert "0 of 3 spans of 2 blocks" in repr(cache)
    assert "1 of 3 spans" in repr(filled) and "2 heads x 64" in repr(filled)
    assert len(repr(filled)) < 250
    seen = []
    jax.jit(lambda c: seen.append(repr(c)) or c.num_spans)(filled)
    assert "? of 3 spans" in seen[0]
    assert "? of 3 spans" in repr(jax.eval_shape(lambda: cache))
    assert repr(jax.tree.map(lambda x: None, cache)).startswith("KVCache(")
