"""Caches some of whose heads have no history, against softmax written out with a mask for each head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvg_jax.attention.api import attend
from qvg_jax.attention.by_head import attend_by_head
from qvg_jax.attention.choice import explain
from qvg_jax.attention.cudnn import attend_cudnn
from qvg_jax.attention.features import features_of
from qvg_jax.cache.edits import reset, take_rows, truncate
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.cache.health import NonFiniteError, cache_bytes, raise_if_bad
from qvg_jax.cache.key_bias import KeyBias
from qvg_jax.cache.operations import KVCache, append, compress, evict
from qvg_jax.cache.plan import Plan
from qvg_jax.cache.recode import recode
from qvg_jax.cache.rope import axial_rope
from qvg_jax.cache.saved import from_saved, to_saved
from qvg_jax.cache.summary import summary
from tests.support.cache_model import coarse

LAYERS, BATCH, HEADS, GROUP, DIM, TOKENS, BLOCKS = 4, 2, 3, 2, 8, 4, 11
ROPE = axial_rope([[1.0, 0.3, 0.1, 0.03]])
# Layers with all heads, one, none, and one again that is another.
TABLE = [[True, True, True], [False, True, False], [False] * 3, [True, False, False]]
SIZES = dict(layers=LAYERS, batch=BATCH, heads=HEADS, head_dim=DIM, block_tokens=TOKENS)
SIZES |= dict(span_blocks=2, max_spans=2, keep_recent=2, window_blocks=5, pos_dims=1)
SIZES |= dict(dtype=jnp.float32)


def blocks_of(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    form = (BLOCKS, LAYERS, BATCH, TOKENS, HEADS, DIM)
    k, v = (rng.standard_normal(form, np.float32) for _ in range(2))
    q = rng.standard_normal((BLOCKS, LAYERS, BATCH, TOKENS, HEADS * GROUP, DIM), np.float32)
    position = np.arange(BLOCKS * TOKENS, dtype=np.float32).reshape(BLOCKS, 1, TOKENS, 1)
    return q, k, v, np.broadcast_to(position, (BLOCKS, BATCH, TOKENS, 1))


def softmax_with_masks(data, block: int, seen_LH: list, mask_HqTT=None) -> np.ndarray:
    """Attention of a block's queries; seen_LH[l][h] are the numbers of the blocks that the head sees."""
    q, k, v, positions = data
    turn = lambda x, b: np.asarray(ROPE.rotate(np.swapaxes(x, 1, 2), ROPE.table(positions[b])))  # noqa: E731
    out = np.zeros(q.shape[1:])
    for l in range(LAYERS):
        q_BHTD = turn(q[block, l], block)
        keys = [turn(k[b, l], b) for b in range(block + 1)]
        for h in range(HEADS * GROUP):
            kv = h // GROUP
            which = [*seen_LH[l][kv], block]
            k_BTD = np.concatenate([keys[b][:, kv] for b in which], 1)
            v_BTD = np.concatenate([v[b, l][:, :, kv] for b in which], 1)
            s_BQT = np.einsum("bqd,btd->bqt", q_BHTD[:, h], k_BTD, dtype=np.float64) / np.sqrt(DIM)
            if mask_HqTT is not None:
                s_BQT[:, :, -TOKENS:] = np.where(mask_HqTT[h], s_BQT[:, :, -TOKENS:], -np.inf)
            p_BQT = np.exp(s_BQT - s_BQT.max(-1, keepdims=True))
            out[l, :, :, h] = np.einsum("bqt,btd->bqd", p_BQT / p_BQT.sum(-1, keepdims=True), v_BTD)
    return out


def seen_by(cache: KVCache, block: int, table, local_blocks: int) -> list:
    sink, dropped = cache.layout.sink_blocks, int(cache.dropped_blocks)
    first = list(range(min(sink, block)))
    full = first + list(range(sink + dropped, block))
    local = first + list(range(max(sink, block - local_blocks), block))
    return [[full if has else local for has in row] for row in table]


@jax.jit
def step(cache, k_LBTHD, v_LBTHD, positions):
    return compress(append(cache, k_LBTHD, v_LBTHD, positions))


