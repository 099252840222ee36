"""Encoding kernels without a GPU: in Pallas' interpreter against their references, and compiled.

Numbers on a GPU are in test_kernels_encode_gpu.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import kmeans, quantize_pack
from pallas_kernels.kmeans import Metric, Tuning, kmeans_sums
from pallas_kernels.kmeans.api import parts_for
from pallas_kernels.quantize_pack import (
    Dithered,
    Integers,
    Midrise,
    assign_and_pack,
    assign_and_subtract,
    pack_dithered,
)
from pallas_kernels.quantize_pack import mosaic_gpu as pack_mosaic_gpu
from qvg_jax.codecs import compose, kernel_encoding, presets
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.quantize.dithered import dithered_quantize
from qvg_jax.codecs.quantize.grid import grid_quantize
from qvg_jax.codecs.quantize.integer import residual_quantize
from qvg_jax.codecs.smoothing import kmeans_smoothing, rotation
from qvg_jax.codecs.smoothing.kmeans import subsample_tokens
from tests.support.kernel_cases import ENCODERS, clustered, encoded_twice, lowered, round_trip_error
from tests.support.pallas_interpreter import interpreted_encoding


@pytest.fixture
def interpreted(monkeypatch):
    with interpreted_encoding(monkeypatch):
        yield


# -- k-means


@pytest.mark.parametrize(
    "tokens, clusters, parts, tuning, equal",
    [
        (300, 256, 2, Tuning(), False),
        (100, 40, 1, Tuning(), True),
        (130, 40, 2, Tuning(stages=3, columns=64), True),
    ],
    ids=["two parts", "one tile, by a metric", "other sizes, by a metric"],
)
def test_sums_equal_the_reference(interpreted, tokens, clusters, parts, tuning, equal):
    """A partial last tile, fewer centroids than the table holds, several CTAs per row; by a metric."""
    x, c = clustered(2, tokens, clusters)
    here = dict(scores=True, metric=metric_of(x) if equal else None)
    right = kmeans_sums(x, c, implementation="xla", **here)
    ours = kmeans_sums(x, c, parts=parts, tuning=tuning, **here)
    np.testing.assert_array_equal(ours.ids_RT, right.ids_RT)
    np.testing.assert_array_equal(ours.number_RK, right.number_RK)
    np.testing.assert_allclose(ours.total_RKD, right.total_RKD, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.score_RT, right.score_RT, rtol=2**-14, atol=1e-6)
    assert int(right.number_RK.sum()) == 2 * tokens


def metric_of(x):
    """The mean of every channel, and a size near its deviation."""
    x = x.astype(jnp.float32)
    centre = jnp.mean(x, axis=1)
    share = np.random.default_rng(0).uniform(0.5, 2, centre.shape).astype(np.float32)
    return Metric(centre, jnp.mean(jnp.abs(x - centre[:, None]), axis=1) * share)


def test_a_metric_measures_channels_by_their_sizes():
    """The nearest by numpy, with a loud channel that is far from zero; distances come from the scores."""
    loud = lambda a: a.astype(jnp.float32).at[..., 3].multiply(50).at[..., 3].add(900)  # noqa: E731
    x, c = map(loud, clustered(1, 90, 30))
    x = x.astype(jnp.bfloat16)
    metric = metric_of(x)
    sums = kmeans_sums(x, c, scores=True, metric=metric, implementation="xla")
    size, centre = (np.asarray(a, np.float64)[0] for a in (metric.size_RD, metric.centre_RD))
    x, c = np.asarray(x, np.float64)[0], np.asarray(c, np.float64)[0]
    distance_TK = np.square((x[:, None] - c) / size).sum(-1)
    got_T = distance_TK[np.arange(90), np.asarray(sums.ids_RT)[0]]
    np.testing.assert_allclose(got_T, distance_TK.min(1), rtol=2e-2)
    told_T = np.square((x - centre) / size).sum(-1) - 2 * np.asarray(sums.score_RT)[0]
    np.testing.assert_allclose(told_T, got_T, rtol=2e-2)


def test_a_token_of_zeros_finds_the_centroid_at_zero(interpreted):
    """Its score is zero, which has no bits to spare for a centroid's number."""
    x, c = clustered(1, 64, 20)
    x, c = x.at[0, 5].set(0), c.at[0, 7].set(0)
    assert int(kmeans_sums(x, c, scores=True).ids_RT[0, 5]) == 7


