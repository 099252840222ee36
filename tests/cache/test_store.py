"""Spans kept outside of the cache: what is recalled equals a list of them, in both memories and after a restart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qvg_jax as qvg
from qvg_jax.cache import memories
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.cache.rope import axial_rope, frequency_ladder
from qvg_jax.codecs.base import identity
from tests.support.cache_model import SIZES, ListCache, block, coarse, query

ROPE = axial_rope([frequency_ladder(4), frequency_ladder(2), frequency_ladder(2)])
SLOTS = 3
CODECS = dict(key_codec=coarse(), value_codec=identity())


def small(**changes):
    sizes = dict(sink_blocks=1, span_blocks=2, max_spans=SLOTS, keep_recent=1, overflow="drop")
    return qvg.KVCache.create(**(SIZES | sizes | CODECS | changes))


@jax.jit
def step(cache, new):
    return qvg.compress(qvg.append(cache, *new))


@functools.partial(jax.jit, static_argnames="kept_tables")
def read(cache, new, kept_tables=False):
    q, k, v, positions = new
    view = cache.view(positions, None if kept_tables else ROPE)
    return qvg.attend(q, view, k, v, layer=1)


def walked(blocks, cache, store, seed=0, look=None):
    """Cache and store after blocks with spans recalled at random before some of them."""
    rng = np.random.default_rng(seed)
    for i in range(blocks):
        cache = step(cache, block(i, cache.layout))
        if rng.random() < 0.7:
            store = store.keep(cache)
            count = rng.integers(0, min(SLOTS, len(store.kept)) + 1)
            ids = rng.choice(store.next, count, replace=False)
            ahead = store.fetch(ids) if i % 2 else None
            cache, store = qvg.recall(cache, store, ids, ahead)
            if look:
                look(i, cache, store, sorted(int(n) for n in ids))
    return cache, store


@pytest.mark.parametrize(
    "memory, changes", [("host", {}), ("device", dict(rope=ROPE, blocks="padded"))]
)
def test_what_is_in_sight_equals_a_list_of_spans(memory, changes):
    cache = small(**changes)
    store = qvg.SpanStore.create(cache, spans=40, memory=memory)
    model = ListCache(dataclasses.replace(cache.layout, max_spans=40))
    seen = []

    def look(i, cache, store, ids):
        while model.seen <= i:
            model.append(*block(model.seen, cache.layout))
            model.compress()
        assert store.next == len(model.spans)
        everything, model.spans = model.spans, [model.spans[n] for n in ids]
        new = query(i + 1, cache.layout)
        want = model.attend(*new[:3], 1, new[3], ROPE)
        np.testing.assert_allclose(
            read(cache, new, kept_tables="rope" in changes), want, rtol=2e-5, atol=2e-5
        )
        model.spans = everything
        assert int(cache.num_spans) == len(ids)
        assert int(cache.tokens) == model.history(0)[0].shape[2] - cache.layout.span_tokens * (
            len(everything) - len(ids)
        )
        seen.append(ids)

    cache, store = walked(26, cache, store, look=look)
    assert store.next > 10 and len(seen) > 10 and any(len(ids) == SLOTS for ids in seen)
    assert store.nbytes == store.next * sum(x.nbytes for x in jax.tree.leaves(store.span(0)))
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(store.span(0))}
    default = jax.devices()[0].default_memory().kind
    assert kinds == {"pinned_host" if memory == "host" else default}


def test_a_span_that_stays_is_not_copied_and_the_cache_is_donated(monkeypatch):
    cache, store = walked(20, small(), qvg.SpanStore.create(small(), spans=20))
    cache, store = qvg.recall(cache, store, [1, 4, 6])
    copies = []
    put = memories.in_memory
    monkeypatch.setattr("qvg_jax.cache.recall.in_memory", lambda *x: copies.append(x) or put(*x))
    before = cache
    cache, store = qvg.recall(cache, store, [4, 6])
    cache, store = qvg.recall(cache, store, [6, 4])
    assert not copies and before.dense_k.is_deleted()
    cache, store = qvg.recall(cache, store, [6, 4, 0])
    assert len(copies) == 1


def test_a_store_comes_back_from_disk_and_goes_on_the_same_way():
    cache, store = walked(15, small(), qvg.SpanStore.create(small(), spans=20), seed=3)
    saved, saved_cache = store.to_saved(), qvg.to_saved(cache)
    whole = walked(8, cache, store, seed=4)
    cache = qvg.from_saved({k: np.asarray(v) for k, v in saved_cache.items()}, small())
    again = walked(8, cache, qvg.SpanStore.create(small(), spans=20).from_saved(saved), seed=4)
    assert whole[1].sight == again[1].sight
    for a, b in zip(
        *(jax.tree.leaves((x[0], dict(x[1].kept))) for x in (whole, again)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    gone = dict(saved)
    name = next(name for name in saved if name.startswith("1."))
    del gone[name]
    with pytest.raises(ValueError, match=r"saved: 1\..* is missing"):
        store.from_saved(gone)


def test_the_nearest_spans_are_those_whose_blocks_are_near():
    cache, store = small(), qvg.SpanStore.create(small(), spans=20)
    for i in range(20):
        k, v, positions = block(i, cache.layout)
        places = jnp.stack([jnp.float32(i), jnp.float32(10 * (i // 2)), jnp.float32(0)])
        cache = step(cache, (k, v, jnp.broadcast_to(places, positions.shape)))
        store = store.keep(cache)
    # Spans hold blocks 1 and 2, 3 and 4, ...: at 0 and 10, 10 and 20, ...
    at = lambda y: np.array([[[99.0, y, 0.0]]], np.float32)  # noqa: E731
    assert store.nearest(at(31), 1) == (3,)
    assert store.nearest(at(9), 2) == (0, 1)
    assert store.nearest(at(0), 3, components=[0]) == (6, 7, 8)  # by time alone
    assert qvg.SpanStore.create(small(), spans=20).nearest(at(0), 3) == ()


def test_heads_without_a_history_and_times_that_count_back_change_nothing_of_it():
    history = HeadHistory(np.array([[True, False], [False, True]]), local_blocks=1)
    cache = small(history=history)
    for i in range(8):
        cache = step(cache, block(i, cache.layout))
    store = qvg.SpanStore.create(cache, spans=9).keep(cache)
    new = query(8, cache.layout)
    relative = qvg.RelativeTime(horizon=10**4)
    back = jax.jit(
        lambda cache, q, k, v, at: qvg.attend(
            q, cache.view(at, ROPE, relative=relative), k, v, layer=1
        )
    )
    want = read(cache, new)
    np.testing.assert_array_equal(back(cache, *new), want)
    cache, store = qvg.recall(cache, store, [])
    assert np.abs(np.asarray(read(cache, new) - want)).max() > 1e-3
    cache, store = qvg.recall(cache, store, [2, 0, 1])
    np.testing.assert_array_equal(back(cache, *new), want)


def test_a_store_for_a_cache_under_way_begins_with_what_is_in_sight():
    cache = small()
    for i in range(20):
        cache = step(cache, block(i, cache.layout))
    store = qvg.SpanStore.create(cache, spans=9).keep(cache)
    assert sorted(store.kept) == [6, 7, 8] and store.next == 9


def test_errors_name_the_span_and_the_plan(monkeypatch):
    cache, store = small(), qvg.SpanStore.create(small(), spans=4)
    for i in range(20):
        cache = step(cache, block(i, cache.layout))
        store = store.keep(cache) if i < 15 else store
    kept = store.next
    with pytest.raises(ValueError, match=rf"spans {kept} to .* made room .* max_spans={SLOTS}"):
        late = cache
        for i in range(20, 24):
            late = step(late, block(i, late.layout))
        store.keep(late)
    store = store.keep(cache)
    with pytest.raises(
        ValueError, match="span 0 is not kept; accepted: .*capacity=4, and it made room"
    ):
        qvg.recall(cache, store, [0])
    with pytest.raises(ValueError, match=rf"span {store.next} is not kept; accepted"):
        qvg.recall(cache, store, [store.next])  # still in the window
    with pytest.raises(ValueError, match="at most max_spans=3 numbers, each once"):
        qvg.recall(cache, store, [store.next - 1] * 2)
    with pytest.raises(ValueError, match="needs a new store"):
        store.keep(qvg.reset(cache))
    other = qvg.reset(cache)
    for i in range(20):  # as long as the history before, and not the same
        other = step(other, block(i + 100, other.layout))
    with pytest.raises(ValueError, match="is another than the store's: .* needs a new store"):
        store.keep(other)
    with pytest.raises(ValueError, match="has span_blocks=1 and not 2"):
        store.keep(small(span_blocks=1))
    with pytest.raises(ValueError, match="overflow='error'"):
        qvg.SpanStore.create(small(overflow="error"), spans=9)
    with pytest.raises(ValueError, match="spans=2 is not accepted"):
        qvg.SpanStore.create(small(), spans=2)
    with pytest.raises(ValueError, match="memory='disk'"):
        qvg.SpanStore.create(small(), spans=9, memory="disk")
    with pytest.raises(NotImplementedError, match="plan spans=3"):
        qvg.SpanStore.create(small(sharding=qvg.Plan(spans=3)), spans=9)
    monkeypatch.setattr(memories, "_free_bytes", lambda memory: 10**4)
    with pytest.raises(
        ValueError, match=r"spans=999 of .* MB take .* of the host's .* accepted: at most \d+ spans"
    ):
        qvg.SpanStore.create(small(), spans=999)


def test_what_cannot_be_near_or_saved_is_named():
    cache, store = small(), qvg.SpanStore.create(small(), spans=9)
    for i in range(12):
        cache = step(cache, block(i, cache.layout))
        store = store.keep(cache)
    here = np.asarray(block(3, cache.layout)[2])
    for changes, message in (
        (dict(count=0), "count=0 is not accepted"),
        (dict(count=1.5), "count=1.5"),
        (dict(components=[5]), r"components=\[5\] are not accepted: give some of 0 to"),
        (dict(positions_BTP=here[..., :1]), "positions have shape .*; accepted:"),
        (dict(positions_BTP=here * np.nan), "NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=message):
            store.nearest(**dict(positions_BTP=here, count=2) | changes)
    for args, message in (
        ((store, cache, [0]), "cache=a SpanStore is not accepted: give a KVCache"),
        ((cache, cache, [0]), "store=a KVCache is not accepted: give a SpanStore"),
        ((cache, store, 5), "ids=5 is not accepted: give a list of integers"),
        ((cache, store, ["a"]), "ids=a list is not accepted"),
        ((cache, store, [True]), "ids=a list"),
    ):
        with pytest.raises(TypeError, match=message):
            qvg.recall(*args)
    with pytest.raises(TypeError, match="cache=5 is not accepted"):
        qvg.SpanStore.create(5, spans=9)
    with pytest.raises(TypeError, match="relative=5 is not accepted: give a RelativeTime"):
        cache.view(block(3, cache.layout)[2], ROPE, relative=5)
    saved, empty = store.to_saved(), qvg.SpanStore.create(small(), spans=9)
    for changes, message in (
        (dict(next=np.int64(99)), "before next=99"),
        (dict(sight=np.int64([77, -1, -1])), r"sight=\[77, -1, -1\]"),
        (dict(sight=np.int64([0])), "for each of 3 slots"),
    ):
        with pytest.raises(ValueError, match=message):
            empty.from_saved(saved | changes)
    with pytest.raises(ValueError, match="at most capacity=3"):
        qvg.SpanStore.create(small(), spans=3).from_saved(saved)
    assert empty.from_saved(saved).keep(cache).next == store.next
