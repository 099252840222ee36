"""Spans chosen by mean keys: those whose logits for a block are the highest, as written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qvg_jax as qvg
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.cache.rope import axial_rope, frequency_ladder
from qvg_jax.codecs.base import identity
from tests.support.cache_model import SIZES

ROPE = axial_rope([frequency_ladder(8)])
TOKENS = SIZES["block_tokens"]


def small(**changes):
    sizes = dict(sink_blocks=1, span_blocks=2, max_spans=3, keep_recent=1, overflow="drop")
    codecs = dict(
        key_codec=identity(jnp.float32), value_codec=identity(), pos_dims=1, dtype=jnp.float32
    )
    return qvg.KVCache.create(**(SIZES | sizes | codecs | changes))


def positions(first, tokens=TOKENS):
    return (first + np.arange(float(tokens), dtype=np.float32)).reshape(1, tokens, 1)


def rotated(x_THD, pos_T1):
    angle = pos_T1 * np.array([frequency_ladder(8)])
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x1, x2 = np.split(np.float64(x_THD), 2, -1)
    return np.concatenate([x1 * cos - x2 * sin, x1 * sin + x2 * cos], -1)


@pytest.fixture(scope="module")
def walk():
    """A padded cache and its store after 18 blocks, and K of every block."""
    cache = small(blocks="padded")
    store = qvg.SpanStore.create(cache, spans=20)
    rng, keys = np.random.default_rng(0), []
    step = jax.jit(lambda *x: qvg.compress(qvg.append(*x[:4], lengths=x[4])))
    for i in range(18):
        k, v = rng.normal(size=(2, 2, 1, TOKENS, 2, 8)).astype(np.float32)
        lengths = np.array([TOKENS - i % 2])
        keys.append((k[:, 0, : lengths[0]], positions(TOKENS * i, TOKENS - i % 2)[0]))
        cache = step(cache, k, v, positions(TOKENS * i), lengths)
        store = store.keep(cache)
    return cache, store, keys


@pytest.mark.parametrize("rope", [None, ROPE])
def test_scores_are_the_mean_logits_of_what_was_stored(walk, rope):
    _, store, keys = walk
    means = qvg.MeanKeys(rope).keep(store)
    turn = (lambda x, pos: x) if rope is None else rotated
    q = np.random.default_rng(1).normal(size=(2, 1, 5, 4, 8)).astype(np.float32)
    at = positions(60, 5)
    q_LHD = np.stack([turn(x, at[0]).mean(0).reshape(2, 2, 8).mean(1) for x in q[:, 0]])
    scores = []
    for number in store.kept:  # spans hold blocks 1 and 2, 3 and 4, ...
        blocks = keys[2 * number + 1 : 2 * number + 3]
        k_LTHD = np.concatenate([np.stack([turn(x, pos) for x in k]) for k, pos in blocks], 1)
        scores.append(np.sum(k_LTHD.mean(1) * q_LHD))
    order = np.argsort(scores)[::-1]
    assert len(scores) == 8 and k_LTHD.shape[1] == 2 * TOKENS - 1  # padding does not count
    for count in (1, 3, 99):
        assert means.nearest(q, at, count=count) == tuple(sorted(order[:count]))


def test_a_block_that_asks_like_a_span_finds_it_and_what_made_room_is_forgotten(walk):
    cache, store, keys = walk
    means = qvg.MeanKeys().keep(store)
    for number in (0, 3, 7):
        q = np.concatenate([k for k, _ in keys[2 * number + 1 : 2 * number + 3]], 1)
        assert means.nearest(q[:, None], count=1) == (number,)
    assert all(means.keep(store).means[i] is means.means[i] for i in store.kept)
    few = qvg.SpanStore.create(cache, spans=3).keep(cache)
    assert sorted(means.keep(few).means) == [5, 6, 7]
    assert qvg.MeanKeys().nearest(q[:, None], count=2) == ()


def test_what_does_not_fit_is_named(walk):
    _, store, _ = walk
    means, q = qvg.MeanKeys(ROPE).keep(store), np.zeros((2, 1, 5, 4, 8), np.float32)
    at = positions(0, 5)
    for args, count, said in (
        ((q, at), 0, "count=0"),
        ((q,), 1, "positions_BTP=None with a rope"),
        ((q[..., :3, :], at), 1, r"q_LBTHD has shape .*; accepted: \(2, 1, T, n 2, 8\)"),
        ((q + np.nan, at), 1, "NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=said):
            means.nearest(*args, count=count)
    with pytest.raises(TypeError, match="store=5 is not accepted"):
        means.keep(5)
    history = HeadHistory(np.array([[True, False], [False, True]]), local_blocks=1)
    with pytest.raises(NotImplementedError, match="mean keys are those of all heads"):
        means.keep(qvg.SpanStore.create(small(history=history), spans=5))