@jax.jit
def attended(cache, q_LBTHD, k_LBTHD, v_LBTHD, positions, mask):
    """Attention of all layers in a scan: of XLA, and of the way of cuDNN."""
    view = cache.view(positions, ROPE)
    features = features_of(q_LBTHD.shape[1:4], mask=mask)

    def cudnn(*call):
        return attend_cudnn(*call, backend="xla")

    def layer(_, x):
        q, k, v, l = x
        by_cudnn = attend_by_head(cudnn, q, view, k, v, l, jnp.float32(DIM**-0.5), features)[0]
        return None, (attend(q, view, k, v, layer=l, mask=mask, implementation="xla"), by_cudnn)

    return jax.lax.scan(layer, None, (q_LBTHD, k_LBTHD, v_LBTHD, jnp.arange(LAYERS)))[1]


@pytest.mark.parametrize(("sink", "local_blocks", "masked"), [(1, 1, False), (0, 0, True)])
def test_attention_is_the_softmax_with_a_mask_for_each_head(sink, local_blocks, masked):
    """At every fill: an empty cache, a half full sink, blocks that wait in the window, dropped spans."""
    data, history = blocks_of(), HeadHistory(TABLE, local_blocks)
    cache = KVCache.create(**SIZES, sink_blocks=sink, history=history, overflow="drop")
    # Hidden from queries, but never its own key.
    rng = np.random.default_rng(1)
    mask = rng.random((HEADS * GROUP, TOKENS, TOKENS)) < 0.6 if masked else None
    mask = None if mask is None else mask | np.eye(TOKENS, dtype=bool)
    for b in range(BLOCKS):
        q, k, v, positions = (x[b] for x in data)
        seen = seen_by(cache, b, TABLE, local_blocks)
        want = softmax_with_masks(data, b, seen, mask)
        got = attended(cache, q, k, v, positions, None if mask is None else mask[None])
        for out in got:
            np.testing.assert_allclose(out, want, atol=1e-5)
        cache = step(cache, k, v, positions)
    assert int(cache.dropped_blocks) > 0 and int(cache.rejected_blocks) == 0
    everywhere = seen_by(cache, b, np.ones((LAYERS, HEADS), bool), 0)
    assert not np.allclose(want, softmax_with_masks(data, b, everywhere, mask), atol=1e-2)


def test_spans_hold_the_heads_with_a_history_only_and_the_same_bytes():
    """Of codecs that keep heads apart; K and V each with a codec, and a state that goes from span to span."""
    data, codecs = blocks_of(), dict(key_codec=coarse(3), value_codec=coarse(5))
    whole, ragged = (
        KVCache.create(**SIZES, sink_blocks=1, history=history, **codecs)
        for history in (None, HeadHistory(TABLE, 2))
    )
    for b in range(8):
        whole, ragged = (step(c, *(x[b] for x in data[1:])) for c in (whole, ragged))
    assert int(ragged.num_spans) == int(whole.num_spans) == 2
    for side in ("span_k", "span_v", "state_k", "state_v"):
        lead = 2 if side.startswith("span") else 1
        groups = ragged.__getattribute__(side)
        assert len(groups) == 2  # layer 0; layers 1 and 3; layer 2 has no head with a history
        for layer, group, place in ((0, 0, 0), (1, 1, 0), (3, 1, 1)):
            heads = np.flatnonzero(TABLE[layer])
            for x, y in zip(
                jax.tree.leaves(getattr(whole, side)), jax.tree.leaves(groups[group]), strict=True
            ):
                np.testing.assert_array_equal(x[layer].take(heads, lead), y[place])
    sizes = [cache_bytes(c) for c in (whole, ragged)]
    for size in (s.allocated for s in sizes), (s.in_use for s in sizes):
        a, b = size
        assert b.spans * LAYERS * HEADS == a.spans * sum(map(sum, TABLE))
        assert (a.sink, a.window) == (b.sink, b.window)
    assert sizes[0].bf16 == sizes[1].bf16


