"""Kernels without a GPU: their references, what they refuse, and that they compile to GPU code.

Pallas cannot interpret inline GPU code, of which decoding consists, nor products with an operand in
registers, so numbers of the kernels themselves are in test_kernels_gpu.py, and without a GPU, by other
means, in test_kernels_numbers.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks import sanitize
from models.worldplay.history import side_by_side
from pallas_kernels.dequant_attention import (
    Schedule,
    finish,
    join,
    prepare,
    prepare_tokens,
    schedule_for,
    splits_for,
    visit,
)
from pallas_kernels.dequant_attention import reference as attention_reference
from pallas_kernels.dequantize import Encoded, Scheme, decode_keys, decode_values
from pallas_kernels.dequantize.reference import key_row_of_token
from qvg_jax import attention, kernel_plan, mosaic, presets, workspaces
from qvg_jax.attention import attend
from qvg_jax.cache import KVCache, evict
from qvg_jax.kernel_formats import encoded as encoded_of
from qvg_jax.kernel_formats import halves, pairing_of, scheme_of
from qvg_jax.kernel_plan import Plan
from qvg_jax.quantize.grid import grid_quantize
from qvg_jax.rope import Rope, axial_rope, frequency_ladder
from qvg_jax.sharding import attend_by_heads
from tests.kernel_cases import (
    E4M3,
    FORMATS,
    HALF,
    INTERLEAVED,
    codecs,
    encoded,
    encodings,
    filled_cache,
    positions,
    rope_of,
    turns,
    with_window_garbage,
)


def _lowered(f, *args) -> str:
    """The GPU program of f as text; Mosaic infers layouts and checks shared memory on the way."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


# -- decoding


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, E4M3], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decoding_compiles_to_one_kernel(name, dtype, head_dim):
    source, scheme = encoded(name, 8, 200, head_dim=head_dim)
    here = dict(rows=4, valid=200, dtype=dtype, unit_n=jnp.ones(4))
    for pairing in ("half", "interleaved"):
        text = _lowered(
            lambda s, i, t, p=pairing: decode_keys(
                s, scheme, first_row=i, tables=t, first_table=i, batch=2, pairing=p, **here
            ),
            source, jnp.int32(4), turns(0, 6, 200, head_dim),
        )  # fmt: skip
        assert text.count("mosaic_gpu") >= 1
    assert "mosaic_gpu" in _lowered(
        lambda s, i: decode_values(s, scheme, first_row=i, **here), source, jnp.int32(4)
    )


def test_the_reference_fills_the_workspace_with_zeros_and_never_reads_what_is_not_valid():
    x = jnp.full((3, 70, 128), jnp.nan, jnp.bfloat16).at[:, :50].set(2.0)
    here = dict(first_row=1, rows=2, valid=50, implementation="reference", unit_n=jnp.ones(2))
    keys = decode_keys(x, None, dtype=jnp.bfloat16, **here)
    assert keys.shape == (2, 256, 128)
    assert bool((keys[:, :50] == 2).all()) and bool((keys[:, 50:] == 0).all())
    values = decode_values(x, None, dtype=E4M3, **here)
    assert values.shape == (2, 128, 256)
    assert bool((values[:, :, :50].astype(jnp.float32) == 2).all())
    assert bool((values[:, :, 50:].astype(jnp.float32) == 0).all())


def test_keys_in_e4m3_lie_in_a_permutation_of_every_sixteen():
    rows = np.asarray(key_row_of_token(48))
    assert sorted(rows) == list(range(48))
    np.testing.assert_array_equal(rows // 16, np.arange(48) // 16)
    # The attention kernel turns rows back into tokens with this arithmetic.
    c = rows
    inside = ((c & 6) << 1) | ((c >> 2) & 2) | (c & 1)
    np.testing.assert_array_equal((c & -16) | inside, np.arange(48))


def test_units_make_e4m3_of_any_magnitude():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 128)), jnp.float32) * 1e-4
    unit = workspaces._unit(jnp.abs(x).max(axis=(1, 2)))
    here = dict(first_row=0, rows=2, valid=64, dtype=E4M3, implementation="reference")
    y = decode_values(x, None, unit_n=unit, **here).astype(jnp.float32) * unit[:, None, None]
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
            source, change.get("scheme", scheme), first_row=0, rows=2, valid=64,
            dtype=change.get("dtype", E4M3), unit_n=jnp.ones(2),
        )  # fmt: skip
    with pytest.raises(ValueError, match="implementation='cuda'"):
        decode_values(
            source, scheme, first_row=0, rows=2, valid=64, dtype=E4M3, unit_n=jnp.ones(2),
            implementation="cuda",
        )  # fmt: skip