def test_not_finite_tokens_show_in_the_sums():
    """What the codec relies on to find them without a pass of its own."""
    x, c = clustered(2, 100, 30)
    sums = kmeans_sums(x.at[1, 3, 4].set(jnp.nan), c, implementation="xla")
    np.testing.assert_array_equal(jnp.isfinite(sums.total_RKD).all((1, 2)), [True, False])


def test_blocks_fill_the_gpu():
    assert parts_for(32, 29_640) == 4 and parts_for(12, 37_440) == 11
    assert parts_for(1, 1) == 1 and parts_for(400, 128) == 1
    with pytest.raises(ValueError, match="parts=4; accepted: 1 to 3"):
        kmeans_sums(*clustered(1, 300, 8), parts=4)


# -- the last pass


@pytest.mark.parametrize(
    "form, equal",
    [
        (Integers(2, 64), False),
        (Integers(4, 16), False),
        (Integers(2, 128, zero_points=True), True),
        (Midrise(2, 0.9957, 2, recode=True), False),
        (Midrise(1, 1.5958, 1, recode=False), False),
    ],
    ids=str,
)
def test_packing_equals_the_reference(interpreted, form, equal):
    x, c = clustered(1, 140, 256)
    x = x.at[0, 9].set(c[0, 3])  # nothing is left of it
    x = x.at[0, 10].set(c[0, 4] + 2.0**-9)  # a scale among e4m3's smallest
    metric = metric_of(x) if equal else None
    right = assign_and_pack(x, c, form, metric=metric, implementation="xla")
    ours = assign_and_pack(x, c, form, metric=metric)
    np.testing.assert_array_equal(ours[0], right[0])
    assert (np.asarray(ours[1]) != np.asarray(right[1])).mean() < 1e-3  # ties
    if isinstance(form, Integers):
        for mine, want in zip(ours[2:], right[2:], strict=True):
            np.testing.assert_array_equal(mine, want)
    else:
        np.testing.assert_allclose(ours[2], right[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", [Dithered(2, 3.75, False), Dithered(4, 15.5, True)], ids=str)
def test_packing_on_dithered_levels_equals_the_reference(interpreted, form):
    """Tokens of a second tile and a second CTA, channels of other sizes, a token of zeros."""
    r = jnp.asarray(np.random.default_rng(0).standard_normal((2, 300, 128)), jnp.bfloat16)
    r = r.at[1, 9].set(0).at[1, 10].multiply(2.0**-9)
    factor = jnp.asarray(np.random.default_rng(1).uniform(0.1, 10, (2, 128)), jnp.float32)
    right = pack_dithered(r, factor, form, implementation="xla")
    ours = pack_dithered(r, factor, form, parts=2)
    assert (np.asarray(ours[0]) != np.asarray(right[0])).mean() < 1e-3  # ties
    np.testing.assert_allclose(ours[1], right[1], rtol=1e-4)


def test_codes_of_one_bit_are_written_in_whole_tiles():
    """Their copies end with the array and not with a row: there must be room for a last tile."""
    x, c = clustered(2, 140, 256)
    x, bias = jnp.pad(x, ((0, 0), (0, 4), (0, 0))), c[..., 0].astype(jnp.float32)
    for bits, tokens in ((1, 256), (2, 144)):
        form = Midrise(bits, 1.0, 2, recode=False)
        here = dict(tokens=140, parts=1, tuning=Tuning())
        encode = functools.partial(pack_mosaic_gpu.encode, form=form, **here)
        codes = jax.eval_shape(encode, x, c, bias)[1]
        assert codes.shape == (2, tokens, 16 * bits)


def test_the_residual_equals_the_reference(interpreted):
    x, c = clustered(1, 128, 100)
    here = dict(metric=metric_of(x))
    for ours, right in zip(
        assign_and_subtract(x, c, **here),
        assign_and_subtract(x, c, implementation="xla", **here),
        strict=True,
    ):
        assert ours.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(right, np.float32))


def test_kernels_compile_to_gpu_code():
    x, c = clustered(2, 300, 256)
    assert "mosaic_gpu" in lowered(lambda x, c: kmeans_sums(x, c, scores=True), x, c)
    metric = Metric(c[:, 0].astype(jnp.float32), jnp.ones((2, 128)))
    for m in (None, metric):
        assert "mosaic_gpu" in lowered(lambda x, c, m=m: assign_and_subtract(x, c, metric=m), x, c)
    forms = Integers(2, 16), Integers(2, 64, zero_points=True), Midrise(2, 1.0, 2, recode=True)
    for form, m in ((Integers(4, 128), metric), *((f, None) for f in forms)):
        pack = functools.partial(assign_and_pack, form=form)
        assert "mosaic_gpu" in lowered(lambda x, c, p=pack, m=m: p(x, c, metric=m), x, c)
    for form in (Dithered(2, 3.75, False), Dithered(4, 15.5, True)):
        pack = functools.partial(pack_dithered, form=form)
        assert "mosaic_gpu" in lowered(pack, x, jnp.ones((2, 128)))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=jnp.zeros((2, 9, 64), jnp.bfloat16)), ValueError, r"\(2, 9, 64\)"),
        (dict(x=jnp.zeros((2, 9, 128), jnp.float32)), NotImplementedError, "float32.*'xla'"),
        (dict(c=jnp.zeros((2, 300, 128))), NotImplementedError, "300 centroids.*'xla'"),
        (dict(implementation="cuda"), ValueError, "implementation='cuda'"),
        (dict(form=Integers(3, 64)), NotImplementedError, "bits=3"),
        (dict(form=Integers(2, 4)), NotImplementedError, "group=4"),
    ],
)
def test_bad_input_is_named(change, error, message):
    x, c = clustered(2, 9, 4)
    args = dict(x=x, c=c, form=Integers(2, 64), implementation="mosaic") | change
    with pytest.raises(error, match=message):
        assign_and_pack(args["x"], args["c"], args["form"], implementation=args["implementation"])


