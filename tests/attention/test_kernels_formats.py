"""`attend` on the kernels: which codecs and ropes they know, what they refuse, and that it compiles with them.

What e4m3 adds to the error of two bits is here too.
"""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from models.common.wan_rope import wan_rope
from models.longcat.rope import longcat_rope
from models.pocket_world.config import PocketWorldConfig
from models.worldplay.history import side_by_side
from pallas_kernels.dequant_attention import combine_splits, prepare
from pallas_kernels.dequant_attention import reference as attention_reference
from pallas_kernels.dequantize import Rotation, Scheme, Spans, Tokens, decode_keys, decode_values
from pallas_kernels.dequantize.reference import decoded
from qvg_jax.attention import kernels as mosaic
from qvg_jax.attention.api import attend
from qvg_jax.attention.formats import encoded as encoded_of
from qvg_jax.attention.formats import halves, scheme_of
from qvg_jax.cache.rope import Rope
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import identity
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.quantize import (
    dithered_quantize,
    grid_quantize,
    heads_as_tokens,
    minmax_quantize,
    residual_quantize,
)
from qvg_jax.codecs.smoothing import KMeansPacked, kmeans_smoothing
from tests.support.kernel_cases import (
    E4M3,
    HALF,
    INTERLEAVED,
    codecs,
    exact_attention,
    filled_cache,
    form_of_cache,
    lowered,
    positions,
    rope_of,
    with_window_garbage,
)


def test_declared_storage_becomes_a_scheme():
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
    dithered = Scheme(2, 128, 2 - 1 / 128, 1, dithered=True, deviations=True)
    for name, scheme in (
        ("dither", dithered),
        ("dither-asym", dataclasses.replace(dithered, zero_points=True)),
        ("qvg-asym", Scheme(2, 128, 0, 1, zero_points=True)),
    ):
        assert [scheme_of(codec, 128) for codec in presets.pair(name)] == [scheme] * 2
    assert isinstance(scheme_of(grid_quantize(grid="lloyd_max"), 128), str)
    assert "kmeans" not in scheme_of(presets.get("rtn", scale_dtype="bf16"), 128)
    assert scheme_of(presets.get("bf16"), 128) is None
    for name in ("bf16", "rtn"):
        assert scheme_of(presets.get(name), 96) == "head_dim=96; it must be 64, 128 or 256"


def test_two_heads_in_one_vector_are_two_rows_to_the_kernels():
    codec, head = side_by_side(presets.qvg(num_centroids=64)), presets.qvg(num_centroids=64)
    assert scheme_of(codec, 128, joined=2) == Scheme(bits=2, group=64, offset=1, stages=1)
    assert isinstance(scheme_of(codec, 128), str) and isinstance(scheme_of(head, 128, 2), str)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 64, 128)), jnp.bfloat16)
    packed, _ = jax.jit(codec.encode)(x, codec.init(x.shape, x.dtype))
    source = halves(packed)
    here = dict(valid=64, dtype=jnp.bfloat16, implementation="reference")
    rows = decode_keys(Spans(source, scheme_of(codec, 128, 2), 0, 4), **here)
    np.testing.assert_array_equal(rows[:, :64], codec.decode(packed)[0])


ROPES = {
    "half": HALF,
    "interleaved": INTERLEAVED,
    "of Wan": wan_rope(128),
    "of LongCat": longcat_rope(128),
    "of pocket world": PocketWorldConfig().rope(),
}


@pytest.mark.parametrize("name", ROPES)
def test_ropes_turn_the_channels_that_they_declare(name):
    """Random tables mean the same to `rotate` and to the kernels' reference."""
    rope, rng = ROPES[name], np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    dims = 3 if name != "of pocket world" else 4
    form = jax.eval_shape(rope.table, jnp.zeros((1, 4, dims)))
    assert isinstance(form, tuple) and [f.shape for f in form] == [(1, 4, 64)] * 2
    x, tables = draw(1, 1, 4, 128), (draw(1, 4, 64), draw(1, 4, 64))
    theirs = rope.rotate(x, jax.tree.unflatten(jax.tree.structure(form), tables))[0]
    here = dict(valid=4, dtype=jnp.bfloat16, implementation="reference")
    turned = {
        pairing: decode_keys(Tokens(x[0], 0, 1), rotation=Rotation(tables, pairing), **here)[:, :4]
        for pairing in ("half", "interleaved")
    }
    agree = {p: np.allclose(y, theirs, rtol=1e-2, atol=2e-2) for p, y in turned.items()}
    assert agree == {p: p == rope.pairing for p in turned}


