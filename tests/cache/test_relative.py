"""Times that count back from the reading block: equal to those that are stored, and by hand beyond a horizon."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qvg_jax as qvg
from models.common.wan_rope import wan_rope
from tests.support.spread_caches import BATCH, ROPE, SIZES, TOKENS, block, grown, queries

BLOCKS = 14  # so the new block is at time 112
HERE = BLOCKS * TOKENS
SLIDING = dict(max_spans=0, window_blocks=5, overflow="drop")
CLIPPED = qvg.RelativeTime(41, period=20)
CACHES = {
    "tables kept": dict(rope=ROPE),
    "sliding window": SLIDING,
    "spans": dict(plan=qvg.Plan(spans=4)),
    "ring": dict(plan=qvg.Plan(ring=4)),
}


@functools.partial(jax.jit, static_argnames=("relative", "precompute"))
def read(cache, positions, relative=None, precompute=True):
    k, v, _ = block(BLOCKS)
    view = cache.view(positions, ROPE, relative=relative, precompute=precompute)
    return qvg.attend(queries(), view, k[1], v[1], layer=1)


def read_age(age, relative):
    while age > relative.horizon:
        age = relative.horizon if relative.period is None else age - relative.period
    return age


def counted_back(cache, relative):
    """A cache on one device whose stored positions are the ages that a token is read with, by hand."""
    ages = np.vectorize(lambda t: -read_age(HERE - t, relative), otypes=[np.float32])
    dense, sink = np.array(cache.dense_pos), cache.layout.sink_blocks * TOKENS
    turned = ages(dense)
    if sink:
        first = dense[:, :1]
        turned[:, :sink] = ages(first) + dense[:, :sink] - first
    return dataclasses.replace(
        cache, dense_pos=jnp.asarray(turned), span_pos=jnp.asarray(ages(np.array(cache.span_pos)))
    )


def cache_of(plan=None, **changes):
    return grown(plan, BLOCKS, evicted=0 if "max_spans" in changes else 1, **changes)


def here():
    times = HERE + np.arange(TOKENS, dtype=np.float32)
    return np.broadcast_to(times[None, :, None], (BATCH, TOKENS, 1))


def test_times_count_back_to_a_horizon():
    cache = cache_of()
    stored = read(cache, here())
    # Up to the horizon no time moves at all.
    np.testing.assert_array_equal(read(cache, here(), qvg.RelativeTime(HERE)), stored)
    # A short horizon clips old spans, and lifts the sink as one.
    for relative in (qvg.RelativeTime(41), CLIPPED):
        want = read(counted_back(cache, relative), here() - HERE)
        assert np.abs(np.asarray(want - stored)).max() > 1e-2
        np.testing.assert_allclose(read(cache, here(), relative), want, rtol=0, atol=2e-5)
    got = read(cache, here(), CLIPPED, precompute=False)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    # All times move, and none is clipped: without a sink the oldest token is of time 16.
    cache = cache_of(sink_blocks=0)
    moved = read(cache, here(), qvg.RelativeTime(HERE - 16))
    np.testing.assert_allclose(moved, read(cache, here()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CACHES)
def test_other_caches_count_back_as_well(name):
    alone = {k: v for k, v in CACHES[name].items() if k not in ("plan", "rope")}
    want = read(counted_back(cache_of(**alone), CLIPPED), here() - HERE)
    got = read(cache_of(**CACHES[name]), here(), CLIPPED)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_a_table_of_few_rows_serves_a_video_of_any_length():
    """Wan's table has a last row; what is read by it counts back, so times far beyond it stay exact."""
    cache = qvg.KVCache.create(**SIZES | dict(pos_dims=3, batch=1))
    rope, rows = wan_rope(SIZES["head_dim"], rows=32), 32
    relative = qvg.RelativeTime(rows - 1)

    @functools.partial(jax.jit, static_argnames=("relative", "offset"))
    def after(cache, offset, relative=None):
        def at(i):
            positions = jnp.zeros((1, TOKENS, 3)).at[..., 0].set(i + offset)
            return (*(jnp.asarray(x)[:, :1] for x in block(i)[:2]), positions)

        for i in range(9):
            cache = qvg.compress(qvg.append(cache, *at(i)))
        k, v, positions = at(9)
        view = cache.view(positions, rope, relative=relative)
        return qvg.attend(queries(batch=1), view, k[0], v[0], layer=0)

    near = after(cache, 0)
    far = after(cache, 2**20, relative)  # float32 holds every whole number up to 2**24
    np.testing.assert_allclose(far, near, rtol=0, atol=1e-5)


def test_wrong_horizons_are_named():
    for bad in (dict(horizon=0), dict(horizon=float("inf")), dict(horizon=5, period=6)):
        with pytest.raises(ValueError, match="horizon="):
            qvg.RelativeTime(**bad)
    cache = cache_of()
    positions = block(BLOCKS)[2]
    with pytest.raises(ValueError, match="horizon=6 is shorter than a block of 7"):
        cache.view(positions, ROPE, relative=qvg.RelativeTime(6))
    with pytest.raises(ValueError, match="component=1 is not accepted.*pos_dims=1"):
        cache.view(positions, ROPE, relative=qvg.RelativeTime(60, component=1))
    with pytest.raises(ValueError, match="rope=False.*accepted: a Rope"):
        cache.view(rope=False, relative=qvg.RelativeTime(60))
