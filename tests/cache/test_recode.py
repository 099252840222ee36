"""A cache that changes its codecs while it is in use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvg_jax import cache_bytes, identity
from qvg_jax.cache.operations import KVCache, append, compress, evict
from qvg_jax.cache.recode import recode
from qvg_jax.codecs import presets
from tests.support.cache_model import SIZES, coarse

PLAIN, COARSE, FINE = identity(), coarse(), coarse(7)


def filled(key_codec, value_codec, blocks=15, **settings):
    """A cache after `blocks` blocks; the same K and V on every call."""
    sizes = SIZES | dict(sink_blocks=1, span_blocks=2, max_spans=8, keep_recent=1, pos_dims=0)
    sizes |= dict(key_codec=key_codec, value_codec=value_codec) | settings
    cache = KVCache.create(**sizes)
    form = (SIZES["layers"], SIZES["batch"], SIZES["block_tokens"], SIZES["heads"])
    for i in range(blocks):
        k, v = jax.random.normal(jax.random.key(i), (2, *form, SIZES["head_dim"]), jnp.bfloat16)
        cache = compress(append(cache, k, v))
    return cache


def assert_same(a, b):
    """Equal layouts and equal valid bytes."""
    assert a.layout == b.layout
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)


def bits(x):
    return np.asarray(x).view(np.uint8) if x.dtype.itemsize == 1 else np.asarray(x)


@pytest.mark.parametrize("pair", [(COARSE, FINE), (COARSE, PLAIN), (FINE, COARSE)])
def test_from_bf16_it_is_the_cache_that_was_compressed_from_the_start(pair):
    assert_same(recode(filled(PLAIN, PLAIN), *pair), filled(*pair))


def test_randomness_is_that_of_the_start():
    codec = presets.get("qvg", num_centroids=4, group=8)  # k-means draws its first centroids
    assert_same(recode(filled(PLAIN, PLAIN), codec, codec), filled(codec, codec))


def test_it_goes_on_as_if_nothing_had_happened():
    def more(cache):
        k, v = jax.random.normal(jax.random.key(99), (2, 2, 1, 3, 2, 8), jnp.bfloat16)
        for _ in range(4):
            cache = compress(append(cache, k, v))
        return cache

    assert_same(more(recode(filled(PLAIN, PLAIN), COARSE, FINE)), more(filled(COARSE, FINE)))


def test_the_half_whose_codec_stays_keeps_its_bytes():
    cache = filled(COARSE, COARSE)
    other = recode(cache, COARSE, FINE)
    jax.tree.map(np.testing.assert_array_equal, other.state_k, cache.state_k)
    np.testing.assert_array_equal(other.span_k.codes_BHTD, cache.span_k.codes_BHTD)
    assert np.any(np.asarray(other.span_v.codes_BHTD) != np.asarray(cache.span_v.codes_BHTD))
    same = recode(cache, COARSE, COARSE)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), same, cache)


def test_what_one_codec_has_lost_the_next_does_not_bring_back():
    lossy = filled(COARSE, COARSE)
    plain = recode(lossy, PLAIN, PLAIN)
    decoded = COARSE.decode(jax.tree.map(lambda x: x[1, 2], read(lossy.span_v)))
    np.testing.assert_array_equal(plain.span_v.values_BHTD[1, 2], decoded)
    kept = filled(PLAIN, PLAIN)
    assert np.any(np.asarray(plain.span_v.values_BHTD) != np.asarray(kept.span_v.values_BHTD))
    np.testing.assert_array_equal(plain.dense_v, kept.dense_v)


def read(slots):
    """Slots with their float8 leaves as float8."""
    scale = slots.scale_BHT1
    scale = jax.lax.bitcast_convert_type(scale.bytes_x, scale.dtype)
    return slots._replace(scale_BHT1=scale)


def test_a_ring_that_has_dropped_spans_keeps_its_order():
    cache = filled(PLAIN, PLAIN, 17, max_spans=3, overflow="drop")
    assert int(cache.first_span) != 0 and int(cache.dropped_blocks) > 0
    back = recode(recode(cache, COARSE, COARSE), PLAIN, PLAIN)
    for name in ("first_span", "num_spans", "dropped_blocks", "seen_blocks", "span_pos"):
        np.testing.assert_array_equal(getattr(back, name), getattr(cache, name))
    assert cache_bytes(back).bf16 == cache_bytes(cache).bf16
    error = np.asarray(back.span_k.values_BHTD - cache.span_k.values_BHTD, np.float32)
    assert 0 < np.abs(error).max() < 1
    empty = recode(evict(cache, 3), COARSE, FINE)
    assert int(empty.num_spans) == 0 and empty.layout.value_codec == FINE


def test_a_cache_without_slots_changes_its_name_only():
    cache = filled(PLAIN, PLAIN, max_spans=0, window_blocks=20)
    other = recode(cache, COARSE, FINE)
    assert other.layout == dataclasses.replace(cache.layout, key_codec=COARSE, value_codec=FINE)
    np.testing.assert_array_equal(other.dense_k, cache.dense_k)


def test_a_codec_that_refuses_the_span_says_so():
    with pytest.raises(ValueError, match="num_centroids"):
        recode(filled(PLAIN, PLAIN, 4), presets.get("qvg"), PLAIN)