# -- attention


def _exact(q, k, v):
    s = np.einsum("nqd,ntd->nqt", q, k) / 128**0.5
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("nqt,ntd->nqd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 5e-3), (E4M3, 6e-2)])
def test_segments_of_the_reference_are_one_softmax(dtype, bound):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, n, 128)).astype(np.float32) for n in (40, 700, 700))
    unit = jnp.asarray([0.5, 2.0])
    queries = prepare(jnp.asarray(q), jnp.float32(128**-0.5), dtype)
    state = attention_reference.empty(3, *queries.q_nQD.shape)
    for start, n in ((0, 300), (300, 0), (300, 400)):
        here = dict(first_row=0, rows=2, valid=n, dtype=dtype, implementation="reference")
        part = [jnp.asarray(x[:, start : start + max(n, 1)], jnp.bfloat16) for x in (k, v)]
        keys = decode_keys(part[0], None, unit_n=unit, **here)
        values = decode_values(part[1], None, unit_n=unit, **here)
        ones = unit if dtype == E4M3 else jnp.ones(2)
        state = attention_reference.segment(*queries, keys, values, n, ones, ones, state)
    out = np.asarray(finish(state, 40))
    right = _exact(q, k, v)
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
        return finish([r[...] for r in refs], 130)

    text = _lowered(f, q, k, v, jnp.int32(400), jnp.int32(2))
    assert text.count("output_operand_alias<") == 3


def test_what_the_sanitizer_runs_compiles():
    """Spans and new tokens behind each other, windows, schedules; the rest has tests of its own."""
    names = {name: (f, args) for name, f, args in sanitize.calls()}
    some = ("spans", "plain", "Schedule", "queries")
    some = [n for n in names if any(word in n for word in some)]
    assert len(some) == 39
    for name in some:
        f, args = names[name]
        assert "mosaic_gpu" in _lowered(f, *args)


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
    with pytest.raises(ValueError, match="one of 2 blocks"):
        visit(queries, good, good, 256, splits=Schedule(3, 0, 1))


def test_several_spans_must_have_whole_sixteens_and_windows_are_of_plain_tokens():
    source, scheme = encoded("qvg", 4, 200)
    here = dict(rows=2, valid=64, dtype=E4M3, unit_n=jnp.ones(2))
    with pytest.raises(ValueError, match="spans of 200 tokens"):
        decode_keys(source, scheme, first_row=jnp.asarray([0, 2]), **here)
    with pytest.raises(ValueError, match="window"):
        decode_values(source, scheme, first_row=0, window=(0, 64), **here)
    with pytest.raises(ValueError, match="into"):
        decode_values(source, scheme, first_row=0, into=(jnp.zeros((2, 128, 512), E4M3), 0), **here)


def test_splits_fill_the_chip_but_not_at_the_price_of_their_state():
    assert splits_for(12, 4680, 37_440, 3, True) == 2
    assert splits_for(32, 7800, 37_440, 1, True) == 1  # 15 waves are full enough
    assert 4 <= splits_for(12, 256, 32_768, 4, True) <= 16
    assert splits_for(1, 64, 512, 1, True) == 1  # too few keys to share


@pytest.mark.parametrize("blocks, whole, parts", [(444, 396, 5), (24, 0, 11), (7, 7, 3), (9, 4, 2)])
def test_pieces_of_a_schedule_cover_every_block_once(blocks, whole, parts):
    schedule = Schedule(blocks, whole, parts)
    block, part, of = (
        np.broadcast_to(x, (schedule.pieces,)) for x in schedule.place(jnp.arange(schedule.pieces))
    )
    assert sorted(block[:blocks]) == list(range(blocks))  # one of each comes first
    want = {(b, p, n) for b in range(blocks) for n in [1 if b < whole else parts] for p in range(n)}
    assert set(zip(block.tolist(), part.tolist(), of.tolist(), strict=True)) == want
    assert len(want) == schedule.pieces


def test_only_the_last_wave_is_shared():
    assert schedule_for(444, 37_440, 3, True) == Schedule(444, 396, 5)
    assert schedule_for(672, 42_240, 1, True) == Schedule(672, 660, 11)
    assert schedule_for(24, 32_768, 4, True).whole == 0
    assert schedule_for(264, 37_440, 1, True).pieces == 264  # two full waves


