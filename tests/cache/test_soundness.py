"""A cache is never silently wrong: bad numbers are named, and JAX's switches and savers keep it whole."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qvg_jax.attention.api import attend
from qvg_jax.cache.health import NonFiniteError, raise_if_bad, raise_if_not_finite
from qvg_jax.cache.operations import KVCache, append, compress
from qvg_jax.cache.saved import from_saved, to_saved
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import identity
from qvg_jax.loop import rollout, stream
from tests.support.cache_model import SIZES, block

WITH_STATE = presets.parse("kmeans_smoothing(4, iters=2) > residual_quantize(bits=2, group=8)")
PLAIN = presets.parse("residual_quantize(bits=2, group=8, scale_dtype='f32')")


def make(**sizes):
    defaults = dict(sink_blocks=1, span_blocks=2, max_spans=2, keep_recent=1, head_dim=8)
    return KVCache.create(**(SIZES | defaults | dict(key_codec=PLAIN, value_codec=PLAIN) | sizes))


@jax.jit
def step(cache, x):
    return compress(append(cache, *x)), attend(
        x[0][1].astype(jnp.float32), cache.view(rope=False), *_one(x), layer=1
    )


def _one(x):
    return x[0][1], x[1][1]


def blocks(n, cache, spoil=None):
    """Blocks as a rollout reads them; `spoil(i, k, v)` changes one."""
    made = []
    for i in range(n):
        k, v, pos = block(i, cache.layout)
        made.append((*(spoil(i, k, v) if spoil else (k, v)), pos))
    return jax.tree.map(lambda *x: jnp.stack(x), *made)


# --- numbers gone bad ---------------------------------------------------------------------------


def spoilt(value, layer=1, side="v"):
    def spoil(i, k, v):
        if i != 2:
            return k, v
        bad = (v if side == "v" else k).at[layer, 0, 1, 0, 0].set(value)
        return (k, bad) if side == "v" else (bad, v)

    return spoil


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side, layer", [("k", 0), ("v", 1)])
def test_layer_block_and_side_are_named_after_a_rollout(value, side, layer):
    cache = make()
    xs = blocks(3, cache, spoilt(value, layer, side))
    want = f"block 2 is not finite: 1 NaN.* in 3 blocks, first in {side.upper()} of layer {layer};"
    with pytest.raises(NonFiniteError, match=want):
        rollout(lambda c, x: (append(c, *x), ()), cache, xs, chunk=2)
    with pytest.raises(NonFiniteError, match=want):
        list(stream(lambda c, x: (append(c, *x), ()), make(), zip(*xs, strict=True)))


def test_what_was_compressed_meanwhile_keeps_its_block():
    cache = make(sink_blocks=0)
    with pytest.raises(NonFiniteError, match="block 2 is not finite: 1 NaN or Inf values in 8"):
        rollout(step_only, cache, blocks(8, cache, spoilt(np.nan)), chunk=8)


def step_only(cache, x):
    return compress(append(cache, *x)), ()


def test_values_beyond_a_small_format_say_so():
    cache = make(dtype=jnp.float8_e4m3fn)
    k, v, pos = block(0, cache.layout)
    good = append(cache, k * 0 + 400, v, pos)
    raise_if_bad(good)
    with pytest.raises(
        NonFiniteError, match=r"layer 0.*accepted: values from -448 to 448 \(float8"
    ):
        raise_if_bad(append(cache, k.at[0, 0, 0, 0, 0].set(1000.0), v, pos))


def test_vmapped_and_sharded_caches_name_the_layer():
    cache = make()
    caches = jax.tree.map(lambda x: jnp.stack([x] * 2), cache)
    k, v, pos = block(0, cache.layout)
    ks = jnp.stack([k, k.at[1, 0, 0, 0, 0].set(np.nan)])
    with pytest.raises(NonFiniteError, match="block 0 is not finite.*, first in K of layer 1"):
        raise_if_bad(jax.vmap(append, (0, 0, None, None))(caches, ks, v, pos))
    mesh = jax.make_mesh((2,), ("h",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = jax.P(None, None, None, "h")
    spoil = lambda k: jnp.where(jnp.arange(k.shape[0])[:, None, None, None, None] == 1, np.nan, k)  # noqa: E731
    bad = jax.shard_map(spoil, mesh=mesh, in_specs=heads, out_specs=heads)(k)
    with pytest.raises(NonFiniteError, match="first in K of layer 1"):
        raise_if_bad(jax.jit(append)(cache, bad, v, pos))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_positions_gone_bad_are_found_even_in_a_span(value):
    cache, n = make(), 6
    for i in range(n):
        k, v, pos = block(i, cache.layout)
        cache = append(cache, k, v, pos.at[0, 1, 2].set(value) if i == 4 else pos)
    with pytest.raises(NonFiniteError, match="^K, V or a position of block 4 is not finite: 1 NaN"):
        raise_if_bad(cache)
    padded, (k, v, pos) = make(blocks="padded"), block(0, cache.layout)
    behind = append(padded, k, v, pos.at[0, -1].set(value), lengths=jnp.full(k.shape[1], 1))
    raise_if_bad(behind)  # a position of padding is nobody's


def test_queries_latents_and_weights_are_named_by_their_paths():
    weights = {"blocks": [{"w": jnp.ones((2, 3))}, {"w": jnp.ones((2, 3)).at[0, 1].set(jnp.inf)}]}
    raise_if_not_finite("weights", weights["blocks"][0] | {"step": jnp.int32(1)})
    with pytest.raises(NonFiniteError, match=r"weights\['blocks'\]\[1\]\['w'\] \(1 of 6\)"):
        raise_if_not_finite("weights", weights)
    many = [jnp.full((2,), jnp.nan)] * 8
    with pytest.raises(NonFiniteError, match=r"latents\[4\] \(2 of 2\) and 3 more"):
        raise_if_not_finite("latents", many)


# --- kept and brought back ------------------------------------------------------------------------

REGIONS = {
    "usual": dict(key_codec=WITH_STATE),
    "without sink": dict(sink_blocks=0),
    "without spans": dict(max_spans=0, window_blocks=4, overflow="drop"),
    "without positions": dict(pos_dims=0),
    "fp8": dict(dtype=jnp.float8_e4m3fn),
}


def used(**sizes):
    cache = make(**sizes)
    for i in range(5):
        k, v, pos = block(i, cache.layout)
        cache = compress(append(cache, k, v, pos if cache.layout.pos_dims else None))
    return cache


def same(a, b):
    assert a.layout == b.layout and jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("sizes", REGIONS.values(), ids=REGIONS)
def test_orbax_saves_and_restores_in_three_lines(sizes, tmp_path):
    cache = used(**sizes)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", to_saved(cache))
        checkpointer.wait_until_finished()
        again = from_saved(checkpointer.restore(tmp_path / "cache"), make(**sizes))
    same(again, cache)
    k, v, pos = block(5, cache.layout)
    args = (k, v, pos if cache.layout.pos_dims else None)
    same(compress(append(again, *args)), compress(append(cache, *args)))


def test_another_layout_and_other_arrays_are_refused():
    saved = to_saved(used())
    with pytest.raises(ValueError, match=r"keep_recent=1.*this cache has keep_recent=0"):
        from_saved(saved, make(keep_recent=0))
    with pytest.raises(ValueError, match="key_codec=.*this cache has key_codec="):
        from_saved(saved, make(key_codec=None))
    short = {name: x for name, x in saved.items() if "dense_k" not in name}
    with pytest.raises(ValueError, match="dense_k is missing"):
        from_saved(short, make())
    with pytest.raises(ValueError, match="dense_k has .*float16.*accepted"):
        from_saved(saved | {".dense_k": saved[".dense_k"].astype(jnp.float16)}, make())
    with pytest.raises(ValueError, match="layout"):
        from_saved({}, make())


LIES = {
    "dense_blocks": (9, "dense_blocks=9 is not accepted: give 0 to 5"),
    "num_spans": (3, "num_spans=3 is not accepted: give 0 to 2"),
    "first_span": (2, "first_span=2 is not accepted: give 0 to 1"),
    "dropped_blocks": (-1, "dropped_blocks=-1 is not accepted"),
    "seen_blocks": (4, "seen_blocks=4, but blocks in sink.* are 5"),
    "nonfinite": (1, "first_bad_block=-1 with nonfinite=1"),
    "first_bad_block": (2, "first_bad_block=2 with nonfinite=0"),
}


@pytest.mark.parametrize("name", LIES)
def test_counters_that_cannot_be_true_are_refused(name):
    saved, (value, message) = to_saved(used()), LIES[name]
    with pytest.raises(ValueError, match=message):
        from_saved(saved | {f".{name}": np.int32(value)}, make())
    partial = append(make(blocks="partial"), *block(0, make().layout))
    lie = to_saved(partial) | {".filled": np.int32(99)}
    with pytest.raises(ValueError, match="filled=99 is not accepted: give 0 to"):
        from_saved(lie, make(blocks="partial"))
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 2), used())
    same(from_saved(to_saved(stacked), stacked), stacked)


@pytest.mark.parametrize("sizes", [dict(), dict(max_spans=0, window_blocks=4, overflow="drop")])
def test_a_cache_can_be_pickled_and_copied(sizes):
    cache = used(**sizes)
    for again in (pickle.loads(pickle.dumps(cache)), copy.copy(cache), copy.deepcopy(cache)):
        same(again, cache)


# --- JAX's switches -------------------------------------------------------------------------------


def test_vmap_over_caches_and_checkpoint_give_the_same():
    cache = used()
    k, v, pos = block(5, cache.layout)
    want = step(cache, (k, v, pos))
    caches = jax.tree.map(lambda x: jnp.stack([x] * 3), cache)
    many = jax.vmap(step, (0, None))(caches, (k, v, pos))
    again = jax.checkpoint(step)(cache, (k, v, pos))
    same(jax.tree.map(lambda x: x[1], many[0]), want[0])
    np.testing.assert_allclose(many[1][1], want[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(again[1], want[1], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def undisturbed():
    return run()


SLOW = pytest.param("jax_disable_jit", marks=pytest.mark.slow)
SWITCHES = ["jax_enable_x64", "jax_debug_nans", SLOW]


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_cache_works_under_jax_switches(switch, undisturbed):
    want = undisturbed
    with jax.enable_x64(True) if switch == "jax_enable_x64" else setting(switch):
        got = run()
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_codecs_by_layer_work_with_64_bit_numbers():
    codec = presets.get("rtn", group=8)
    sizes = dict(layers=2, heads=1, head_dim=8, block_tokens=2, span_blocks=1, max_spans=2)
    with jax.enable_x64(True):
        codecs = dict(key_codec=[identity(), codec], value_codec=codec)
        cache = KVCache.create(**codecs, **sizes, pos_dims=0)
        for i in range(5):
            k = jnp.full((2, 1, 2, 1, 8), float(i), jnp.bfloat16)
            cache = compress(append(cache, k, k))
    assert int(cache.num_spans) == 2 and int(cache.tokens) == 10


class setting:
    """A flag of JAX, inside only."""

    def __init__(self, name):
        self._name = name

    def __enter__(self):
        self._before = getattr(jax.config, self._name)
        jax.config.update(self._name, True)

    def __exit__(self, *_):
        jax.config.update(self._name, self._before)


def run():
    cache = make()
    outs = []
    for i in range(4):
        cache, out = step(cache, block(i, cache.layout))
        outs.append(out)
    return [np.asarray(x) for x in (*outs, cache.dense_k.astype(jnp.float32), cache.seen_blocks)]


def test_gradients_through_compression_say_why_not():
    cache = KVCache.create(
        layers=1, heads=1, head_dim=8, block_tokens=3, span_blocks=1, max_spans=1, sink_blocks=0,
        keep_recent=0, pos_dims=0, key_codec=PLAIN, value_codec=PLAIN,
    )  # fmt: skip

    def loss(k):
        stored = compress(append(cache, k, k))
        return sum(
            x.astype(jnp.float32).sum()
            for x in jax.tree.leaves(stored.span_k)
            if x.dtype != jnp.uint8
        )

    k = jnp.arange(24.0).reshape(1, 3, 1, 8)
    with pytest.raises(ValueError, match="compress has no gradient: its codes are integers"):
        jax.grad(loss)(k)
    slope = jax.jvp(loss, (k,), (k,))[1]  # forward derivatives pass
    assert np.isfinite(slope)


def test_gradients_through_attention_say_why_not():
    cache = used(pos_dims=0)
    q = jnp.ones((SIZES.get("batch", 1), 3, cache.layout.heads, 8))

    def loss(q):
        out, lse = attend(q, cache, None, None, layer=1, return_lse=True)
        return out.sum() + lse.sum()

    with pytest.raises(ValueError, match="attend has no gradient: how much of the cache is read"):
        jax.grad(loss)(q)
    assert np.isfinite(jax.jvp(loss, (q,), (q,))[1])
