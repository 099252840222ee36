"""Caches with blocks of any size, padding, truncation, rows, and kept rope tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qvg_jax as qvg
from qvg_jax.cache.slots import read_slot
from tests.support.cache_model import coarse
from tests.support.token_caches import (
    BLOCK,
    F32,
    QUERY,
    ROPE,
    SIZES,
    B,
    append,
    compress,
    dense,
    filled,
    make,
    read,
    tokens,
)


@pytest.mark.parametrize("by", ["xla", "cudnn"])
@pytest.mark.parametrize("many", [1, 4, 10])
def test_appends_of_any_size_fill_blocks(by, many):
    kv = tokens(29)
    count = sum(SIZES[:many])
    cache = filled(make(), kv, SIZES[:many])
    assert int(cache.tokens) == count
    assert (int(cache.num_spans) > 0) == (many == 10)
    got = read(cache, QUERY, by)
    np.testing.assert_allclose(got, dense(kv[:, :, :, :count]), rtol=2e-5, atol=2e-5)


def test_spans_have_the_bytes_of_whole_blocks():
    kv, codec = tokens(32), coarse(7)
    pair = dict(key_codec=codec, value_codec=codec)
    whole = filled(make(blocks="whole", **pair), kv, [BLOCK] * 8)
    parts = filled(make(**pair), kv, [3, 4, 1, *[4] * 5, 3, 1])
    assert int(whole.num_spans) == int(parts.num_spans) == 2
    for a, b in zip(jax.tree.leaves(whole.span_k), jax.tree.leaves(parts.span_k), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_window_without_slots_slides_by_tokens():
    kv = tokens(29)
    cache = make(max_spans=0, window_blocks=2, overflow="drop")
    cache = filled(cache, kv, SIZES)
    seen = np.r_[0:4, 21:29]  # the sink, and the newest eight
    np.testing.assert_allclose(read(cache, QUERY), dense(kv[:, :, :, seen]), rtol=2e-5, atol=2e-5)
    assert int(cache.tokens) == 12 and int(cache.dropped_blocks) == 4
    qvg.raise_if_bad(cache)


def test_a_full_cache_refuses_tokens_that_find_no_room():
    kv = tokens(12)
    cache = filled(make(max_spans=0, window_blocks=1), kv, [4, 3])
    full = append(cache, *kv[:, :, :, :2])
    assert int(full.tokens) == 7 and int(full.rejected_blocks) == 1
    np.testing.assert_array_equal(full.dense_k, cache.dense_k)
    assert int(append(full, *kv[:, :, :, :1]).tokens) == 8
    with pytest.raises(qvg.CacheFullError):
        qvg.raise_if_bad(full)


# --- padding -----------------------------------------------------------------------------------

LENGTHS = [[4, 2], [0, 4], [3, 3], [4, 0], [4, 4], [1, 4], [1, 0], [1, 1]]


@pytest.mark.parametrize("by", ["xla", "cudnn"])
def test_padding_is_never_seen(by):
    """In sink, spans and window, also where it holds NaN; a row may have no token yet."""
    sizes, kv = [4] * 6 + [1, 1], tokens(26)
    counts = np.concatenate(
        [np.arange(s) < np.array(n)[:, None] for s, n in zip(sizes, LENGTHS, strict=True)], 1
    )
    bad = jnp.where(jnp.asarray(counts)[None, None, :, :, None, None], kv, jnp.nan)
    cache = make(blocks="padded", sink_blocks=0)
    for many in (1, 8):
        got = filled(cache, bad, sizes[:many], LENGTHS)
        held = sum(sizes[:many])
        want = dense(kv[:, :, :, :held], counts[:, :held])
        np.testing.assert_allclose(read(got, QUERY, by), want, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(got.row_tokens, counts[:, :held].sum(1))
    assert int(got.num_spans) == 2
    qvg.raise_if_bad(got)
    nobody = filled(cache, bad, [4], [[0, 4]])
    assert not np.asarray(read(nobody, QUERY, by)[0]).any()


def test_lengths_say_what_is_wrong():
    kv = tokens(3)
    with pytest.raises(ValueError, match=r"lengths=\[4, 1\] are not accepted: give 0 to 3"):
        qvg.append(make(blocks="padded"), *kv, lengths=np.array([4, 1]))
    with pytest.raises(
        ValueError, match="blocks='partial'; accepted: a cache with blocks='padded'"
    ):
        qvg.append(make(), *kv, lengths=np.array([1, 1]))
    with pytest.raises(ValueError, match=r"accepted: \(2, 2, 4, 2, 8\) .*or fewer tokens than 4"):
        qvg.append(make(), *tokens(5))
    with pytest.raises(ValueError, match=r"accepted: \(2, 2, 4, 2, 8\) \(L, B, T, H, D\)\n"):
        qvg.append(make(blocks="whole"), *kv)
    with pytest.raises(ValueError, match="blocks='ragged' is not accepted: give one of"):
        make(blocks="ragged")


# --- truncate, reset, rows ---------------------------------------------------------------------


@pytest.mark.parametrize("keep", [26, 12, pytest.param(2, marks=pytest.mark.slow), 0])
def test_truncated_is_as_if_never_appended(keep):
    kv, codec = tokens(29), coarse(7)
    cache = filled(make(key_codec=codec), kv, SIZES)
    short = qvg.truncate(cache, keep)
    assert int(short.tokens) == keep
    if keep:
        history = filled(make(key_codec=codec), kv, SIZES)
        k = jnp.concatenate(  # as the cache holds it: sink, spans decoded, window
            [
                history.dense_k[:, :, :, :4],
                *(
                    jnp.stack(
                        [codec.decode(read_slot(history.span_k, l, s), jnp.float32) for l in (0, 1)]
                    )
                    for s in (0, 1)
                ),
                history.dense_k[:, :, :, 4:],
            ],
            3,
        )
        held = jnp.stack([jnp.swapaxes(k, 2, 3)[:, :, :keep], kv[1][:, :, :keep]])
        np.testing.assert_allclose(read(short, QUERY), dense(held), rtol=2e-5, atol=2e-5)
    again = compress(append(short, *kv[:, :, :, keep : keep + 3])) if keep < 27 else short
    assert int(again.tokens) == keep + 3 * (keep < 27)
    qvg.raise_if_bad(again)


def test_truncate_says_at_which_border():
    cache = filled(make(), tokens(29), SIZES)
    with pytest.raises(
        ValueError, match="tokens=15 lies inside .* 12 to 20; accepted there: 12 or 20"
    ):
        qvg.truncate(cache, 15)
    assert int(jax.jit(qvg.truncate)(cache, 15).tokens) == 12
    with pytest.raises(ValueError, match="tokens=30 is not accepted: the cache has 29"):
        qvg.truncate(cache, 30)
    with pytest.raises(ValueError, match="tokens=-1 is not accepted"):
        qvg.truncate(cache, -1)
    whole = filled(make(blocks="whole"), tokens(12), [4] * 3)
    with pytest.raises(ValueError, match="tokens=7 lies inside of a block.*accepted: 4 or 8"):
        qvg.truncate(whole, 7)
    assert int(qvg.truncate(whole, 8).tokens) == 8
    ring = make(max_spans=0, window_blocks=2, overflow="drop")
    with pytest.raises(ValueError, match="truncate: .*do not come back"):
        qvg.truncate(ring, 0)


@pytest.mark.slow
def test_a_reset_cache_goes_on_like_a_new_one():
    kv, codec = tokens(29), coarse(7)
    new = make(key_codec=codec, value_codec=codec)
    used = filled(new, kv, SIZES)
    bad = append(used, *kv[:, :, :, :1] * jnp.nan)
    again = filled(qvg.reset(bad), kv, SIZES)
    qvg.raise_if_bad(again)
    for a, b in zip(jax.tree.leaves(used), jax.tree.leaves(again), strict=True):
        if a.ndim == 0 or a.dtype == jnp.uint8:
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(read(used, QUERY), read(again, QUERY))


@pytest.mark.slow
def test_rows_are_taken_with_all_that_belongs_to_them():
    kv, codec = tokens(26), coarse(7)
    settings = dict(key_codec=codec, value_codec=codec, blocks="padded", pos_dims=1, rope=ROPE)
    sizes, rows = [4] * 6 + [1, 1], np.array([1, 0])
    pos = jnp.asarray(np.random.default_rng(1).normal(size=(B, 26, 1)), jnp.float32)

    def build(kv, pos, order):
        cache, begin = make(**settings), 0
        for size, lengths in zip(sizes, LENGTHS, strict=True):
            here = slice(begin, begin + size)
            lengths = jnp.asarray(lengths)[order]
            cache = compress(append(cache, *kv[:, :, :, here], pos[:, here], lengths=lengths))
            begin += size
        return cache

    cache = build(kv, pos, np.arange(2))
    want = build(kv[:, :, rows], pos[rows], rows)
    got = qvg.take_rows(cache, rows)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    beams = qvg.take_rows(cache, [0, 0, 1])
    assert beams.layout.batch == 3 and beams.dense_k.shape[1] == 3
    np.testing.assert_array_equal(
        beams.span_k.codes_BHTD[:, :, 1], cache.span_k.codes_BHTD[:, :, 0]
    )


def test_take_rows_says_what_is_wrong():
    cache = make()
    with pytest.raises(ValueError, match=r"rows=\[0, 2\] are not accepted: give 0 to 1"):
        qvg.take_rows(cache, np.array([0, 2]))
    with pytest.raises(ValueError, match=r"rows have shape \(0,\)"):
        qvg.take_rows(cache, np.zeros(0, int))
    with pytest.raises(ValueError, match="dtype float32"):
        qvg.take_rows(cache, jnp.zeros(2))
    together = dataclasses.replace(
        F32, encode=lambda x, s, *, key=None: (x.reshape(-1), s), name="together"
    )
    with pytest.raises(
        NotImplementedError, match="codec together stores rows of the batch together"
    ):
        qvg.take_rows(make(key_codec=together), np.array([1, 0]))


# --- rope tables -------------------------------------------------------------------------------


def test_kept_tables_are_those_of_the_positions():
    kv = tokens(29)
    cache, begin = make(pos_dims=1, rope=ROPE), 0
    for size in SIZES:
        pos = jnp.broadcast_to(
            jnp.arange(begin, begin + size, dtype=jnp.float32)[:, None], (B, size, 1)
        )
        cache = compress(append(cache, *kv[:, :, :, begin : begin + size], pos))
        begin += size
    bare = dataclasses.replace(
        cache,
        dense_table=None,
        span_table=None,
        layout=dataclasses.replace(cache.layout, rope=None),
    )
    pos = pos[:, :1] + 1
    view, made = cache.view(pos), bare.view(pos, ROPE)
    held = int(cache.dense_tokens)
    for a, b in zip(view.table_dense, made.table_dense, strict=True):
        np.testing.assert_allclose(a[:, :held], b[:, :held], atol=1e-6)
    for a, b in zip(view.table_spans, made.table_spans, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    count = lambda c, *rope: str(jax.make_jaxpr(lambda c: c.view(pos, *rope))(c)).count(" cos ")  # noqa: E731
    assert count(cache) == 1 and count(bare, ROPE) == 3


def test_reading_positions_without_a_rope_is_an_error():
    cache = make(pos_dims=1)
    q, pos = QUERY, jnp.zeros((B, 3, 1))
    with pytest.raises(ValueError, match=r"rope=None; the cache has positions \(pos_dims=1\)"):
        qvg.attend(q, cache, q, q, layer=0)
    with pytest.raises(ValueError, match="positions with rope=None: nothing is rotated"):
        qvg.attend(q, make(), q, q, layer=0, positions=pos)
    with pytest.raises(ValueError, match="positions with rope=False: nothing is rotated"):
        cache.view(pos, False)
    assert cache.view(rope=False).rope is None
    with pytest.raises(
        ValueError, match="rope=.* with pos_dims=0: a cache keeps the tables of a Rope"
    ):
        make(rope=ROPE)


# --- what it costs -----------------------------------------------------------------------------


def test_bytes_of_stacked_caches_and_of_shapes():
    kv = tokens(29)
    caches = [filled(make(), kv, SIZES[:many]) for many in (2, 10)]
    alone = [qvg.cache_bytes(cache) for cache in caches]
    together = qvg.cache_bytes(jax.tree.map(lambda *x: jnp.stack(x), *caches))
    assert together.tokens == sum(x.tokens for x in alone) == 4 + 29
    assert together.bf16 == sum(x.bf16 for x in alone)
    for name in ("allocated", "in_use"):
        parts = [getattr(x, name) for x in alone]
        assert getattr(together, name) == tuple(map(sum, zip(*parts, strict=True)))
    every_buffer = sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(caches[0]))
    shapes = qvg.cache_bytes(jax.eval_shape(lambda: caches[0]))
    assert shapes.allocated == alone[0].allocated and shapes.allocated.total == every_buffer
    assert shapes.in_use is shapes.tokens is shapes.bf16 is None