def test_ropes_are_values():
    assert HALF == rope_of("half", 128) != INTERLEAVED and hash(HALF) == hash(rope_of("half", 128))
    assert pickle.loads(pickle.dumps(HALF)) == HALF and wan_rope(128) == wan_rope(128, rows=1024)
    by_hand = Rope(lambda p: p, lambda x, t: x)
    assert by_hand.pairing is None and by_hand != Rope(lambda p: p, lambda x, t: x)


def random_bytes(form, seed=0):
    """Arrays of a packed form: any codes, scales between a half and two, ids within the table."""
    rng = np.random.default_rng(seed)

    def fill(x):
        if x.dtype == E4M3:
            return jnp.asarray(rng.uniform(0.5, 2.0, x.shape), jnp.float32).astype(E4M3)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(x.shape), jnp.float32).astype(x.dtype)
        low, high = (-2, 3) if x.dtype == jnp.int8 else (0, 256)
        return jnp.asarray(rng.integers(low, high, x.shape), x.dtype)

    packed = jax.tree.map(fill, form)
    if type(packed) is tuple and isinstance(packed[0], KMeansPacked):
        ids = packed[0].ids_BHST % packed[0].centroids_BHSKD.shape[3]
        packed = (packed[0]._replace(ids_BHST=ids), *packed[1:])
    return packed


SMALL = dict(num_centroids=24)
DECLARED = {
    **{
        f"{name}, {part}": codec
        for name in [*presets.PRESETS, *presets.PAIRS]
        for part, codec in zip(
            ("keys", "values"),
            presets.pair(
                name, **(SMALL if name.startswith(("qvg", "midrise", "auto", "dither")) else {})
            ),
            strict=True,
        )
    },
    "normalized": residual_quantize(4, 32, normalize=True),
    "seven levels": grid_quantize(levels=7),
    "nine levels, groups": grid_quantize(levels=9, group=32),
    "8 bits": chain(kmeans_smoothing(24, stages=2, centroid_dtype="e4m3"), grid_quantize(8)),
    "f32 centroids": chain(kmeans_smoothing(24, centroid_dtype="f32"), residual_quantize(8, 128)),
    "side by side": side_by_side(presets.qvg(num_centroids=24)),
    "side by side, one scale": side_by_side(presets.pair("midrise", num_centroids=24)[0]),
    "side by side, dithered": side_by_side(presets.pair("dither-asym", num_centroids=24)[0]),
    "from the smallest to the largest": minmax_quantize(4, 32, "token", scale_dtype="e4m3"),
    "dithered, 4 bits": dithered_quantize(4),
}
READ = {
    "qvg", "qvg-4bit", "qvg-pro", "qvg-pro-4bit", "rtn", "rtn-4bit", "auto", "midrise",
    "midrise-k1v3", "midrise2", "midrise-1bit", "normalized", "seven levels",
    "nine levels, groups", "8 bits", "f32 centroids", "side by side", "side by side, one scale",
    "qvg-asym", "dither", "dither-asym", "side by side, dithered", "dithered, 4 bits",
    "from the smallest to the largest",
}  # fmt: skip