def test_other_ways_to_the_same_cache_read_the_same():
    """Spread over devices, saved and restored, rows taken, in `jit` with the cache donated, spans evicted."""
    data, history = blocks_of(), HeadHistory(TABLE, 2)
    # The codecs lose nothing here, and the offset says that it is spans that local heads do not read.
    sizes = SIZES | dict(sink_blocks=1, history=history, key_bias=KeyBias(offset=-1.0))
    caches = [KVCache.create(**sizes, sharding=plan) for plan in (None, Plan(spans=2))]
    donated = jax.jit(step.__wrapped__, donate_argnums=0)
    for b in range(8):
        caches = [donated(cache, *(x[b] for x in data[1:])) for cache in caches]
    one, spread = (evict(cache) for cache in caches)
    restored = from_saved(to_saved(spread), KVCache.create(**sizes))
    q, k, v, positions = (x[8] for x in data)
    rows = jnp.array([1])

    @jax.jit
    def read(cache, q, k, v, positions):
        view = cache.view(positions, ROPE)
        one = lambda x: attend(*x[:1], view, *x[1:3], layer=x[3])  # noqa: E731
        return jax.lax.map(one, (q, k, v, jnp.arange(LAYERS)))

    want = read(one, q, k, v, positions)
    for cache in (spread, restored):
        np.testing.assert_allclose(read(cache, q, k, v, positions), want, atol=1e-5)
    few = read(take_rows(one, rows), q[:, rows], k[:, rows], v[:, rows], positions[rows])
    np.testing.assert_allclose(few, want[:, rows], atol=1e-5)
    other = KVCache.create(**sizes | dict(history=HeadHistory(np.array(TABLE)[::-1], 2)))
    with pytest.raises(ValueError, match="history=HeadHistory.*this cache has history=HeadHistory"):
        from_saved(to_saved(one), other)
    with pytest.raises(ValueError, match="saved cache has fewer settings.*history="):
        from_saved(to_saved(KVCache.create(**sizes | dict(history=None))), other)


def test_windows_of_their_own_hold_fewer_bytes_and_give_the_same_bits():
    """At every fill; and of spans, saved and restored, spread over devices, rows taken, emptied."""
    data, plain = blocks_of(), HeadHistory(TABLE, 2)
    own = dataclasses.replace(plain, own_window=True)
    sizes = SIZES | dict(sink_blocks=1, overflow="drop")
    whole, ragged = (KVCache.create(**sizes, history=history) for history in (plain, own))
    spread = KVCache.create(**sizes, history=own, sharding=Plan(spans=2))
    for b in range(BLOCKS):
        q, k, v, positions = (x[b] for x in data)
        same = [attended(cache, q, k, v, positions, None) for cache in (whole, ragged)]
        jax.tree.map(np.testing.assert_array_equal, *same)
        whole, ragged, spread = (step(c, k, v, positions) for c in (whole, ragged, spread))
    for name in ("span_k", "span_v", "dense_pos", "seen_blocks", "dropped_blocks", "num_spans"):
        jax.tree.map(np.testing.assert_array_equal, *(getattr(c, name) for c in (whole, ragged)))
    assert int(ragged.dropped_blocks) > 0
    # Five heads of layers have a history, seven a ring of two blocks; a block of one head is so many bytes.
    block = 2 * BATCH * TOKENS * DIM * 4
    for size in (cache_bytes(c).allocated for c in (ragged, jax.eval_shape(lambda: ragged))):
        assert (size.sink, size.window) == (12 * block, (5 * 5 + 7 * 2) * block)
    used = cache_bytes(ragged).in_use.window
    assert used == (5 * (int(ragged.dense_blocks) - 1) + 7 * 2) * block
    back = from_saved(to_saved(spread), KVCache.create(**sizes, history=own))
    jax.tree.map(np.testing.assert_array_equal, back, ragged)
    turned = take_rows(ragged, jnp.array([1, 0]))
    q, k, v, positions = (x[BLOCKS - 1] for x in data)
    want, other = (
        np.asarray(attended(cache, *x, None)[0])
        for cache, x in (
            (ragged, (q, k, v, positions)),
            (turned, (q[:, ::-1], k[:, ::-1], v[:, ::-1], positions[::-1])),
        )
    )
    np.testing.assert_allclose(other[:, ::-1], want, atol=1e-6)
    np.testing.assert_allclose(read_all(spread, q, k, v, positions), want, atol=1e-5)
    with pytest.raises(ValueError, match="history=HeadHistory.*own_window.*this cache has"):
        from_saved(to_saved(ragged), whole)
    with pytest.raises(ValueError, match="truncate: the cache has a HeadHistory.*own_window=False"):
        truncate(ragged, 0)
    whole, ragged = reset(whole), reset(ragged)
    for b in range(2):
        whole, ragged = (step(c, *(x[b] for x in data[1:])) for c in (whole, ragged))
    same = [attended(cache, *(x[2] for x in data), None) for cache in (whole, ragged)]
    jax.tree.map(np.testing.assert_array_equal, *same)
    assert "and keep no more" in str(summary(ragged)) and "own_window" in repr(own)