def test_pieces_are_joined_to_one_softmax():
    rng = np.random.default_rng(1)
    schedule = Schedule(4, 2, 3)
    acc, top, total = (
        jnp.asarray(rng.uniform(0.5, 2, (schedule.pieces, 128, *more)), jnp.float32)
        for more in ((8,), (), ())
    )
    out = np.asarray(join((acc, top, total), schedule, 2, 200)).reshape(2, 200, 8)
    for block in range(4):
        mine = [block] if block < 2 else [block + 2 * i for i in range(3)]
        weight = 2.0 ** np.asarray(top)[mine]
        right = (weight[..., None] * np.asarray(acc)[mine]).sum(0)
        right /= (weight * np.asarray(total)[mine]).sum(0)[..., None]
        here = slice(128 * (block % 2), min(128 * (block % 2) + 128, 200))
        got = out[block // 2, here]
        np.testing.assert_allclose(got, right[: len(got)], rtol=1e-5)


# -- attend on the kernels


def test_formats_are_recognised_by_what_decode_gives():
    want = {
        "qvg": Scheme(bits=2, group=64, offset=1, stages=1),
        "rtn": Scheme(bits=2, group=16, offset=1, stages=0),
        "midrise": Scheme(bits=2, group=128, offset=1.5, stages=1),
        "bf16": None,
    }
    for name, scheme in want.items():
        assert scheme_of(codecs()[name], 128) == scheme
    for codec in codecs()["midrise, int8 tables"]:
        assert scheme_of(codec, 128) == want["midrise"]
    bits = {n: [scheme_of(c, 128) for c in codecs()[n]] for n in ("midrise-k1v3", "midrise-1bit")}
    assert [(s.bits, s.offset) for s in bits["midrise-k1v3"]] == [(1, 0.5), (3, 3.5)]
    assert [(s.bits, s.stages) for s in bits["midrise-1bit"]] == [(1, 2)] * 2
    for codec in (grid_quantize(grid="lloyd_max"), presets.get("rtn", mode="asymmetric")):
        assert isinstance(scheme_of(codec, 128), str)
    assert "kmeans" not in scheme_of(presets.get("rtn", scale_dtype="bf16"), 128)


def test_two_heads_in_one_vector_are_two_rows_to_the_kernels():
    codec, head = side_by_side(presets.qvg(num_centroids=64)), presets.qvg(num_centroids=64)
    assert scheme_of(codec, 128, joined=2) == Scheme(bits=2, group=64, offset=1, stages=1)
    assert isinstance(scheme_of(codec, 128), str) and isinstance(scheme_of(head, 128, 2), str)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 64, 128)), jnp.bfloat16)
    packed, _ = jax.jit(codec.encode)(x, codec.init(x.shape, x.dtype))
    source = halves(packed)
    here = dict(first_row=0, rows=4, valid=64, dtype=jnp.bfloat16, unit_n=jnp.ones(4))
    rows = decode_keys(source, scheme_of(codec, 128, 2), implementation="reference", **here)
    np.testing.assert_array_equal(rows[:, :64], codec.decode(packed)[0])


def test_ropes_are_recognised_by_what_rotate_gives():
    assert pairing_of(HALF, 128, 3) == "half"
    assert pairing_of(INTERLEAVED, 128, 3) == "interleaved"
    other = Rope(lambda p: HALF.table(p), lambda x, t: HALF.rotate(x, t) * 2)
    assert pairing_of(other, 128, 3) is None
    assert pairing_of(Rope(lambda p: p, lambda x, t: x), 128, 3) is None


