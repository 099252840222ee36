"""KVCache: the operations against a list model, its limits, counters, bytes and randomness."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from qvg_jax.attention.api import attend
from qvg_jax.cache.health import CacheFullError, NonFiniteError, cache_bytes, raise_if_bad
from qvg_jax.cache.operations import KVCache, append, compress, evict
from qvg_jax.cache.rope import axial_rope, frequency_ladder
from qvg_jax.cache.slots import read_slot
from qvg_jax.codecs.base import identity
from qvg_jax.sharding import head_shardings
from tests.support.cache_model import SIZES, ListCache, block, coarse, query, stamped

COARSE, IDENTITY = coarse(), identity()
ROPE = axial_rope([frequency_ladder(4), frequency_ladder(2), frequency_ladder(2)])

append_jit = jax.jit(append)
compress_jit = jax.jit(compress)
attend_jit = jax.jit(attend, static_argnames="rope")


def small(**sizes):
    defaults = dict(sink_blocks=1, span_blocks=2, max_spans=2, keep_recent=1)
    codecs = dict(key_codec=COARSE, value_codec=IDENTITY)
    return KVCache.create(**(SIZES | defaults | codecs | sizes))


def filled(blocks, cache, with_compress=True):
    for i in range(blocks):
        cache = append_jit(cache, *block(i, cache.layout))
        if with_compress:
            cache = compress_jit(cache)
    return cache


def counts(cache):
    names = ("dense_blocks", "num_spans", "seen_blocks", "dropped_blocks", "rejected_blocks")
    return {name: int(getattr(cache, name)) for name in names}


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True) for x, y in pairs)


# --- against the list model -------------------------------------------------------------------

LAYOUTS = {
    "usual": dict(),
    "no sink, nothing recent": dict(sink_blocks=0, keep_recent=0),
    "drops spans": dict(overflow="drop", max_spans=2),
    "sliding window": dict(max_spans=0, window_blocks=3, overflow="drop"),
    "window refuses": dict(max_spans=0, window_blocks=4, sink_blocks=2),
    "batch of 2, long window": dict(batch=2, window_blocks=7, keep_recent=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
@settings(derandomize=True, deadline=None, max_examples=6)
@given(steps=st.lists(st.sampled_from("aaaacce"), min_size=4, max_size=24))
def test_any_sequence_equals_the_list_model(name, steps):
    cache = small(**LAYOUTS[name])
    model = ListCache(cache.layout)
    for i, step in enumerate(steps):
        if step == "a":
            new = block(i, cache.layout)
            cache = append_jit(cache, *new)
            model.append(*new)
        elif step == "c":
            cache = compress_jit(cache)
            model.compress()
        elif cache.layout.max_spans:
            cache = evict(cache)
            model.evict()
    assert counts(cache) == dict(
        dense_blocks=len(model.sink) + len(model.window),
        num_spans=len(model.spans),
        seen_blocks=model.seen,
        dropped_blocks=model.dropped,
        rejected_blocks=model.rejected,
    )
    assert int(cache.tokens) == model.history(0)[0].shape[2]
    q, k, v, pos = query(len(steps), cache.layout)
    for layer in range(cache.layout.layers):
        out = attend_jit(q, cache, k, v, layer=jnp.int32(layer), positions=pos, rope=ROPE)
        want = model.attend(q, k, v, layer, pos, ROPE)
        np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


# --- compress ---------------------------------------------------------------------------------


def test_compress_waits_until_a_span_is_older_than_keep_recent():
    cache = filled(3, small(), with_compress=False)  # sink 1, window 2 = span; recent must stay
    assert same(compress(cache), cache)
    cache = append(cache, *block(3, cache.layout))
    after = compress(cache)
    assert counts(after) | dict(dense_blocks=2, num_spans=1) == counts(after)
    assert int(after.tokens) == int(cache.tokens)
    n = cache.layout.block_tokens
    # The recent block has moved up behind the sink, bit for bit.
    assert same(after.dense_v[..., :n, :], cache.dense_v[..., :n, :])
    assert same(after.dense_v[..., n : 2 * n, :], cache.dense_v[..., 3 * n : 4 * n, :])
    # The span is the two blocks between: V is stored as it was, K as the codec makes it.
    old_v = cache.dense_v[..., n : 3 * n, :]
    assert same(after.span_v.values_BHTD[:, 0], old_v)
    for layer in range(cache.layout.layers):
        old_k = cache.dense_k[layer, ..., n : 3 * n, :]
        packed, state = COARSE.encode(old_k, COARSE.init(old_k.shape))
        assert same(read_slot(after.span_k, layer, 0), packed)
        assert same(after.state_k[layer], state)


def test_each_span_starts_from_the_state_that_the_last_one_left():
    cache = filled(6, small())
    assert int(cache.num_spans) == 2
    first_span_last_token = block(2, cache.layout)[0][:, :, -1].astype(jnp.bfloat16)
    np.testing.assert_array_equal(cache.span_k.centre_BH1D[:, 0], 0)
    np.testing.assert_array_equal(
        cache.span_k.centre_BH1D[:, 1, :, :, 0], first_span_last_token.astype(jnp.float32)
    )


def test_random_codecs_get_a_stream_of_their_own_for_each_span_layer_and_side():
    cache = small(key_codec=stamped(), value_codec=stamped(), layers=3, window_blocks=7)
    cache = filled(6, cache, with_compress=False)
    a = compress(compress(cache))  # two spans at once, without a block between them
    b = compress(compress(cache, jax.random.key(0)), jax.random.key(0))
    other = compress(compress(cache, jax.random.key(1)), jax.random.key(1))
    assert int(a.num_spans) == 2
    assert same(a, b)
    numbers = np.concatenate([np.asarray(x).ravel() for x in (a.span_k, a.span_v)])
    stamps = np.unique(numbers)
    assert len(stamps) == len(numbers) == 2 * 3 * 2 * 2  # sides, layers, spans, heads
    assert not np.intersect1d(stamps, np.asarray(other.span_k)).size


def test_same_blocks_give_the_same_bytes():
    assert same(filled(7, small()), filled(7, small()))


def test_without_slots_compress_is_nothing():
    cache = filled(3, small(max_spans=0, window_blocks=4), with_compress=False)
    assert compress(cache) is cache


# --- full caches ------------------------------------------------------------------------------


def test_a_full_cache_refuses_and_overwrites_nothing():
    cache = small()  # 1 sink + 2 spans of 2 + window of 4 = 9 blocks
    cache = filled(9, cache)
    assert counts(cache)["rejected_blocks"] == 0
    assert int(cache.tokens) == cache.layout.capacity_blocks * cache.layout.block_tokens
    raise_if_bad(cache)
    more = compress_jit(append_jit(cache, *block(9, cache.layout)))
    assert counts(more) == counts(cache) | dict(seen_blocks=10, rejected_blocks=1)
    for name in ("dense_k", "dense_v", "dense_pos", "span_k", "span_v", "span_pos", "state_k"):
        assert same(getattr(more, name), getattr(cache, name)), name
    with pytest.raises(CacheFullError, match=r"1 of 10 blocks .* capacity is 9 blocks .*sink 1"):
        raise_if_bad(dict(step=3, caches=[more]))
    roomy = compress(evict(cache))
    assert counts(roomy)["num_spans"] == 2 and counts(roomy)["dense_blocks"] == 3


def test_drop_replaces_the_oldest_span_and_counts_its_blocks():
    cache = filled(12, small(overflow="drop"))
    assert counts(cache)["num_spans"] == 2 and counts(cache)["rejected_blocks"] == 0
    assert counts(cache)["dropped_blocks"] == 12 - 2 * 2 - counts(cache)["dense_blocks"] > 0
    raise_if_bad(cache)


def test_a_sliding_window_keeps_sink_and_newest_blocks():
    cache = filled(8, small(max_spans=0, window_blocks=3, overflow="drop"))
    assert counts(cache) == dict(
        dense_blocks=4, num_spans=0, seen_blocks=8, dropped_blocks=4, rejected_blocks=0
    )
    n = cache.layout.block_tokens
    stored = [np.asarray(cache.dense_pos[:, i * n : (i + 1) * n]) for i in range(4)]
    kept = [np.asarray(block(i, cache.layout)[2]) for i in (0, 5, 6, 7)]
    assert sorted(x.tobytes() for x in stored) == sorted(x.tobytes() for x in kept)
    raise_if_bad(cache)


def test_evict_drops_the_oldest_spans_only():
    cache = filled(6, small(max_spans=3))
    assert counts(cache)["num_spans"] == 2
    once, all_gone = evict(cache), evict(cache, 5)
    assert counts(once) == counts(cache) | dict(num_spans=1, dropped_blocks=2)
    assert counts(all_gone) == counts(cache) | dict(num_spans=0, dropped_blocks=4)
    assert same(jax.jit(evict)(cache, jnp.int32(1)), once)
    assert int(once.first_span) == 1  # the younger of the two is the oldest now
    assert same(evict(cache, 0), cache)


# --- bad values -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["k", "v"])
def test_values_that_are_not_finite_are_counted_with_their_block(value, side):
    cache = filled(3, small())
    k, v, pos = block(3, cache.layout)
    bad = (k if side == "k" else v).at[1, 0, 0, 0, :3].set(value)
    cache = append_jit(cache, *((bad, v) if side == "k" else (k, bad)), pos)
    cache = append_jit(cache, bad, bad, pos)
    assert int(cache.nonfinite) == 9 and int(cache.first_bad_block) == 3
    with pytest.raises(NonFiniteError, match="block 3 is not finite: 9 NaN or Inf values"):
        raise_if_bad(cache)


def test_the_count_of_bad_values_stops_at_the_largest_int32():
    cache = dataclasses.replace(small(), nonfinite=jnp.int32(2**31 - 3))
    k, v, pos = block(0, cache.layout)
    assert int(append(cache, jnp.full_like(k, jnp.nan), v, pos).nonfinite) == 2**31 - 1


def test_a_good_cache_passes():
    raise_if_bad(filled(5, small()))
    raise_if_bad({"nothing": "to check"})


# --- one program, in place --------------------------------------------------------------------


def test_a_longer_video_changes_no_shape_and_compiles_once():
    @jax.jit
    def step(cache, k, v, pos):
        return compress(append(cache, k, v, pos))

    cache = small()
    form = jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    for i in range(12):
        cache = step(cache, *block(i, cache.layout))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == form
    assert step._cache_size() == 1
    step(small(), *block(0, cache.layout))  # another cache with the same codecs
    assert step._cache_size() == 1


def test_plain_caches_made_apart_share_their_programs():
    a, b = small(key_codec=None, value_codec=None), small(key_codec=None, value_codec=None)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert a.layout.key_codec.name == "bf16"


def test_a_donated_cache_is_consumed():
    step = jax.jit(lambda c, *new: compress(append(c, *new)), donate_argnums=0)
    old = filled(2, small())
    new = step(old, *block(2, old.layout))
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert int(new.seen_blocks) == 3


def test_scan_over_blocks_equals_a_loop():
    cache = small()
    new = [block(i, cache.layout) for i in range(7)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *new)
    scanned, _ = jax.lax.scan(lambda c, x: (compress(append(c, *x)), None), cache, stacked)
    assert same(scanned, filled(7, cache))


def test_vmap_over_independent_caches():
    a, b = filled(4, small()), filled(6, small())
    both = jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b)
    new = block(9, a.layout)
    out = jax.vmap(lambda c: compress(append(c, *new)))(both)
    for i, cache in enumerate((a, b)):
        want = compress(append(cache, *new))
        assert same(jax.tree.map(lambda x, i=i: x[i], out), want)
    with pytest.raises(NonFiniteError, match="block 2"):
        raise_if_bad(dataclasses.replace(out, nonfinite=jnp.array([0, 4]), first_bad_block=[-1, 2]))


def test_heads_can_live_on_different_devices():
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(AxisType.Auto,))
    cache = small(heads=4)
    shardings = head_shardings(cache, mesh, "heads")
    step = jax.jit(lambda c, *new: compress(append(c, *new)), out_shardings=shardings)
    apart = jax.device_put(cache, shardings)
    assert apart.dense_k.addressable_shards[0].data.shape[2] == 1
    assert apart.span_k.codes_BHTD.addressable_shards[0].data.shape[3] == 1
    assert apart.state_k.addressable_shards[0].data.shape[2] == 1
    for i in range(7):
        apart = step(apart, *block(i, cache.layout))
    assert apart.span_k.codes_BHTD.sharding.spec == jax.P(None, None, None, "heads")
    assert same(apart, filled(7, cache))
    with pytest.raises(ValueError, match=r"heads=2 do not divide over axis 'heads' of size 4"):
        head_shardings(small(), mesh, "heads")
    with pytest.raises(ValueError, match=r"axis='h' is not accepted: the mesh has \('heads',\)"):
        head_shardings(cache, mesh, "h")


# --- bytes ------------------------------------------------------------------------------------


def test_bytes_come_from_the_buffers():
    cache = filled(6, small())  # sink 1, spans 2, window 1
    got = cache_bytes(cache)
    every_buffer = sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(cache))
    assert got.allocated.total == every_buffer
    lay = cache.layout
    block_bytes = 2 * 2 * lay.layers * lay.heads * lay.block_tokens * lay.head_dim
    assert got.allocated.sink == got.in_use.sink == block_bytes
    assert got.allocated.window == 4 * block_bytes and got.in_use.window == block_bytes
    span_bytes = lay.layers * sum(c.nbytes(lay.span_shape) for c in (COARSE, IDENTITY))
    assert got.allocated.spans == got.in_use.spans == 2 * span_bytes
    assert got.tokens == 6 * lay.block_tokens and got.bf16 == 6 * block_bytes
    assert got.in_use.warm_start == got.allocated.warm_start == 4 * 2 * 2 * 8


def test_an_empty_cache_uses_only_its_counters():
    got = cache_bytes(small())
    assert got.tokens == got.bf16 == 0
    assert got.in_use.total == 8 * 4
    assert cache_bytes(small(max_spans=0, window_blocks=4)).allocated.spans == 0


# --- arguments --------------------------------------------------------------------------------


def test_a_model_of_one_layer_without_rope_needs_no_layer_axis_and_no_positions():
    cache = small(layers=1, pos_dims=0)
    k, v, _ = block(0, cache.layout)
    assert same(append(cache, k[0], v[0]), append(cache, k, v))
    assert int(append(cache, k[0], v[0]).tokens) == 3