def test_a_window_of_its_own_may_be_longer_than_what_is_kept_recent():
    """The ring of three blocks is full after the newest of them were compressed, and local heads read it."""
    data, local = blocks_of(), 3
    history = HeadHistory(TABLE, local, own_window=True)
    tight = SIZES | dict(keep_recent=0, window_blocks=2, max_spans=4, sink_blocks=1)
    cache = KVCache.create(**tight, history=history, overflow="drop")
    for b in range(7):
        cache = step(cache, *(x[b] for x in data[1:]))
    assert int(cache.num_spans) == 3 and int(cache.dense_blocks) == 1  # nothing waits
    want = softmax_with_masks(data, 7, seen_by(cache, 7, TABLE, local))
    for out in attended(cache, *(x[7] for x in data), None):
        np.testing.assert_allclose(out, want, atol=1e-5)
    k, v, positions = (x[7] for x in data[1:])
    k = k.copy()
    k[1, 0, 0, 2, 0] = np.nan  # of a local head
    with pytest.raises(NonFiniteError, match="of block 7 is not finite.*first in K of layer 1"):
        raise_if_bad(step(cache, k, v, positions))


def test_a_window_of_its_own_may_hold_nothing():
    """Neither sink nor newest blocks: local heads read the new block alone, and nothing of them is stored."""
    data, plain = blocks_of(), HeadHistory(TABLE, 0)
    both = (plain, dataclasses.replace(plain, own_window=True))
    caches = [KVCache.create(**SIZES, sink_blocks=0, history=history) for history in both]
    for b in range(4):
        caches = [step(cache, *(x[b] for x in data[1:])) for cache in caches]
    assert (
        cache_bytes(caches[1]).allocated.window * 12 == cache_bytes(caches[0]).allocated.window * 5
    )
    read = [read_all(cache, *(x[4] for x in data)) for cache in caches]
    np.testing.assert_array_equal(*read)


@jax.jit
def read_all(cache, q, k, v, positions):
    view = cache.view(positions, ROPE)
    one = lambda x: attend(x[0], view, *x[1:3], layer=x[3])  # noqa: E731
    return jax.lax.map(one, (q, k, v, jnp.arange(LAYERS)))


def test_padding_is_hidden_from_local_heads_too():
    data, sizes = blocks_of(), SIZES | dict(sink_blocks=1, blocks="padded", max_spans=1)
    lengths = np.array([[4, 3], [2, 4], [4, 4], [1, 2]], np.int32)
    padded = KVCache.create(**sizes, history=HeadHistory([[False] * HEADS] * LAYERS, 2))
    for b, length in enumerate(lengths):
        k, v, positions = (x[b] for x in data[1:])
        hidden = (np.arange(TOKENS) >= length[:, None])[None, :, :, None, None]
        k, v = (np.where(hidden, np.nan, x) for x in (k, v))
        padded = append(padded, k, v, positions, lengths=jnp.asarray(length))
    q, k, v, positions = (x[4] for x in data)
    got = attended(padded, q, k, v, positions, None)
    for row in range(BATCH):
        # One video without padding: its tokens behind each other, as one block of the new tokens.
        known = [(b, t) for b in (0, 2, 3) for t in range(lengths[b, row])] + [
            (4, t) for t in range(4)
        ]
        take = lambda x, r=row, at=known: np.stack([x[b][:, r, t] for b, t in at], 1)[:, None]  # noqa: E731
        keys, values = take(data[1]), take(data[2])
        place = np.array([[[data[3][b, row, t, 0]] for b, t in known]], np.float32)
        for l in range(LAYERS):
            turned = np.asarray(ROPE.rotate(keys[l].swapaxes(1, 2), ROPE.table(place)))
            ask = np.asarray(
                ROPE.rotate(q[l, row : row + 1].swapaxes(1, 2), ROPE.table(positions[:1]))
            )
            s = np.einsum("bhgqd,bhtd->bhgqt", ask.reshape(1, HEADS, GROUP, TOKENS, DIM), turned)
            p = np.asarray(jax.nn.softmax(s / np.sqrt(DIM), -1))
            want = np.einsum("bhgqt,bthd->bqhgd", p, values[l]).reshape(TOKENS, -1, DIM)
            for out in got:
                np.testing.assert_allclose(out[l, row], want, atol=1e-5)