@pytest.mark.parametrize("narrow", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("precompute", [True, False], ids=["tables", "no tables"])
def test_attend_compiles_inside_a_scan_over_layers_and_copies_no_codes(narrow, precompute):
    codec = codecs()["midrise"]
    cache = jax.eval_shape(
        lambda: KVCache.create(
            layers=3, heads=2, head_dim=128, block_tokens=160, sink_blocks=1, span_blocks=2,
            max_spans=4, keep_recent=1, key_codec=codec, value_codec=codec,
        )
    )  # fmt: skip
    x, pos = jax.ShapeDtypeStruct((1, 160, 4, 128), jnp.bfloat16), positions(9, 160)
    kv = jax.ShapeDtypeStruct((1, 160, 2, 128), jnp.bfloat16)

    def model(q, cache, k, v, pos):
        view = cache.view(pos, HALF, precompute=precompute)
        read = lambda h, i: mosaic.attend_kernels(  # noqa: E731
            h, view, k, v, i, jnp.float32(0.1), narrow=narrow
        )
        return lax.scan(lambda h, i: (read(h, i), None), q, jnp.arange(3))[0]

    text = _lowered(model, x, cache, kv, kv, pos)
    # Codes of one span are 2 x 320 x 32 bytes. A slice of that size, of one layer, would be a copy.
    slices = [line for line in text.splitlines() if "dynamic_slice" in line]
    assert slices and not [line for line in slices if "320x32xui8" in line.split("->")[-1]]
    assert "tensor<24x320x32xui8>" in text  # 3 layers, 4 slots, 2 heads: all of them, uncut


def _visit_by_reference(
    queries, k, v, valid, *, k_unit_n=None, v_unit_n=None, state=None, splits=1, implementation
):
    """By the reference, which knows splits and puts all into the first one.

    Of a schedule those are the pieces that come first: one of every block of queries.
    """
    ones = jnp.ones(k.shape[0])
    units = [ones if u is None else u for u in (k_unit_n, v_unit_n)]
    n, padded_queries, d = queries.q_nQD.shape
    pieces = isinstance(splits, Schedule)
    if state is None:
        old = attention_reference.empty(1 if pieces else splits, n, padded_queries, d)
    elif pieces:
        old = [r[...][: splits.blocks].reshape(1, n, padded_queries, *r.shape[2:]) for r in state]
    else:
        old = [r[...] for r in state]
    new = attention_reference.segment(*queries, k, v, valid, *units, old)
    if pieces:
        rest = attention_reference.empty(1, splits.pieces - splits.blocks, 128, d)
        new = [x.reshape(-1, 128, *x.shape[3:]) for x in new]
        new = [jnp.concatenate([x, y[0]]) for x, y in zip(new, rest, strict=True)]
    if state is None:
        return tuple(new)
    for ref, x in zip(state, new, strict=True):
        ref[...] = x


@pytest.fixture
def references(monkeypatch):
    """attend_kernels with every kernel replaced by its reference: runs anywhere."""
    for name in ("decode_keys", "decode_values"):
        kernel = getattr(workspaces, name)
        by_reference = lambda *args, implementation, kernel=kernel, **more: kernel(  # noqa: E731
            *args, implementation="reference", **more
        )
        monkeypatch.setattr(workspaces, name, by_reference)
    by_reference = lambda *args, implementation, **more: prepare_tokens(  # noqa: E731
        *args, implementation="reference", **more
    )
    monkeypatch.setattr(mosaic, "prepare_tokens", by_reference)
    monkeypatch.setattr(mosaic, "visit", _visit_by_reference)


@pytest.mark.parametrize(
    "name, narrow, pairing, precompute, d",
    [
        ("qvg", False, "half", True, 128),
        ("rtn", True, None, True, 128),
        ("midrise", True, "interleaved", True, 128),
        ("midrise, int8 tables", True, "half", False, 128),
        ("bf16", False, "interleaved", False, 128),
        ("midrise-k1v3", True, "half", True, 128),
        ("midrise-1bit", True, "interleaved", False, 128),
        ("qvg", True, "interleaved", True, 64),
        ("midrise-k1v3", False, "half", True, 64),
        ("midrise, int8 tables", True, "half", True, 256),
        ("qvg", False, "interleaved", False, 256),
    ],
)
def test_the_way_from_cache_to_kernels_is_right(references, name, narrow, pairing, precompute, d):
    """Layers, slots of a ring that has turned, two query heads a head, a window with garbage."""
    rope = pairing and rope_of(pairing, d)
    cache = filled_cache(codecs()[name], blocks=9, block=64, head_dim=d)
    cache = evict(cache, spans=1)
    assert int(cache.first_span) == 1 and int(cache.num_spans) > 0
    cache = with_window_garbage(cache)
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((1, 64, 4, d)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((1, 64, 2, d)), jnp.bfloat16) for _ in range(2))
    view = cache.view(positions(9, 64), rope, precompute=precompute)
    assert mosaic.unsupported(view, q, narrow) is None
    _agrees_with_xla(view, q, k, v, narrow)


ODD = {
    "lloyd": grid_quantize(grid="lloyd_max"),
    "joined": tuple(map(side_by_side, presets.pair("midrise", num_centroids=64))),
}