@pytest.mark.parametrize("name", DECLARED)
def test_the_declared_storage_decodes_as_the_codec_does(name):
    """Random bytes mean the same to `decode` and to the kernels' reference with the declaration."""
    codec = DECLARED[name]
    joined = codec.storage.heads
    scheme = scheme_of(codec, 128, joined)
    if isinstance(scheme, str) or scheme is None:
        whole = name.partition(", ")[0]
        assert name not in READ and whole not in READ and (scheme is None) == (whole == "bf16")
        return
    x = jax.ShapeDtypeStruct((1, 2, 48, 128), jnp.bfloat16)
    form = jax.eval_shape(lambda x: codec.encode(x, codec.init(x.shape, x.dtype))[0], x)
    packed = random_bytes(form)
    source = encoded_of(packed) if joined == 1 else halves(packed)
    ours = decoded(Spans(source, scheme, 0, 2))
    theirs = codec.decode(packed, jnp.float32)[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("codec", "part"),
    [
        (presets.get("quarot"), "the smoothing 'hadamard' in front of the codes"),
        (presets.pair("kivi")[0], "zero points of a channel"),
        (presets.pair("kivi")[1], "bf16 scales"),
        (presets.get("rtn", scale_dtype="f32"), "f32 scales"),
        (grid_quantize(scale_dtype="bf16"), "bf16 scales"),
        (grid_quantize(grid="lloyd_max"), "lloyd_max levels, which are not equally spaced"),
        (grid_quantize(levels=3), "digits of base 3"),
        (presets.get("nvfp4"), "E2M1 values"),
        (presets.pair("kmeans-e8")[0], "points of a lattice"),
        (presets.pair("klt")[0], "the smoothing 'klt"),
        (heads_as_tokens(grid_quantize()), "all heads as tokens of one"),
        (chain(*[kmeans_smoothing(4)] * 2, grid_quantize()), "2 k-means in a row"),
        (chain(kmeans_smoothing(4), chain(grid_quantize())), "a chain inside the chain"),
        (chain(kmeans_smoothing(4), identity()), "plain values in bf16 behind k-means"),
        (chain(kmeans_smoothing(300), grid_quantize()), "at most 256 centroids"),
        (identity("f32"), "plain values in f32"),
        (grid_quantize(group=4), "group=4"),
        (dataclasses.replace(grid_quantize(), storage=None), "no storage is declared"),
        (side_by_side(grid_quantize()), "2 heads in one vector, not 1"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_kernels_do_not_read_is_named(codec, part):
    why = scheme_of(codec, 128)
    assert isinstance(why, str) and part in why


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("precompute", [True, False], ids=["tables", "no tables"])
def test_attend_compiles_inside_a_scan_over_layers_and_copies_no_codes(fp8, precompute):
    cache = form_of_cache(codecs()["midrise"])
    x, pos = jax.ShapeDtypeStruct((1, 160, 4, 128), jnp.bfloat16), positions(9, 160)
    kv = jax.ShapeDtypeStruct((1, 160, 2, 128), jnp.bfloat16)

    def model(q, cache, k, v, pos):
        view = cache.view(pos, HALF, precompute=precompute)
        read = lambda h, i: mosaic.attend_kernels(  # noqa: E731
            h, view, k, v, i, jnp.float32(0.1), fp8=fp8
        )
        return lax.scan(lambda h, i: (read(h, i), None), q, jnp.arange(3))[0]

    text = lowered(model, x, cache, kv, kv, pos)
    # Codes of one span are 2 x 320 x 32 bytes. A slice of that size, of one layer, would be a copy.
    slices = [line for line in text.splitlines() if "dynamic_slice" in line]
    assert slices and not [line for line in slices if "320x32xui8" in line.split("->")[-1]]
    assert "tensor<24x320x32xui8>" in text  # 3 layers, 4 slots, 2 heads: all of them, uncut


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
    assert mosaic.unsupported(view, q, fp8=True) is None
    assert "float32" in mosaic.unsupported(view, q.astype(jnp.float32), fp8=True)
    plain = filled_cache(codecs()["bf16"], layers=1, blocks=2).view(positions(2, 96), HALF)
    assert mosaic.unsupported(plain, q, fp8=False) is None
    assert "bound" in mosaic.unsupported(plain, q, fp8=True)
    odd = filled_cache(codecs()["bf16"], layers=1, blocks=2, head_dim=96).view(rope=False)
    assert "64, 128, 256" in mosaic.unsupported(odd, q, fp8=False)


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
    exact = exact_attention(*(np.asarray(x, np.float32) for x in (q, k[0], v[0])))
    stored = exact_attention(
        np.asarray(q), *(np.asarray(codec.decode(p, jnp.float32)[0]) for p in packed)
    )
    scale = jnp.full(2, 2.0**-5)
    spans = [Spans(encoded_of(p), scheme_of(codec, 128), 0, 2) for p in packed]
    here = dict(valid=1024, dtype=E4M3, scale_n=scale, implementation="reference")
    keys, values = decode_keys(spans[0], **here), decode_values(spans[1], **here)
    queries = prepare(q, jnp.float32(128**-0.5), E4M3)
    state = attention_reference.empty(1, *queries.q_nQD.shape)
    state = attention_reference.segment(*queries, keys, values, 1024, scale, scale, state)
    fp8 = np.asarray(combine_splits(state, 64))
    error = lambda x: np.linalg.norm(x - exact)  # noqa: E731
    assert error(fp8) < 1.1 * error(stored)