# -- the codec


@pytest.fixture
def references(monkeypatch):
    """Codecs encode as on a Hopper GPU, with every kernel replaced by its reference."""
    monkeypatch.setattr(compose, "no_hopper", lambda: None)
    for module, name in (
        (kmeans, "kmeans_sums"),
        (kmeans, "assign"),
        (quantize_pack, "pack_dithered"),
        (quantize_pack, "assign_and_pack"),
        (quantize_pack, "assign_and_subtract"),
    ):
        kernel = getattr(module, name)
        by_reference = lambda *args, implementation, kernel=kernel, **more: kernel(  # noqa: E731
            *args, implementation="xla", **more
        )
        monkeypatch.setattr(module, name, by_reference)


# The others' parts are in other tests here, and they as a whole on a GPU.
@pytest.mark.parametrize(
    "name", [n for n in ENCODERS if n not in ("1 bit keys", "dither-asym values", "qvg-asym")]
)
def test_codecs_encode_as_well_on_the_kernels(references, name):
    """Two spans, the second one warm: the same arrays, and as small an error."""
    codec = ENCODERS[name]()
    ours, right = (encoded_twice(codec, implementation) for implementation in ("mosaic", "xla"))
    # A difference in rounding may lead a second span to another local optimum.
    for a, b, most in zip(ours, right, (1.002, 1.03), strict=True):
        forms = [jax.tree.map(lambda y: (y.shape, y.dtype), x) for x in (a[1:], b[1:])]
        assert forms[0] == forms[1] and jax.tree.structure(a) == jax.tree.structure(b)
        assert round_trip_error(codec, a) < most * round_trip_error(codec, b)


@pytest.mark.parametrize(
    "quantizer, equalize",
    [
        (residual_quantize(4, 64, "asymmetric"), False),
        (dithered_quantize(2, gain=0.5), True),
        (dithered_quantize(4, asymmetric=True), False),
        (dithered_quantize(3), True),  # not a kernel's
    ],
    ids=lambda q: getattr(q, "name", None),
)
def test_kernels_write_the_bytes_of_the_codec(references, monkeypatch, quantizer, equalize):
    """They, or XLA, encode what is left of the nearest centroids as the codec does."""
    monkeypatch.setattr(kernel_encoding, "_SIZES_FROM", 64)  # of the 200
    codec = chain(kmeans_smoothing(32, iters=1, equalize=equalize), quantizer)
    x = clustered(2, 200, 32)[0][None].at[0, 1, :, 5].multiply(2.0**9)
    encode = jax.jit(functools.partial(codec.encode, implementation="mosaic"))
    (nodes, packed), state = encode(x, codec.init(x.shape, x.dtype))
    table_BHKD = nodes.centroids_BHSKD[:, :, 0].astype(jnp.float32)
    picked = jnp.take_along_axis(table_BHKD, nodes.ids_BHST[:, :, 0, :, None].astype(int), axis=2)
    r = x.astype(jnp.float32) - picked
    if quantizer.storage.codes.dithered and quantizer.storage.codes.bits != 3:
        r = r.astype(jnp.bfloat16)
    want, _ = quantizer.encode(r, state[1])
    jax.tree.map(np.testing.assert_array_equal, packed, want)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e30])