@pytest.mark.parametrize(
    "name, narrow", [("qvg", False), ("midrise", True), ("lloyd", False), ("joined", True)]
)
def test_what_kernels_cannot_read_comes_into_their_workspace_by_xla(references, name, narrow):
    """Two encodings of one stored k and v; levels not equally spaced; two heads in a vector."""
    cache = with_window_garbage(filled_cache((codecs() | ODD)[name], blocks=9, block=64))
    rope, copies = (HALF, 1) if name in ODD else (encodings(), 2)
    view = cache.view(positions(9, 64) if copies == 1 else None, rope)
    shape = (1, 64, 2 * copies, 128)
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(3))
    assert mosaic.unsupported(view, q, narrow) is None
    _agrees_with_xla(view, q, k, v, narrow)
    if copies == 2 and narrow:  # units from a pass over what was encoded
        view = cache.view(None, rope._replace(growth=None))
        _agrees_with_xla(view, q, k, v, narrow)


def test_devices_that_share_the_heads_read_by_kernels(references, monkeypatch):
    """Also a codec and a rope whose forms are first met there: probing them is not part of it."""
    monkeypatch.setattr(attention, "is_hopper", lambda: True)
    rope = axial_rope([frequency_ladder(44, 100.0), *[frequency_ladder(42, 100.0)] * 2])
    cache = filled_cache(presets.get("qvg", num_centroids=48), blocks=9, block=64)
    view = cache.view(positions(9, 64), rope)
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 64, 2, 128)), jnp.bfloat16) for _ in range(3))
    right = attend(q, view, k, v, layer=1, implementation="xla").astype(jnp.float32)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        read = functools.partial(attend_by_heads, axis="heads", implementation="mosaic_fp8")
        ours = jax.jit(read)(q, view, k, v, layer=1).astype(jnp.float32)
    assert float(jnp.linalg.norm(ours - right) / jnp.linalg.norm(right)) < 6e-2


@pytest.mark.parametrize("narrow", [False, True], ids=["bf16", "e4m3"])
def test_branches_share_a_cache_and_keep_their_own_block(references, narrow):
    """Three branches in one call are three calls of one branch."""
    cache = with_window_garbage(filled_cache(codecs()["midrise"], blocks=9, block=64))
    view = cache.view(positions(9, 64), INTERLEAVED)
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((3, 64, 4, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((3, 64, 2, 128)), jnp.bfloat16) for _ in range(2))
    _agrees_with_xla(view, q, k, v, narrow)
    together = attend(q, view, k, v, layer=1, implementation="xla")
    for i in range(3):
        own = slice(i, i + 1)
        alone = attend(q[own], view, k[own], v[own], layer=1, implementation="xla")
        np.testing.assert_array_equal(together[own], alone)
    with pytest.raises(ValueError, match=r"k has shape \(2, 64, 2, 128\)"):
        attend(q, view, k[:2], v[:2], layer=1)


PLANS = {
    "looped": Plan(even=True, workspace=2 * 2 * 2 * 128 * 128 * 2),  # two bf16 spans of 128 tokens
    "looped, joined": Plan(workspace=2 * 2 * 2 * 128 * 128, joined=True),  # one of bf16
    "straight": Plan(even=True, workspace=2**18, unrolled=2, cut=True, joined=True),
    "straight, one by one": Plan(unrolled=4),
}


@pytest.mark.parametrize(
    "name, narrow, plan, precompute",
    [
        ("qvg", False, "looped", True),
        ("midrise", True, "looped", False),
        ("midrise, int8 tables", True, "straight", True),
        ("bf16", False, "straight", False),
        ("qvg", True, "straight, one by one", True),
        ("qvg", False, "looped, joined", False),
        ("midrise-k1v3", True, "looped, joined", True),
    ],
)
def test_plans_change_nothing_but_rounding(references, monkeypatch, name, narrow, plan, precompute):
    """Spans behind each other, the last group not full, a slot that is not valid; cut windows."""
    monkeypatch.setattr(kernel_plan, "_LEAST_BYTES", 1)
    cache = filled_cache(codecs()[name], blocks=9, block=64, max_spans=4)
    cache = with_window_garbage(evict(cache, spans=1))
    assert int(cache.first_span) == 1 and int(cache.num_spans) == 2
    view = cache.view(positions(9, 64), HALF, precompute=precompute)
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((1, 64, 4, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((1, 64, 2, 128)), jnp.bfloat16) for _ in range(2))
    parts = PLANS[plan].dense_parts(cache.layout, 2, E4M3 if narrow else jnp.bfloat16)
    assert (len(parts) > 1) == (plan == "straight")
    _agrees_with_xla(view, q, k, v, narrow, PLANS[plan])


