"""Triton's encoding kernels without a GPU: compiled for each, and interpreted against references.

Numbers are compared in float32, for the interpreter multiplies no bfloat16.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
pytest.importorskip("jax_triton", reason="Triton is for Linux on x86-64")

import triton
import triton.language as tl

from pallas_kernels.gpu.triton_launch import Launch
from pallas_kernels.gpu.triton_words import e4m3_byte, e4m3_float
from pallas_kernels.kmeans import Metric, kmeans_sums
from pallas_kernels.kmeans import api as kmeans_api
from pallas_kernels.kmeans import triton as kmeans
from pallas_kernels.quantize_pack import (
    Dithered,
    Integers,
    Midrise,
    assign_and_pack,
    assign_and_subtract,
    pack_dithered,
)
from pallas_kernels.quantize_pack import triton as pack
from qvg_jax.codecs import compose
from tests.support.kernel_cases import ENCODERS, clustered, round_trip_error
from tests.support.triton_cases import SHARED, compiled, interpreted, run_interpreted, usage

FORMS = [
    Integers(2, 64),
    Integers(4, 16),
    Integers(2, 64, zero_points=True),
    Midrise(2, 0.9957, 2, recode=True),
    Midrise(1, 1.5958, 1, recode=False),
]


@pytest.mark.parametrize("cc", SHARED)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_kernels_compile_for_every_gpu(head_dim, cc):
    form = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    x, c = (form(jnp.bfloat16, 2, n, head_dim) for n in (300, 256))
    bias, ids = form(jnp.float32, 2, 256), form(jnp.uint8, 2, 300)
    forms = (None, FORMS[0], FORMS[3]) if head_dim == 128 else FORMS[1:3]
    calls = [
        (kmeans.assign_launch(x, c, jnp.uint8), (x, c, bias)),
        (kmeans.sums_launch(x, 256, 2), (x, form(jnp.int32, 2, 300))),
        *((pack.launch_for(x, c, f), (x, c, ids)) for f in forms),
        (pack.dithered_launch(x, Dithered(2, 3.5, True)), (x, form(jnp.float32, 2, head_dim))),
    ]
    for (launch, out), operands in calls:
        used = usage(compiled(launch, operands, out, cc))
        assert used.spills == 0 and used.shared <= min(SHARED[cc], 99 * 1024), (launch, used)


@pytest.fixture
def ours():
    """Tokens and tables in float32 to the kernels, which are interpreted."""
    with pytest.MonkeyPatch.context() as patch, interpreted(kmeans, pack):
        patch.setattr(kmeans_api, "missing", lambda: None)
        for module, name in (
            (kmeans, "assign"),
            (kmeans, "sums"),
            (pack, "encode"),
            (pack, "pack_dithered"),
        ):
            f = getattr(module, name)

            def wide(*args, f=f):
                up = lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a  # noqa: E731
                return f(*(up(a) if hasattr(a, "astype") else a for a in args))

            patch.setattr(module, name, wide)
        yield dict(implementation="triton")


@pytest.mark.parametrize("tokens, clusters, parts", [(300, 256, 2), (100, 40, 1), (1, 1, 1)])
def test_sums_equal_the_reference(ours, tokens, clusters, parts):
    x, c = clustered(2, tokens, clusters)
    right = kmeans_sums(x, c, scores=True, implementation="xla")
    mine = kmeans_sums(x, c, scores=True, parts=parts, **ours)
    np.testing.assert_array_equal(mine.ids_RT, right.ids_RT)
    np.testing.assert_array_equal(mine.number_RK, right.number_RK)
    np.testing.assert_allclose(mine.total_RKD, right.total_RKD, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mine.score_RT, right.score_RT, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_of_two_equal_centroids_the_first_is_taken_and_a_bad_token_shows(ours):
    x, c = clustered(1, 70, 200)
    c = c.at[0, 150].set(c[0, 20]).at[0, 21].set(c[0, 20])
    x = x.at[0, 3].set(c[0, 20])
    assert int(kmeans_sums(x, c, scores=True, **ours).ids_RT[0, 3]) == 20
    bad = kmeans_sums(x.at[0, 5, 7].set(jnp.nan), c, **ours)
    assert not bool(jnp.isfinite(jnp.asarray(bad.total_RKD)).all())


@pytest.mark.parametrize("form", [*FORMS, Integers(2, 8), Midrise(4, 0.3352, 2, False)], ids=str)
def test_packing_equals_the_reference(ours, form):
    x, c = clustered(1, 140, 256)
    x = x.at[0, 9].set(c[0, 3])  # nothing is left of it
    x = x.at[0, 10].set(c[0, 4] + 2.0**-9)  # a scale among e4m3's smallest
    right = assign_and_pack(x, c, form, implementation="xla")
    mine = assign_and_pack(x, c, form, **ours)
    np.testing.assert_array_equal(mine[0], right[0])
    assert mine[1].shape == right[1].shape and mine[1].dtype == right[1].dtype
    assert (np.asarray(mine[1]) != np.asarray(right[1])).mean() < 1e-3  # ties
    if isinstance(form, Integers):
        for a, b in zip(mine[2:], right[2:], strict=True):
            np.testing.assert_array_equal(a, b)
    else:
        np.testing.assert_allclose(mine[2], right[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", [Dithered(2, 3.75, False), Dithered(4, 15.5, True)], ids=str)
def test_packing_on_dithered_levels_equals_the_reference(ours, form):
    rng = np.random.default_rng(0)
    r = jnp.asarray(rng.standard_normal((2, 100, 128)), jnp.bfloat16).at[1, 9].set(0)
    factor = jnp.asarray(rng.uniform(0.1, 10, (2, 128)), jnp.float32)
    right = pack_dithered(r, factor, form, implementation="xla")
    mine = pack_dithered(r, factor, form, **ours)
    assert (np.asarray(mine[0]) != np.asarray(right[0])).mean() < 1e-3  # ties
    np.testing.assert_allclose(mine[1], right[1], rtol=1e-4)


def test_the_residual_equals_the_reference(ours):
    x, c = clustered(1, 70, 100)
    size = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (1, 128)), jnp.float32)
    metric = Metric(jnp.mean(x.astype(jnp.float32), axis=1), size)
    mine, right = (
        assign_and_subtract(x, c, metric=metric, **i) for i in (ours, dict(implementation="xla"))
    )
    np.testing.assert_array_equal(mine[0], right[0])
    assert mine[1].dtype == jnp.bfloat16
    # The interpreter cuts off where a GPU rounds.
    a, b = (np.asarray(y[1], np.float32) for y in (mine, right))
    np.testing.assert_allclose(a, b, rtol=2**-7)


@triton.jit
def _there_and_back(x, byte, back):
    at = tl.arange(0, 512)
    code = e4m3_byte(tl.load(x + at))
    tl.store(byte + at, code.to(tl.uint8))
    tl.store(back + at, e4m3_float(code))


def test_numbers_of_eight_bits_are_those_of_the_format():
    """Every positive number there and back, and halves between two of them to the even one."""
    values = jax.lax.bitcast_convert_type(jnp.arange(127, dtype=jnp.uint8), jnp.float8_e4m3fn)
    values = np.asarray(values.astype(jnp.float32))
    between = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, between, between * 1.001, [1e-10, 0]])
    x = np.pad(x, (0, 512 - len(x))).astype(np.float32)

    with interpreted():
        out = [jax.ShapeDtypeStruct((512,), d) for d in (jnp.uint8, jnp.float32)]
        byte, back = run_interpreted(Launch(_there_and_back, (1,), {}), x, out=out)
    right = jnp.asarray(x).astype(jnp.float8_e4m3fn)
    np.testing.assert_array_equal(byte, jax.lax.bitcast_convert_type(right, jnp.uint8))
    np.testing.assert_array_equal(back, right.astype(jnp.float32))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=jnp.zeros((2, 9, 32), jnp.bfloat16)), ValueError, r"\(2, 9, 32\)"),
        (dict(x=jnp.zeros((2, 9, 128), jnp.float32)), NotImplementedError, "float32.*'xla'"),
        (dict(c=jnp.zeros((2, 300, 128))), NotImplementedError, "300 centroids.*'xla'"),
        (dict(form=Integers(3, 64)), NotImplementedError, "'triton': bits=3"),
        (dict(installed="jax_triton is absent"), NotImplementedError, "jax_triton is absent"),
    ],
)
def test_bad_input_is_named(monkeypatch, change, error, message):
    x, c = clustered(2, 9, 4)
    args = dict(x=x, c=c, form=Integers(2, 64), installed=None) | change
    monkeypatch.setattr(kmeans_api, "missing", lambda: args["installed"])
    with pytest.raises(error, match=message):
        assign_and_pack(args["x"], args["c"], args["form"], implementation="triton")


@pytest.mark.parametrize("name", ["qvg", "qvg-pro", "midrise values", "1 bit keys"])
def test_a_codec_encodes_as_well_on_the_kernels(ours, monkeypatch, name):
    """Two spans, the second one warm: the same arrays, and as small an error."""
    monkeypatch.setattr(compose, "no_triton", lambda: None)
    codec = ENCODERS[name]()
    x = clustered(1, 400, 64)[0][None]
    for implementation in ("triton", "xla"):
        state, errors = codec.init((1, 1, 200, 128), x.dtype), []
        for span in (x[:, :, :200], x[:, :, 200:]):
            with jax.disable_jit(implementation == "triton"):
                packed, state = codec.encode(span, state, implementation=implementation)
            errors.append(round_trip_error(codec, (span, packed)))
        form = jax.tree.map(lambda y: (y.shape, y.dtype), (packed, state))
        if implementation == "triton":
            mine, mine_form = errors, form
        else:
            assert form == mine_form
            # A difference in rounding may lead a second span to another local optimum.
            assert mine[0] < 1.005 * errors[0] and mine[1] < 1.03 * errors[1]


@pytest.mark.parametrize("installed, calls", [(True, True), (False, False)])
def test_kernels_encode_where_jax_triton_is_installed(monkeypatch, installed, calls):
    missing = None if installed else "jax_triton is absent"
    monkeypatch.setattr(compose, "no_triton", lambda: missing)
    monkeypatch.setattr(kmeans_api, "missing", lambda: missing)
    x = jax.ShapeDtypeStruct((1, 1, 64, 128), jnp.bfloat16)
    codec = ENCODERS["qvg"]()
    program = str(jax.make_jaxpr(codec.encode)(x, codec.init(x.shape, x.dtype)))
    assert ("triton_kernel_call[" in program) == calls


def test_what_a_codec_lacks_is_named():
    x = clustered(1, 64, 8)[0][None]
    codec = ENCODERS["qvg"]()
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="'triton': .* cpu; .*'xla' serves it"):
            codec.encode(x, codec.init(x.shape, x.dtype), implementation="triton")


@pytest.mark.parametrize("name", ["qvg", "dither-asym values"])
def test_layers_are_mapped_one_after_the_other(monkeypatch, name):
    """jax_triton has no rule for `vmap`, which caches of several layers use."""
    monkeypatch.setattr(compose, "no_triton", lambda: None)
    codec = ENCODERS[name]()
    x = jax.ShapeDtypeStruct((3, 1, 2, 300, 128), jnp.bfloat16)
    state = jax.eval_shape(jax.vmap(lambda x: codec.init(x.shape, x.dtype)), x)
    encode = lambda x, s: codec.encode(x, s, implementation="triton")  # noqa: E731
    packed, after = jax.eval_shape(jax.vmap(encode), x, state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(packed))