@pytest.mark.parametrize("recipe", ["qvg", "dither"])
def test_a_bad_entry_counts_as_zero(references, recipe, value):
    """Also one that no iteration but the last looks at."""
    codec = presets.pair(recipe, num_centroids=16, subsample=2)[0]
    unseen = np.setdiff1d(np.arange(300), subsample_tokens(300, 16, 2))[5]
    x = clustered(2, 300, 64)[0][None]
    state = codec.init(x.shape, x.dtype)
    encode = jax.jit(functools.partial(codec.encode, implementation="mosaic"))
    ours, right = (encode(x.at[0, 1, unseen, 4].set(e), state) for e in (value, 0))
    jax.tree.map(np.testing.assert_array_equal, ours, right)
    assert np.isfinite(np.asarray(codec.decode(ours[0]), np.float32)).all()


def test_a_state_of_other_settings_is_named(references):
    codec, other = (presets.get("qvg", num_centroids=n) for n in (16, 8))
    x = clustered(2, 64, 16)[0][None]
    with pytest.raises(
        ValueError, match=r"state has arrays of shapes .*8, 128.*16, 128.*accepted: init"
    ):
        codec.encode(x, other.init(x.shape, x.dtype), implementation="mosaic")


def test_spare_centroids_move_to_badly_served_tokens(references):
    """Content that changed: the old centroids attract little, and restart."""
    x, _ = clustered(1, 600, 64)
    spans = x[None, :, :300], x[None, :, 300:] * 3 + 5
    errors = {}
    for reseed in (True, False):
        codec = chain(kmeans_smoothing(64, reseed=reseed), residual_quantize())
        state = codec.init(spans[0].shape, x.dtype)
        encode = jax.jit(functools.partial(codec.encode, implementation="mosaic"))
        for span in spans:
            packed, state = encode(span, state)
        errors[reseed] = round_trip_error(codec, (spans[1], packed))
    assert errors[True] < 0.9 * errors[False]


def test_a_named_implementation_is_that_one_or_an_error(monkeypatch):
    x = clustered(1, 64, 8)[0][None]

    def encode(codec, implementation="mosaic", x=x):
        return codec.encode(x, codec.init(x.shape, x.dtype), implementation=implementation)

    with pytest.raises(ValueError, match="implementation='cuda'"):
        encode(presets.get("qvg", num_centroids=8), "cuda")
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="Hopper.*'xla' serves it"):
            encode(presets.get("qvg", num_centroids=8))
    monkeypatch.setattr(compose, "no_hopper", lambda: None)
    smoothing = kmeans_smoothing(8)
    for codec, message in (
        (chain(rotation(), grid_quantize()), "hadamard"),
        (chain(kmeans_smoothing(8, centroid_dtype="float32"), residual_quantize()), "f32"),
        (chain(smoothing, smoothing, residual_quantize()), "one kmeans_smoothing"),
        (chain(residual_quantize()), "one kmeans_smoothing"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            encode(codec)
        jax.eval_shape(lambda c=codec: encode(c, None))  # XLA serves it
    with pytest.raises(NotImplementedError, match="float32"):
        encode(chain(smoothing, residual_quantize()), x=x.astype(jnp.float32))


def test_a_span_compiles_to_kernels(monkeypatch):
    """Warm or cold is data; heads may be mapped over layers."""
    monkeypatch.setattr(compose, "no_hopper", lambda: None)
    codec = ENCODERS["midrise values"]()
    x = jax.ShapeDtypeStruct((3, 1, 2, 300, 128), jnp.bfloat16)
    state = jax.eval_shape(jax.vmap(lambda x: codec.init(x.shape, x.dtype)), x)
    encode = functools.partial(codec.encode, implementation="mosaic")
    text = lowered(jax.vmap(encode), x, state)
    assert "mosaic_gpu" in text
    assert (
        "dot_general" not in text
    )  # XLA's way, whose search for fast products takes seconds to compile