def _agrees_with_xla(view, q, k, v, narrow, plan=kernel_plan.MEASURED):
    right = attend(q, view, k, v, layer=1, implementation="xla")
    ours = jax.jit(functools.partial(mosaic.attend_kernels, narrow=narrow, plan=plan))(
        q, view, k, v, jnp.int32(1), jnp.float32(q.shape[3] ** -0.5)
    )
    assert ours.shape == right.shape and ours.dtype == right.dtype
    error = jnp.linalg.norm((ours - right).astype(jnp.float32))
    bound = 6e-2 if narrow else 1e-2
    assert float(error / jnp.linalg.norm(right.astype(jnp.float32))) < bound


def test_attend_names_what_is_missing_for_a_named_kernel():
    cache = filled_cache(codecs()["qvg"], layers=1, blocks=2)
    q = jnp.zeros((1, 96, 2, 128), jnp.bfloat16)
    args = dict(positions=positions(2, 96), rope=HALF)
    with pytest.raises(ValueError, match="implementation='cuda'"):
        attend(q, cache, q, q, implementation="cuda", **args)
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="Hopper.*'xla' serves it"):
            attend(q, cache, q, q, implementation="mosaic", **args)
    view = cache.view(positions(2, 96), HALF)
    assert mosaic.unsupported(view, q, narrow=True) is None
    assert "float32" in mosaic.unsupported(view, q.astype(jnp.float32), narrow=True)
    plain = filled_cache(codecs()["bf16"], layers=1, blocks=2).view(positions(2, 96), HALF)
    assert mosaic.unsupported(plain, q, narrow=False) is None
    assert "bound" in mosaic.unsupported(plain, q, narrow=True)
    odd = filled_cache(codecs()["bf16"], layers=1, blocks=2, head_dim=96).view(None, None)
    assert "64, 128, 256" in mosaic.unsupported(odd, q, narrow=False)


def test_naming_xla_changes_nothing_and_hidden_garbage_stays_hidden():
    cache = with_window_garbage(filled_cache(codecs()["midrise"], layers=1))
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 96, 2, 128)), jnp.bfloat16)
    args = dict(positions=positions(7, 96), rope=INTERLEAVED)
    named = attend(q, cache, q, q, implementation="xla", **args)
    assert bool(jnp.isfinite(named.astype(jnp.float32)).all())
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(named, attend(q, cache, q, q, **args))


def test_e4m3_adds_little_to_the_error_of_two_bits():
    """Of attention output: less than a tenth on top (emulated; products in float32)."""
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((40, 128))
    shape = (1, 2, 1024)
    k, v = (
        jnp.asarray(centres[rng.integers(0, 40, shape)] + 0.3 * rng.standard_normal((*shape, 128)))
        .astype(jnp.bfloat16)
        for _ in range(2)
    )  # fmt: skip
    q = jnp.asarray(rng.standard_normal((2, 64, 128)), jnp.float32)
    codec = codecs()["qvg"]
    packed = [jax.jit(codec.encode)(x, codec.init(x.shape, x.dtype))[0] for x in (k, v)]
    exact = _exact(*(np.asarray(x, np.float32) for x in (q, k[0], v[0])))
    stored = _exact(np.asarray(q), *(np.asarray(codec.decode(p, jnp.float32)[0]) for p in packed))
    unit = jnp.full(2, 2.0**-5)
    sources = [encoded_of(p) for p in packed]
    here = dict(first_row=0, rows=2, valid=1024, dtype=E4M3, unit_n=unit)
    scheme = scheme_of(codec, 128)
    keys = decode_keys(sources[0], scheme, implementation="reference", **here)
    values = decode_values(sources[1], scheme, implementation="reference", **here)
    queries = prepare(q, jnp.float32(128**-0.5), E4M3)
    state = attention_reference.empty(1, *queries.q_nQD.shape)
    state = attention_reference.segment(*queries, keys, values, 1024, unit, unit, state)
    narrow = np.asarray(finish(state, 64))
    error = lambda x: np.linalg.norm(x - exact)  # noqa: E731
    assert error(narrow) < 1.1 * error(stored)
