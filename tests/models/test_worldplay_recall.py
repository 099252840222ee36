"""Walks of WorldPlay that are longer than its cache: which spans come back, and what a block makes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.worldplay.block import generate_block
from models.worldplay.cameras import CameraPath
from models.worldplay.history import History, make_cache
from models.worldplay.pipeline import WorldPlay
from models.worldplay.recalling import Recaller
from models.worldplay.request import block_inputs
from models.worldplay.retrieval import ball_points, similarity
from qvg_jax.cache.operations import append
from tests.models.test_worldplay import CONFIG, PATH, PLAIN, SHORT, TWO_BIT, model, request

N = CONFIG.frames_per_block
POINTS = ball_points(np.random.default_rng(0), 2000)
# Turns away and comes back: 16 blocks, more frames than the RoPE table has rows.
LONG = CameraPath.from_string("right-12,w-4,left-12,w-3")
HISTORY = History.qvg(PLAIN, storage="single", sight=2)


@functools.cache
def pipeline(history):
    return WorldPlay(model(), sampler=SHORT, history=history)


def long_request(**changes):
    return request(len(LONG), path=LONG, capacity=None, points_N3=POINTS, **changes)


@pytest.fixture(scope="module")
def long_walk():
    """A walk with two spans in sight: its latents, the chosen spans, and bytes of the state, by block."""
    chosen, sizes = [], set()
    with pytest.MonkeyPatch.context() as patch:
        call = Recaller.__call__

        def watched(self, state, x):
            state = call(self, state, x)
            chosen.append(self.chosen)
            return state

        patch.setattr(Recaller, "__call__", watched)
        latents = pipeline(HISTORY).generate(
            long_request(),
            progress=lambda *at: sizes.add(sum(x.nbytes for x in jax.tree.leaves(at[2]))),
        )
    return latents, chosen, sizes


def test_all_spans_in_sight_are_the_walk_without_recall():
    asked = request(points_N3=POINTS)
    plain = pipeline(History.qvg(TWO_BIT, storage="single")).generate(asked, chunk=1)
    recalled = pipeline(History.qvg(TWO_BIT, storage="single", sight=2)).generate(asked)
    np.testing.assert_array_equal(recalled, plain)


def test_the_spans_that_come_back_are_those_with_the_view_of_the_block(long_walk):
    _, chosen, _ = long_walk
    w2c = np.float64(np.float32(LONG.w2c_F44))
    recalled = 0
    for block, ids in enumerate(chosen):
        if not block:
            continue
        spans = max(block - 1, 0) // 2
        count = min(
            spans, 2 - (block % 2 == 0)
        )  # before an even block the newest span is compressed
        assert len(ids) == count
        if spans <= count:
            continue
        queries = w2c[block * N : (block + 1) * N]
        clips = [
            np.mean([similarity(POINTS, q, w2c[c * N + h]) for q in queries for h in (0, 1)])
            for c in range(2 * spans)
        ]
        best = np.reshape(clips, (spans, 2)).max(1)
        np.testing.assert_allclose(np.sort(best[list(ids)]), np.sort(best)[-count:])
        recalled += ids != tuple(range(spans - count, spans))
    assert recalled >= 3  # the newest alone would not have been them


def test_a_block_reads_the_chosen_spans_as_a_list_of_blocks_says(long_walk):
    """The reference keeps K and V of every block in a list and makes a cache of the chosen ones."""
    latents, chosen, _ = long_walk
    plain = History(storage="single")
    room = HISTORY.context_frames(CONFIG, len(LONG)) + N
    empty = make_cache(CONFIG, plain, frames=room, latent_height=4, latent_width=4)
    step = jax.jit(lambda model, state, x: generate_block(model, state, x, SHORT, plain)[:2])
    start = pipeline(HISTORY).start(long_request())
    kept, shown = [], []
    for block, x in enumerate(block_inputs(CONFIG, HISTORY, long_request())):
        ids, spans = chosen[block], max(block - 1, 0) // 2
        seen = [b for i in ids for b in (2 * i, 2 * i + 1)] + [*range(2 * spans, block)]
        cache, size = empty, empty.layout.block_tokens
        for place, b in enumerate(seen[:-1]):
            k, v, at = kept[b]
            frame = N * place + np.arange(size) // (size // N)
            cache = append(cache, k, v, at.at[..., 0].set(frame.astype(np.float32)))
        buffers = start.latents_BFZYX, start.frames
        for place, b in enumerate(seen):
            buffers = jax.tree.map(
                lambda new, old, p=place: new.at[:, p * N : (p + 1) * N].set(old),
                buffers,
                shown[b],
            )
        counted = jnp.asarray(len(seen), jnp.int32)
        state = dataclasses.replace(
            start, cache=cache, latents_BFZYX=buffers[0], frames=buffers[1], blocks=counted
        )
        state, made = step(model(), state, jax.tree.map(jnp.asarray, x))
        np.testing.assert_allclose(made, latents[:, block * N : (block + 1) * N], rtol=0, atol=2e-5)
        if seen:
            old = slice((len(seen) - 1) * size, len(seen) * size)
            k, v = (
                jnp.swapaxes(x[..., old, :], 2, 3)
                for x in (state.cache.dense_k, state.cache.dense_v)
            )
            kept.append((k, v, state.cache.dense_pos[:, old]))
        shown.append((latents[:, block * N : (block + 1) * N], x.frames))


def test_the_device_holds_as_much_for_a_walk_of_any_length_and_a_walk_goes_on(long_walk):
    latents, _, sizes = long_walk
    assert len(LONG) > CONFIG.rope_frames and len(sizes) == 1
    assert latents.shape[1] == len(LONG) and np.isfinite(latents).all()
    again = pipeline(HISTORY).generate(long_request(done_BFZYX=latents[:, : 9 * N]))
    np.testing.assert_array_equal(again, latents)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(sight=0), "sight=0 has no room for a span"),
        (dict(sight=1.5), "sight=1.5 has no room"),
        (dict(sight=1, storage="packed"), "needs storage='single'"),
        (dict(sight=1, semantics="recompute"), "needs semantics='append'"),
    ],
)
def test_histories_that_cannot_recall_say_why(changes, said):
    with pytest.raises(ValueError, match=said):
        History(**(dict(storage="single") | changes))


def test_contexts_are_not_chosen_twice():
    with pytest.raises(ValueError, match="contexts with sight=2"):
        pipeline(HISTORY).generate(request(path=PATH, contexts=[[]] * 6))
