"""Caches on several devices: rows and heads apart, mesh axes of either type, the same bytes as on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import qvg_jax as qvg
from tests.support.cache_model import coarse

ROPE = qvg.axial_rope([qvg.frequency_ladder(32)])
PAIR = qvg.presets.pair("qvg", num_centroids=2, group=8, cold_iters=1, iters=1)


def make_cache(**settings):
    sizes = dict(
        layers=1, batch=2, heads=2, head_dim=32, block_tokens=4, sink_blocks=0, span_blocks=2
    )
    sizes |= dict(max_spans=2, keep_recent=0, pos_dims=1, blocks="padded", rope=ROPE)
    return qvg.KVCache.create(**(sizes | dict(key_codec=PAIR[0], value_codec=PAIR[1]) | settings))


def filled(cache, kv):
    """After three blocks: a span, and a block of the window."""

    @jax.jit
    def step(cache, k, v):
        pos = jnp.broadcast_to(jnp.arange(4.0)[None, :, None], (2, 4, 1))
        cache = qvg.append(cache, k, v, pos, lengths=jnp.array([4, 3]))
        return qvg.compress(cache)

    for i in range(3):
        cache = step(cache, *kv[:, i])
    return cache


@jax.jit
def read(cache, q):
    pos = jnp.full((2, 4, 1), 5.0)
    return qvg.attend(q, cache, q, q, positions=pos, causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_and_heads_apart_give_the_bytes_of_one_device(kind):
    # k-means begins its loops from constants, whose types name no axis.
    codec = PAIR[0] if kind == AxisType.Explicit else coarse(7)
    make = functools.partial(make_cache, key_codec=codec, value_codec=codec)
    kv = jax.random.normal(jax.random.key(0), (2, 3, 2, 4, 2, 32))
    alone = filled(make(), kv)
    want = read(alone, kv[0, 0])
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        places = qvg.sharding.cache_shardings(make(), mesh, batch="data", heads="model")
        new = jax.device_put(kv, jax.NamedSharding(mesh, jax.P(None, None, "data", None, "model")))
        cache = filled(jax.device_put(make(), places), new)
        out = read(cache, new[0, 0])
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    assert int(cache.num_spans) == 1
    if kind == AxisType.Explicit:
        assert cache.dense_k.sharding.spec[:3] == (None, "data", "model")
        assert out.sharding.spec[:3] == ("data", None, "model")


def test_shardings_of_rows():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    places = qvg.sharding.cache_shardings(make_cache(), mesh, batch="data")
    assert places.dense_v.spec == jax.P(None, "data", None)
    assert places.span_valid.spec == jax.P(None, "data")
    assert places.dense_table[0].spec == jax.P("data") and places.dense_blocks.spec == jax.P()
    spec = jax.P(None, None, "data", None)
    assert {x.spec for x in jax.tree.leaves((places.span_k, places.span_v))} == {spec}
    with pytest.raises(ValueError, match="batch=3 do not divide over axis 'data' of size 2"):
        qvg.sharding.cache_shardings(make_cache(batch=3), mesh, batch="data")
    with pytest.raises(ValueError, match="axis='rows' is not accepted"):
        qvg.sharding.cache_shardings(make_cache(), mesh, batch="rows")