def test_without_any_history_there_are_no_spans_and_the_summary_says_so():
    nobody = HeadHistory(np.zeros((LAYERS, HEADS), bool), 2)
    cache = KVCache.create(**SIZES, history=nobody)
    for b in range(6):
        cache = step(cache, *(x[b] for x in blocks_of()[1:]))
    assert int(cache.num_spans) == 1 and cache_bytes(cache).allocated.spans == 0
    said = str(summary(cache))
    assert "0-3     none  none    0.00  none     0 of 3" in said
    assert "no head has a history, so there are no compressed spans" in said
    assert cache.layout.span_bits == 0 and not jax.tree.leaves(cache.span_k)
    some = str(summary(KVCache.create(**SIZES, history=HeadHistory(TABLE, 2))))
    assert "history: 5 of 12 heads; the others read the sink and the newest 2 blocks" in some
    # Every head has one: the cache without a table.
    whole = KVCache.create(**SIZES, history=HeadHistory(np.ones((LAYERS, HEADS), bool), 2))
    assert whole.layout == KVCache.create(**SIZES).layout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(history=HeadHistory([[True, False]], 1)),
            r"1 layers and 2 heads; accepted: \(4, 3\)",
        ),
        (dict(history=HeadHistory(TABLE, 3)), "local_blocks=3 with keep_recent=2"),
        (dict(history=HeadHistory(TABLE, 2), max_spans=0), "max_spans=0: there are no spans"),
        (dict(history=TABLE), "history=list is not accepted"),
        (dict(history=HeadHistory(TABLE, 2), sharding=Plan(ring=2)), "accepted: plan spans"),
        (
            dict(history=HeadHistory(TABLE, 2, True), blocks="partial"),
            "own_window=True with blocks=",
        ),
    ],
)
def test_create_says_what_is_wrong_with_a_history(changes, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        KVCache.create(**SIZES | changes)


def test_what_cannot_be_said_or_read_is_named():
    with pytest.raises(ValueError, match=r"shape \(4, 3\) and dtype int64; accepted: bool"):
        HeadHistory(np.ones((4, 3), np.int64), 1)
    with pytest.raises(ValueError, match="rows of unequal length"):
        HeadHistory([[True], [True, False]], 1)
    with pytest.raises(ValueError, match="local_blocks=-1"):
        HeadHistory(TABLE, -1)
    cache = KVCache.create(**SIZES, history=HeadHistory(TABLE, 2))
    with pytest.raises(NotImplementedError, match="recode: the cache has a HeadHistory"):
        recode(cache, coarse(), coarse())
    found = explain(cache, jax.ShapeDtypeStruct((BATCH, 4, HEADS, DIM), jnp.float32))
    assert found.implementation == "xla"
    assert "heads: 5 of 12 have a history, by layer 0, 1 or 3 of 3; programs: 3" in str(found)
    whole = KVCache.create(**SIZES)
    assert explain(whole, jax.ShapeDtypeStruct((BATCH, 4, HEADS, DIM), jnp.float32)).heads is None


def test_rounded_counts_of_heads_are_fewer_numbers_and_take_no_history_away():
    history = HeadHistory(TABLE, 2)
    pairs = history.rounded(2)
    assert pairs.counts == (3, 2, 0, 2) and pairs.local_blocks == 2
    assert (np.array(pairs.table) >= np.array(TABLE)).all()
    assert pairs.table[1] == (True, True, False) and history.rounded(1) == history
    with pytest.raises(ValueError, match="multiple=0 is not accepted"):
        history.rounded(0)
