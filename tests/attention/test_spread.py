"""Caches spread over eight devices by each plan: the bytes and the attention of one device, and few exchanges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import qvg_jax as qvg
from qvg_jax.cache.devices import share_bytes
from qvg_jax.cache.plan import Plan, fits_memory
from tests.support.spread_caches import (
    BATCH,
    CODECS,
    HEADS,
    ROPE,
    SIZES,
    TOKENS,
    block,
    collectives,
    grown,
    normal,
    on_one_device,
    queries,
)  # fmt: skip

# Each with what attention exchanges. A ring sends three arrays of keys, three of values, positions and
# the two of the new block: its own before it reads them, then in a loop those that have come.
PLANS = {
    "spans": (Plan(spans=8), {"all-reduce": 2}),
    "spans, tokens apart": (
        Plan(spans=4, split_tokens=True),
        {"all-reduce": 1, "reduce-scatter": 1},
    ),
    "ring": (Plan(ring=4), {"collective-permute": 2 * 9}),
    "heads": (Plan(heads=8), {}),
    "heads, tokens apart": (Plan(heads=4, split_tokens=True), {"all-to-all": 2}),
}
ENCODING = {"spans": {"all-gather": 3}}  # the span that is encoded: keys, values, positions
# The tour of those that differ most; a push runs them all.
TOUR = [
    pytest.param(name, marks=[] if name in ("spans", "ring") else pytest.mark.slow)
    for name in PLANS
]
BLOCKS = 14  # five spans of eight slots, half a window


@functools.cache
def one_device():
    return grown(None, BLOCKS, evicted=1)


@jax.jit
def read(cache, q, k, v, positions):
    return qvg.attend(q, cache.view(positions, ROPE), k[1], v[1], layer=1)


@functools.partial(jax.jit, static_argnames="options")
def read_with(cache, q, k, v, positions, options, mask=None, lengths=None, sinks=None):
    more = dict(options, mask=mask, lengths=lengths, sink_logits=sinks, return_lse=True)
    k, v = (None, None) if k is None else (k[1], v[1])
    return qvg.attend(q, cache.view(positions, ROPE), k, v, layer=1, **more)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", TOUR)
def test_a_plan_gives_the_bytes_and_the_attention_of_one_device(name):
    plan, expected = PLANS[name]
    cache = grown(plan, BLOCKS, evicted=1)
    assert int(cache.num_spans) == 5 and int(cache.first_span) == 1
    same(on_one_device(cache), one_device())
    call = (queries(), *block(BLOCKS))
    program = read.lower(cache, *call).compile()
    np.testing.assert_allclose(program(cache, *call), read(one_device(), *call), rtol=0, atol=1e-5)
    assert collectives(program) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_what_changes_a_cache_exchanges_only_the_span_that_is_encoded(name):
    plan, _ = PLANS[name]
    cache = grown(plan, 1)
    compress = jax.jit(lambda cache: qvg.compress(cache)).lower(cache).compile()
    assert collectives(compress) == ENCODING.get(plan.axis, {})
    evict = jax.jit(lambda cache: qvg.evict(cache)).lower(cache).compile()
    assert collectives(evict) == {}
    append = jax.jit(lambda *x: qvg.append(*x)).lower(cache, *block(0)).compile()
    assert collectives(append).keys() <= {"all-reduce"}  # counts of values that are not finite


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spans, tokens apart", "ring", "heads, tokens apart"])
def test_masks_paddings_and_sinks_are_those_of_one_device(name):
    plan, _ = PLANS[name]
    cache, (k, v, positions) = grown(plan, BLOCKS, evicted=1), block(BLOCKS)
    v = v.copy()
    v[:, 1, 5:] = np.nan  # padding of the second row
    extra = dict(lengths=jnp.array([TOKENS, 5]), sinks=normal(9, 2 * HEADS))
    extra["mask"] = np.random.default_rng(3).random((BATCH, 2 * HEADS, TOKENS, TOKENS)) < 0.7
    options = (("causal", True), ("softcap", 2.0))
    got, want = (
        read_with(c, queries(), k, v, positions, options, **extra) for c in (cache, one_device())
    )
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x[0], y[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(x[1, :5], y[1, :5], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spans", "ring", "heads, tokens apart"])
def test_empty_and_half_filled_caches_and_two_branches_are_read_alike(name):
    plan, _ = PLANS[name]
    for blocks in (0, 4):
        one, cache = (grown(p, blocks) for p in (None, plan))
        k, v, positions = block(blocks)
        twice = (queries(batch=2 * BATCH), *(np.concatenate([x, x], 1) for x in (k, v)), positions)
        np.testing.assert_allclose(read(cache, *twice), read(one, *twice), rtol=0, atol=1e-5)
    call = (cache, queries(), None, None, positions, ())  # no new keys
    want = read_with(one, *call[1:])
    for x, y in zip(read_with(*call), want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_blocks_that_devices_do_not_divide_are_attended_by_the_first():
    cache, call = grown(Plan(spans=8), BLOCKS, evicted=1), (queries(3), *block(BLOCKS, tokens=3))
    np.testing.assert_allclose(read(cache, *call), read(one_device(), *call), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_k_means_is_that_of_one_device():
    pair = qvg.presets.pair("qvg", num_centroids=4, group=8, cold_iters=2, iters=1)
    codecs = dict(key_codec=pair[0], value_codec=pair[1])
    one = grown(None, 6, **codecs)
    for plan in (Plan(spans=4), Plan(heads=4)):
        cache = grown(plan, 6, **codecs)
        same(on_one_device(cache), one)
        # Inside of a shard_map kernels can encode, and heads do not meet.
        text = str(jax.make_jaxpr(qvg.compress)(cache))
        assert "shard_map" in text
    compiled = jax.jit(lambda cache: qvg.compress(cache)).lower(cache).compile()
    assert collectives(compiled) == {}


@pytest.mark.slow
def test_a_rollout_and_the_tables_that_a_cache_keeps():
    def one(state, i):
        k, v, _ = (jnp.asarray(x) for x in block(0))
        positions = jnp.full((BATCH, TOKENS, 1), i, jnp.float32)
        view = state.view(positions, ROPE)
        out = qvg.attend(k[0], view, k[0], v[0], layer=0)
        return qvg.compress(qvg.append(state, k + out[None], v - out[None], positions)), out

    outs = []
    for plan in (None, Plan(spans=8), Plan(ring=2)):
        sizes = SIZES | CODECS | dict(overflow="drop", rope=ROPE)
        cache = qvg.KVCache.create(**sizes, sharding=plan)
        cache, out = qvg.rollout(one, cache, np.arange(24, dtype=np.float32), chunk=24)
        assert int(cache.num_spans) == 8
        outs.append(out)
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=0, atol=1e-4)


def test_a_cache_goes_from_any_plan_to_any_other():
    cache = one_device()
    for plan in (Plan(spans=8), Plan(ring=2), Plan(heads=4)):
        cache = qvg.spread(cache, plan)
        assert cache.layout.plan == plan
    same(on_one_device(cache), one_device())
    assert qvg.spread(one_device(), Plan()).layout.plan is None


def test_each_device_has_its_share_of_bytes():
    def most(plan):
        cache = qvg.KVCache.create(**SIZES, sharding=plan)
        big = [x for x in jax.tree.leaves(cache) if x.ndim > 3]
        return sum(x.addressable_shards[0].data.nbytes for x in big)

    whole = most(None)
    assert most(Plan(spans=8)) == pytest.approx(whole / 8, rel=0.03)
    assert most(Plan(heads=8)) == pytest.approx(whole / 8, rel=0.03)


def test_plans_that_do_not_fit_are_refused_with_what_is_accepted():
    def create(plan, **changes):
        return qvg.KVCache.create(**SIZES | CODECS | changes, sharding=plan)

    for plan, changes, message in (
        (Plan(heads=3), {}, "heads=3 does not divide heads=8"),
        (Plan(spans=3), {}, "spans=3 does not divide max_spans=8: give a multiple of 3"),
        (Plan(spans=4), dict(block_tokens=6), "spans=4 does not divide block_tokens=6"),
        (Plan(ring=3), {}, "ring=3 does not divide max_spans=8"),
        (Plan(spans=2), dict(blocks="partial"), "blocks='partial'"),
        (Plan(heads=16), dict(heads=16), "there are 8 devices"),
    ):
        with pytest.raises(ValueError, match=message):
            create(plan, **changes)
    two = [CODECS["key_codec"], CODECS["value_codec"]]
    with pytest.raises(NotImplementedError, match="codecs differ by layer"):
        create(Plan(ring=2), key_codec=two)
    for bad in (dict(spans=0), dict(heads=2.0), dict(ring=True)):
        with pytest.raises(ValueError, match="is not accepted: give an integer >= 1"):
            Plan(**bad)
    with pytest.raises(ValueError, match="heads=2 and ring=2: accepted is one axis"):
        Plan(heads=2, ring=2)
    cache = create(Plan(ring=2))
    with pytest.raises(ValueError, match="q has 3 tokens.*a multiple of 2"):
        read(cache, queries(3), *block(0, tokens=3))
    with pytest.raises(NotImplementedError, match="recode: the cache has plan ring=2"):
        qvg.recode(cache, **CODECS)


def test_a_plan_that_does_not_fit_the_memory_of_a_device_is_refused():
    shapes = jax.eval_shape(lambda: qvg.KVCache.create(**SIZES | CODECS))
    shares = {n: share_bytes(shapes, Plan(spans=n)) for n in (1, 2, 8)}
    assert shares[1] > 1.9 * shares[2] > 1.9 * 3 * shares[8]
    fits_memory(Plan(spans=8), shares[8], shares[8])
    fits_memory(Plan(spans=8), shares[8], None)
    message = r"spans=2: the cache takes .* GB of each device, which has .*; give more devices"
    with pytest.raises(ValueError, match=message):
        fits_memory(Plan(spans=2), shares[2], shares[8])


def _sent(jaxpr):
    """The bytes that each device sends by `ppermute`, loops counted once."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ppermute":
            found += sum(x.aval.size * x.aval.dtype.itemsize for x in eqn.invars)
        found += sum(_sent(inner) for inner in jaxprs_in_params(eqn.params))
    return found


@pytest.mark.parametrize("codec, least", [("qvg", 6.3), ("dither", 6.5)])
def test_a_ring_sends_a_sixth_of_the_bytes_of_a_plain_cache(codec, least):
    """At the size of Self-Forcing with eight spans: packed spans, positions, and the new block, which is plain."""
    key_codec, value_codec = qvg.presets.parse_pair(codec)
    sizes = dict(heads=12, head_dim=128, block_tokens=4680, span_blocks=8, max_spans=8)
    create = functools.partial(
        qvg.KVCache.create, **sizes, keep_recent=0, pos_dims=3, sharding=Plan(ring=2)
    )
    plain = jax.eval_shape(create)
    packed = jax.eval_shape(functools.partial(create, key_codec=key_codec, value_codec=value_codec))
    x = jax.ShapeDtypeStruct((1, 4680, 12, 128), jnp.bfloat16)

    def sent(cache):
        attend = lambda cache, x: qvg.attend(x, cache.view(rope=False), x, x)  # noqa: E731
        return _sent(jax.make_jaxpr(attend)(cache, x).jaxpr)

    assert least < sent(plain) / sent(packed) < 7
