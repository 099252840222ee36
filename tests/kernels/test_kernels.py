"""Kernels that decode and attend, without a GPU: references, what they refuse, and that they compile to GPU code.

Pallas cannot interpret inline GPU code, of which decoding consists, nor products with an operand in
registers, so numbers of the kernels themselves are in test_kernels_gpu.py, and without a GPU, by other
means, in test_kernels_numbers.py. `attend` as a whole is in test_kernels_attend.py and test_kernels_formats.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks import sanitize
from pallas_kernels.dequant_attention import (
    Schedule,
    combine_splits,
    prepare,
    prepare_tokens,
    schedule_for,
    splits_for,
    visit,
)
from pallas_kernels.dequant_attention import reference as attention_reference
from pallas_kernels.dequantize import (
    Encoded,
    Rotation,
    Scheme,
    Spans,
    Tokens,
    Window,
    append_values,
    decode_keys,
    decode_values,
)
from pallas_kernels.dequantize.reference import key_row_of_token
from qvg_jax.attention.new_block import scale_of
from tests.support.kernel_cases import (
    E4M3,
    FORMATS,
    angles,
    encoded,
    exact_attention,
    lowered,
)

# -- decoding


@pytest.mark.parametrize(
    "name, head_dim",
    [(n, d) for n in FORMATS for d in (64, 128, 256) if d == 128 or not FORMATS[n][0].affine],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, E4M3], ids=["bf16", "e4m3"])
def test_decoding_compiles_to_one_kernel(name, dtype, head_dim):
    source, scheme = encoded(name, 8, 200, head_dim=head_dim)
    here = dict(valid=200, dtype=dtype, scale_n=jnp.ones(4))
    for pairing in ("half", "interleaved"):
        text = lowered(
            lambda s, i, t, p=pairing: decode_keys(
                Spans(s, scheme, i, 4), rotation=Rotation(t, p, batch=2, first=i), **here
            ),
            source, jnp.int32(4), angles(0, 6, 200, head_dim),
        )  # fmt: skip
        assert text.count("mosaic_gpu") >= 1
    assert "mosaic_gpu" in lowered(
        lambda s, i: decode_values(Spans(s, scheme, i, 4), **here), source, jnp.int32(4)
    )


def test_the_reference_fills_the_workspace_with_zeros_and_never_reads_what_is_not_valid():
    x = jnp.full((3, 70, 128), jnp.nan, jnp.bfloat16).at[:, :50].set(2.0)
    here = dict(valid=50, implementation="reference")
    keys = decode_keys(Tokens(x, 1, 2), dtype=jnp.bfloat16, **here)
    assert keys.shape == (2, 256, 128)
    assert bool((keys[:, :50] == 2).all()) and bool((keys[:, 50:] == 0).all())
    values = decode_values(Tokens(x, 1, 2), dtype=E4M3, scale_n=jnp.ones(2), **here)
    assert values.shape == (2, 128, 256)
    assert bool((values[:, :, :50].astype(jnp.float32) == 2).all())
    assert bool((values[:, :, 50:].astype(jnp.float32) == 0).all())


def test_keys_in_e4m3_lie_in_a_permutation_of_every_sixteen():
    rows = np.asarray(key_row_of_token(48))
    assert sorted(rows) == list(range(48))
    np.testing.assert_array_equal(rows // 16, np.arange(48) // 16)
    # The attention kernel makes tokens of rows again with this arithmetic.
    c = rows
    inside = ((c & 6) << 1) | ((c >> 2) & 2) | (c & 1)
    np.testing.assert_array_equal((c & -16) | inside, np.arange(48))


def test_scales_make_e4m3_of_any_magnitude():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 128)), jnp.float32) * 1e-4
    scale = scale_of(jnp.abs(x).max(axis=(1, 2)))
    here = dict(valid=64, dtype=E4M3, implementation="reference")
    y = decode_values(Tokens(x, 0, 2), scale_n=scale, **here).astype(jnp.float32)
    y *= scale[:, None, None]
    y = y.swapaxes(1, 2)[:, :64]
    assert float(jnp.linalg.norm(y - x) / jnp.linalg.norm(x)) < 0.03  # half of 2^-4, on average


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scheme=Scheme(bits=3, group=64, offset=3, stages=1)), "head_dim=85"),
        (dict(scheme=Scheme(bits=8, group=64, offset=3, stages=1)), "head_dim=32"),
        (dict(scheme=Scheme(bits=2, group=4, offset=1, stages=1)), "group=4"),
        (dict(scheme=Scheme(bits=2, group=48, offset=1, stages=1)), "that divides 128"),
        (dict(scheme=Scheme(bits=2, group=64, offset=1.2, stages=1)), "offset=1.2"),
        (dict(dtype=jnp.float32), "float32"),
        (dict(ids=jnp.uint16), "uint16"),
    ],
)
def test_a_named_kernel_says_what_it_cannot_read(change, message):
    source, scheme = encoded("qvg", 2, 64)
    if "ids" in change:
        source = Encoded(
            source.codes_RTC, source.scales_RTG, source.ids_RST.astype(change["ids"]),
            source.centroids_RSKD,
        )  # fmt: skip
    with pytest.raises(NotImplementedError, match=message):
        decode_keys(
            Spans(source, change.get("scheme", scheme), 0, 2), valid=64,
            dtype=change.get("dtype", E4M3), scale_n=jnp.ones(2),
        )  # fmt: skip
    spans, here = Spans(source, scheme, 0, 2), dict(valid=64, dtype=E4M3)
    with pytest.raises(ValueError, match="implementation='cuda'"):
        decode_values(spans, scale_n=jnp.ones(2), implementation="cuda", **here)
    with pytest.raises(ValueError, match="scale_n=None with dtype=float8_e4m3fn"):
        decode_values(spans, **here)


# -- attention


@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 5e-3), (E4M3, 6e-2)])
def test_segments_of_the_reference_are_one_softmax(dtype, bound):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, n, 128)).astype(np.float32) for n in (40, 700, 700))
    unit = jnp.asarray([0.5, 2.0])
    queries = prepare(jnp.asarray(q), jnp.float32(128**-0.5), dtype)
    state = attention_reference.empty(3, *queries.q_nQD.shape)
    for start, n in ((0, 300), (300, 0), (300, 400)):
        here = dict(valid=n, dtype=dtype, scale_n=unit, implementation="reference")
        part = [jnp.asarray(x[:, start : start + max(n, 1)], jnp.bfloat16) for x in (k, v)]
        keys, values = (
            decode(Tokens(x, 0, 2), **here)
            for decode, x in zip((decode_keys, decode_values), part, strict=True)
        )
        ones = unit if dtype == E4M3 else jnp.ones(2)
        state = attention_reference.segment(*queries, keys, values, n, ones, ones, state)
    out = np.asarray(combine_splits(state, 40))
    right = exact_attention(q, k, v)
    assert np.linalg.norm(out - right) / np.linalg.norm(right) < bound


@pytest.mark.parametrize("dtype", [jnp.bfloat16, E4M3], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_compiles_and_updates_its_state_in_place(dtype, head_dim):
    q = jnp.zeros((2, 130, head_dim), jnp.bfloat16)
    k = jnp.zeros((2, 512, head_dim), dtype)
    v = jnp.swapaxes(k, 1, 2) if dtype == E4M3 else k

    def f(q, k, v, valid, times):
        queries = prepare(q, jnp.float32(0.1), dtype)
        refs = [jax.new_ref(x) for x in visit(queries, k, v, valid, splits=3)]

        def again(_, done):
            visit(queries, k, v, valid, state=refs, splits=3)
            return done

        lax.fori_loop(0, times, again, jnp.int32(0))
        return combine_splits([r[...] for r in refs], 130)

    text = lowered(f, q, k, v, jnp.int32(400), jnp.int32(2))
    assert text.count("output_operand_alias<") == 3


@pytest.mark.slow
def test_what_the_sanitizer_runs_compiles():
    """Spans and new tokens behind each other, windows, schedules; the rest has tests of its own."""
    names = {name: (f, args) for name, f, args in sanitize.calls()}
    some = ("spans", "plain", "Schedule", "queries")
    some = [n for n in names if any(word in n for word in some)]
    assert len(some) == 39
    for name in some:
        f, args = names[name]
        assert "mosaic_gpu" in lowered(f, *args)


def test_attention_refuses_what_does_not_belong_together():
    queries = prepare(jnp.zeros((2, 128, 128)), jnp.float32(1), jnp.bfloat16)
    good = jnp.zeros((2, 256, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        visit(queries, good.astype(E4M3), good, 256)
    with pytest.raises(ValueError, match=r"v.shape=\(2, 128, 256\)"):
        visit(queries, good, good.swapaxes(1, 2), 256)
    odd = prepare(jnp.zeros((2, 128, 96)), jnp.float32(1), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"D one of \(64, 128, 256\)"):
        visit(odd, good[..., :96], good[..., :96], 256)
    with pytest.raises(ValueError, match="T=200"):
        visit(queries, good[:, :200], good[:, :200], 200)
    with pytest.raises(ValueError, match="one of 2 query tiles of 128"):
        visit(queries, good, good, 256, splits=Schedule(3, 0, 1))
    q, rotation = jnp.zeros((2, 64, 2, 128), jnp.bfloat16), Rotation(angles(0, 2, 64))
    with pytest.raises(ValueError, match="rotation.batch=1; accepted: batch=2, the cache's"):
        prepare_tokens(q, jnp.float32(1), batch=2, heads=2, rotation=rotation, fp8=False)


def test_several_spans_must_have_whole_sixteens_and_windows_are_of_plain_tokens():
    source, scheme = encoded("qvg", 4, 200)
    here = dict(valid=64, scale_n=jnp.ones(2))
    with pytest.raises(ValueError, match="spans of 200 tokens"):
        decode_keys(Spans(source, scheme, jnp.asarray([0, 2]), 2), dtype=E4M3, **here)
    with pytest.raises(ValueError, match=r"first_row.shape=\(2,\)"):
        decode_keys(
            Tokens(jnp.zeros((4, 64, 128), jnp.bfloat16), jnp.asarray([0, 2]), 2),
            dtype=E4M3,
            **here,
        )
    with pytest.raises(ValueError, match=r"row_n.shape=\(3,\); accepted: \(2,\)"):
        rows = jnp.arange(3)
        decode_values(Tokens(jnp.zeros((4, 64, 128), jnp.bfloat16), 0, 2, rows), dtype=E4M3, **here)
    one = Spans(source, scheme, 0, 2)
    with pytest.raises(ValueError, match="window of Spans; accepted: Tokens"):
        Window(one, 0, 64)
    with pytest.raises(ValueError, match="tokens: Spans; accepted: Tokens"):
        append_values(jnp.zeros((2, 128, 512), E4M3), 0, one, **here)


def test_splits_fill_the_chip_but_not_at_the_price_of_their_state():
    assert splits_for(12, 4680, 37_440, 3, True) == 2
    assert splits_for(32, 7800, 37_440, 1, True) == 1  # 15 waves are full enough
    assert 4 <= splits_for(12, 256, 32_768, 4, True) <= 16
    assert splits_for(1, 64, 512, 1, True) == 1  # too few keys to share


@pytest.mark.parametrize("tiles, whole, splits", [(444, 396, 5), (24, 0, 11), (7, 7, 3), (9, 4, 2)])
def test_pieces_of_a_schedule_cover_every_query_tile_once(tiles, whole, splits):
    schedule = Schedule(tiles, whole, splits)
    tile, split, of = (
        np.broadcast_to(x, (schedule.pieces,)) for x in schedule.place(jnp.arange(schedule.pieces))
    )
    assert sorted(tile[:tiles]) == list(range(tiles))  # one of each comes first
    want = {(i, p, n) for i in range(tiles) for n in [1 if i < whole else splits] for p in range(n)}
    assert set(zip(tile.tolist(), split.tolist(), of.tolist(), strict=True)) == want
    assert len(want) == schedule.pieces


def test_only_the_last_wave_is_shared():
    assert schedule_for(444, 37_440, 3, True) == Schedule(444, 396, 5)
    assert schedule_for(672, 42_240, 1, True) == Schedule(672, 660, 11)
    assert schedule_for(24, 32_768, 4, True).whole == 0
    assert schedule_for(264, 37_440, 1, True).pieces == 264  # two full waves


def test_pieces_are_combined_to_one_softmax():
    rng = np.random.default_rng(1)
    schedule = Schedule(4, 2, 3)
    acc, m, l = (
        jnp.asarray(rng.uniform(0.5, 2, (schedule.pieces, 128, *more)), jnp.float32)
        for more in ((8,), (), ())
    )
    out = np.asarray(combine_splits((acc, m, l), 200, schedule)).reshape(2, 200, 8)
    for tile in range(4):
        mine = [tile] if tile < 2 else [tile + 2 * i for i in range(3)]
        weight = 2.0 ** np.asarray(m)[mine]
        right = (weight[..., None] * np.asarray(acc)[mine]).sum(0)
        right /= (weight * np.asarray(l)[mine]).sum(0)[..., None]
        here = slice(128 * (tile % 2), min(128 * (tile % 2) + 128, 200))
        got = out[tile // 2, here]
        np.testing.assert_allclose(got, right[: len(got)], rtol=1e-5)
