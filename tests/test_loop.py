"""rollout and stream: the same step, any number of blocks, one compilation, no second cache."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial

from qvg_jax.attention.api import attend
from qvg_jax.cache.health import CacheFullError, NonFiniteError
from qvg_jax.cache.operations import KVCache, append, compress
from qvg_jax.cache.rope import axial_rope, frequency_ladder
from qvg_jax.codecs.base import identity
from qvg_jax.loop import rollout, run_chunk, stream
from tests.support.cache_model import SIZES, coarse

COARSE, IDENTITY = coarse(), identity()
ROPE = axial_rope([frequency_ladder(8)])
TOKENS, WIDTH = 3, 16  # tokens of a block; heads * head_dim


class State(NamedTuple):
    cache: KVCache
    key: Any


def start():
    sizes = dict(sink_blocks=1, span_blocks=2, max_spans=6, keep_recent=1, pos_dims=1)
    codecs = dict(key_codec=COARSE, value_codec=IDENTITY)
    return State(KVCache.create(**(SIZES | sizes | codecs)), jax.random.key(3))


def weights(seed=0):
    w = np.random.default_rng(seed).normal(size=(2, 3, WIDTH, WIDTH)) / 4
    return jnp.asarray(w, jnp.float32)


def model_step(w, state, x):
    """Two layers of attention over a noisy block x (T,): denoise once, then append and compress."""
    cache, key = state
    key, noise_key = jax.random.split(key)
    h = jax.random.normal(noise_key, (1, TOKENS, WIDTH)) * 0.1 + x[None, :, None]
    pos = cache.seen_blocks * TOKENS + jnp.arange(TOKENS)[None, :, None]
    view = cache.view(pos, ROPE)

    def layer(h, w_i):
        w, i = w_i
        q, k, v = (jnp.tanh(h @ m).reshape(1, TOKENS, 2, 8) for m in w)
        return h + attend(q, view, k, v, layer=i).reshape(h.shape), (k, v)

    h, (k, v) = lax.scan(layer, h, (w, jnp.arange(2)))
    return State(compress(append(cache, k, v, pos)), key), {"y": h[0], "seen": cache.seen_blocks}


STEP = Partial(model_step, weights())


def inputs(blocks, seed=0):
    return np.random.default_rng(seed).normal(size=(blocks, TOKENS)).astype(np.float32)


def in_python(blocks):
    step, state, ys = jax.jit(model_step), start(), []
    for x in inputs(blocks):
        state, y = step(weights(), state, x)
        ys.append(y)
    return state, jax.tree.map(lambda *y: np.stack(y), *ys)


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def counters(state):
    cache = state.cache
    return [int(x) for x in (cache.seen_blocks, cache.num_spans, cache.dense_blocks)]


@pytest.mark.parametrize("blocks", [1, 4, 11])
def test_rollout_is_the_loop_over_blocks(blocks):
    state, ys = rollout(STEP, start(), inputs(blocks), chunk=4)
    want_state, want = in_python(blocks)
    assert isinstance(ys["y"], np.ndarray) and ys["y"].shape == (blocks, TOKENS, WIDTH)
    assert ys["seen"].tolist() == list(range(blocks))
    assert_close(ys, want)
    assert counters(state) == counters(want_state)
    assert (jax.random.key_data(state.key) == jax.random.key_data(want_state.key)).all()


def test_stream_yields_the_blocks_of_rollout():
    blocks = stream(STEP, start(), inputs(5))
    ys = list(blocks)
    state, want = rollout(STEP, start(), inputs(5), chunk=4)
    assert_close(jax.tree.map(lambda *y: np.stack(y), *ys), want)
    assert counters(blocks.state) == counters(state)


def test_stream_asks_for_a_block_only_when_it_is_wanted():
    asked = []

    def actions():
        for x in inputs(4):
            asked.append(x)
            yield x

    blocks = stream(STEP, start(), actions())
    assert asked == []
    next(blocks)
    next(blocks)
    assert len(asked) == 2 and int(blocks.state.cache.seen_blocks) == 2


def test_a_hook_changes_the_state_before_each_block():
    seen = []

    def before(state, x):
        seen.append((int(state), x))
        return state + 10

    blocks = stream(lambda state, x: (state + x, state), jnp.int32(0), [1, 2, 3], before=before)
    assert [int(y) for y in blocks] == [10, 21, 33]
    assert seen == [(0, 1), (11, 2), (23, 3)] and int(blocks.state) == 36


def test_a_longer_generation_does_not_recompile():
    rollout(STEP, start(), inputs(3), chunk=4)
    list(stream(STEP, start(), inputs(2)))
    compiled = []
    listener = lambda event, seconds, **_: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        programs = run_chunk._cache_size()
        rollout(Partial(model_step, weights(1)), start(), inputs(10, seed=1), chunk=4)
        list(stream(Partial(model_step, weights(1)), start(), inputs(4)))
        backend = [e for e in compiled if "backend_compile" in e]
        assert run_chunk._cache_size() == programs
        assert backend == []
        jax.jit(lambda x: x * 3 + 1)(1.0)  # the listener does hear compilations
        assert any("backend_compile" in e for e in compiled)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_parameters_of_a_partial_are_arguments_and_not_constants():
    _, a = rollout(STEP, start(), inputs(2), chunk=4)
    _, b = rollout(Partial(model_step, weights(1)), start(), inputs(2), chunk=4)
    assert np.abs(a["y"] - b["y"]).max() > 1e-2


def test_the_state_is_donated():
    state = start()
    rollout(STEP, state, inputs(2), chunk=4)
    assert state.cache.dense_k.is_deleted() and state.cache.span_v.values_BHTD.is_deleted()


def test_skipped_steps_do_not_run():
    seen = []

    def step(state, x):
        jax.debug.callback(lambda s: seen.append(int(s)), state)
        return state + 1, x

    state, ys = rollout(step, 0, np.arange(5), chunk=4)
    jax.effects_barrier()
    assert (int(state), ys.tolist(), sorted(seen)) == (5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4])


def test_keys_can_be_inputs():
    def step(state, key):
        return state, jax.random.normal(key, (2,))

    keys = jax.random.split(jax.random.key(0), 5)
    want = jax.vmap(lambda k: jax.random.normal(k, (2,)))(keys)
    np.testing.assert_allclose(rollout(step, 0, keys, chunk=2)[1], want, rtol=1e-6)
    np.testing.assert_allclose(np.stack(list(stream(step, 0, keys))), want, rtol=1e-6)


def test_progress_is_told_and_may_stop():
    told = []

    def tell(done, total, state):
        told.append((done, total, counters(state)[0]))

    rollout(STEP, start(), inputs(9), chunk=4, progress=tell)
    assert told == [(4, 9, 4), (8, 9, 8), (9, 9, 9)]
    told.clear()
    list(stream(STEP, start(), inputs(2), progress=lambda *a: told.append(a[:2])))
    list(stream(STEP, start(), iter(inputs(1)), progress=lambda *a: told.append(a[:2])))
    assert told == [(1, 2), (2, 2), (1, None)]

    def stop(done, total, state):
        if done == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        rollout(STEP, start(), inputs(9), chunk=4, progress=stop)


def test_a_block_that_is_not_finite_ends_both_drivers_with_its_number():
    x = inputs(6)
    x[3, 1] = np.nan
    with pytest.raises(NonFiniteError, match="block 3 is not finite"):
        rollout(STEP, start(), x, chunk=4)
    blocks = stream(STEP, start(), x)
    for _ in range(3):
        next(blocks)
    with pytest.raises(NonFiniteError, match="block 3 is not finite"):
        next(blocks)


def test_a_full_cache_ends_the_rollout():
    # 1 sink + 6 spans of 2 + window of 4 = 17 blocks; and the default chunk of 8.
    rollout(STEP, start(), inputs(17))
    with pytest.raises(CacheFullError, match=r"1 of 18 blocks found no room: capacity is 17"):
        rollout(STEP, start(), inputs(18))


@pytest.mark.parametrize(
    "xs, chunk, message",
    [
        (np.zeros((0, TOKENS)), 8, r"xs has leading axes \[\(0,\)\]"),
        ({}, 8, r"xs has leading axes \[\]"),
        ((np.zeros(3), np.zeros(4)), 8, r"xs has leading axes \[\(3,\), \(4,\)\]"),
        (np.float32(1), 8, r"xs has leading axes \[\(\)\]; accepted: at least one array"),
        (np.zeros((3, TOKENS)), 0, "chunk=0 is not accepted: give an integer >= 1"),
    ],
)
def test_rollout_says_what_is_wrong(xs, chunk, message):
    with pytest.raises(ValueError, match=message):
        rollout(lambda s, x: (s, x), 0, xs, chunk=chunk)
