"""Integer quantization and packing: formulas, layout, bounds, and what happens at the edges."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_jax.codecs.accounting import packed_bytes
from qvg_jax.codecs.base import EmptyState
from qvg_jax.codecs.quantize import pack, packed_width, residual_quantize, unpack

pytestmark = pytest.mark.usefixtures("strict_dtypes")

E4M3 = ml_dtypes.float8_e4m3fn
STORED = {"e4m3": E4M3, "bf16": ml_dtypes.bfloat16, "f32": np.float32}
MODES = ("symmetric", "asymmetric")
quick = settings(max_examples=12, deadline=None, derandomize=True)


def tokens(seed, shape=(1, 2, 8, 32), spread=2.0):
    """Groups of very different magnitude, as residuals are."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, spread, (*shape[:-1], 1)))
    return jnp.asarray(rng.normal(0, 1, shape) * size, jnp.float32)


def code(x_BHTD, **options):
    codec = residual_quantize(**options)
    packed, _ = codec.encode(x_BHTD, codec.init(x_BHTD.shape))
    return codec, packed


def half_away(x):
    return np.sign(x) * np.floor(np.abs(x.astype(np.float64)) + 0.5)


def by_the_book(x, bits, group, mode, scale_dtype):
    """The formulas in numpy float32: integer codes with offset, stored scales and zeros."""
    x = np.asarray(x, np.float32)
    x = x.reshape(*x.shape[:-1], -1, group)
    if mode == "symmetric":
        q, zero = 2 ** (bits - 1) - 1, np.zeros(x.shape[:-1], np.float32)
        top = np.abs(x).max(-1)
    else:
        q, zero = 2**bits - 1, x.min(-1)
        top = x.max(-1) - zero
    scale = np.maximum(top / np.float32(q), np.float32(1e-10))
    stored_scale = np.minimum(scale, 448 if scale_dtype == "e4m3" else np.inf)
    stored_scale = stored_scale.astype(STORED[scale_dtype])
    stored_zero = zero.astype(STORED[scale_dtype])
    if scale_dtype == "e4m3":
        scale, zero = stored_scale.astype(np.float32), stored_zero.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(scale[..., None] > 0, (x - zero[..., None]) / scale[..., None], 0)
    if mode == "symmetric":
        codes = np.clip(half_away(ratio), -q, q) + q
    else:
        codes = np.clip(half_away(ratio), 0, q)
    return codes.reshape(*codes.shape[:-2], -1).astype(np.uint8), stored_scale, stored_zero


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(seed=st.integers(0, 2**32 - 1))
@quick
def test_packing_round_trip_and_layout(bits, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, 16), dtype=np.uint8)
    packed = pack(jnp.asarray(codes), bits)
    # The layout in one sentence: the codes' bits, highest first, one after another.
    stream = np.unpackbits(codes[..., None], axis=-1)[..., 8 - bits :].reshape(3, -1)
    np.testing.assert_array_equal(packed, np.packbits(stream, axis=-1))
    assert packed.shape == (3, packed_width(16, bits))
    np.testing.assert_array_equal(unpack(packed, bits), codes)


def test_packing_layout_of_the_official_kernels():
    two = pack(jnp.asarray([[3, 0, 1, 2]], jnp.uint8), 2)
    assert int(two[0, 0]) == 3 << 6 | 0 << 4 | 1 << 2 | 2
    four = pack(jnp.asarray([[9, 5]], jnp.uint8), 4)
    assert int(four[0, 0]) == 9 << 4 | 5


@pytest.mark.parametrize("scale_dtype", ["e4m3", "bf16", "f32"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_formulas(bits, mode, scale_dtype):
    x = tokens(7)
    codec, packed = code(x, bits=bits, group=16, mode=mode, scale_dtype=scale_dtype)
    codes, scales, zeros = by_the_book(x, bits, 16, mode, scale_dtype)
    # XLA divides by a constant through its reciprocal: float32 scales may be one rounding off.
    np.testing.assert_allclose(
        packed.scales_BHTG.astype(jnp.float32),
        scales.astype(np.float32),
        rtol=2.0**-22 if scale_dtype == "f32" else 0,
    )
    np.testing.assert_array_equal(unpack(packed.codes_BHTC, bits), codes)
    if mode == "symmetric":
        assert packed.zeros_BHTG is None
        codes = codes.astype(np.float32) - (2 ** (bits - 1) - 1)
    else:
        np.testing.assert_array_equal(np.asarray(packed.zeros_BHTG), zeros)
    x_hat = codes.astype(np.float32).reshape(1, 2, 8, 2, 16)
    x_hat = x_hat * scales.astype(np.float32)[..., None]
    if mode == "asymmetric":
        x_hat = x_hat + zeros.astype(np.float32)[..., None]
    # float32: the scale's last bit, and one rounding where XLA fuses multiply and add.
    decoded = np.asarray(codec.decode(packed, jnp.float32)).reshape(x_hat.shape)
    assert (np.abs(decoded - x_hat) <= 1e-6 * np.abs(x_hat).max(-1, keepdims=True)).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 8]),
    mode=st.sampled_from(MODES),
    scale_dtype=st.sampled_from(["e4m3", "bf16", "f32"]),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_error_is_at_most_half_a_step(seed, bits, mode, scale_dtype):
    x = tokens(seed, spread=1.0)
    codec, packed = code(x, bits=bits, group=8, mode=mode, scale_dtype=scale_dtype)
    q = 2 ** (bits - 1) - 1 if mode == "symmetric" else 2**bits - 1
    grouped = np.asarray(x).reshape(*x.shape[:-1], -1, 8)
    low = 0 if mode == "symmetric" else grouped.min(-1)
    reach = np.abs(grouped).max(-1) if mode == "symmetric" else grouped.max(-1) - low
    # Half a step, plus what rounding scale and zero point moves the far end of the grid by.
    # e4m3: 2^-4 relative and 2^-10 absolute; bf16: 2^-8; f32: 2^-23.
    relative, absolute = {"e4m3": (2**-4, 2**-10), "bf16": (2**-8, 0), "f32": (2**-22, 0)}[
        scale_dtype
    ]
    moved = reach * relative + q * absolute + np.abs(low) * relative + absolute
    bound = (0.5 * reach / q * (1 + relative) + moved)[..., None] + 1e-6
    error = np.abs(np.asarray(codec.decode(packed, jnp.float32)) - np.asarray(x))
    assert (error.reshape(grouped.shape) <= bound).all()


def test_ties_round_away_from_zero():
    x = jnp.asarray([[[[3, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 0.49]]]], jnp.float32)
    _, packed = code(x, bits=3, group=8, scale_dtype="f32")
    np.testing.assert_array_equal(
        unpack(packed.codes_BHTC, 3)[0, 0, 0].astype(jnp.int32) - 3, [3, 1, -1, 2, -2, 3, -3, 0]
    )


@pytest.mark.parametrize("scale_dtype", ["e4m3", "bf16", "f32"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_zero_group_decodes_to_zero(bits, mode, scale_dtype):
    x = tokens(3).at[..., :16].set(0)
    codec, packed = code(x, bits=bits, group=16, mode=mode, scale_dtype=scale_dtype)
    decoded = codec.decode(packed, jnp.float32)
    assert (decoded[..., :16] == 0).all()
    assert jnp.isfinite(decoded).all() and (decoded[..., 16:] != 0).any()


def test_constant_group_decodes_to_itself_in_asymmetric_mode():
    x = jnp.full((1, 1, 2, 8), 1.75, jnp.float32)  # 1.75 is an e4m3 number
    codec, packed = code(x, bits=2, group=8, mode="asymmetric")
    np.testing.assert_array_equal(codec.decode(packed, jnp.float32), x)


@pytest.mark.parametrize("mode", MODES)
def test_e4m3_saturates(mode):
    x = jnp.asarray([[[[1e6, -1e6, 0, 5e5], [1, -1, 0, 0.5]]]], jnp.float32)
    codec, packed = code(x, bits=2, group=4, mode=mode)
    assert packed.scales_BHTG.astype(jnp.float32).max() == 448
    decoded = np.asarray(codec.decode(packed, jnp.float32))
    assert np.isfinite(decoded).all()
    assert decoded[0, 0, 0, 0] == (448 if mode == "symmetric" else -448 + 3 * 448)
    if mode == "symmetric":
        np.testing.assert_array_equal(decoded[0, 0, 1], [1, -1, 0, 1])


def test_a_group_below_the_least_e4m3_scale_decodes_to_zero():
    x = jnp.full((1, 1, 1, 8), 2.0**-12, jnp.float32)
    codec, packed = code(x, bits=2, group=8)
    assert (codec.decode(packed, jnp.float32) == 0).all()


@pytest.mark.parametrize("scale_dtype", ["e4m3", "bf16", "f32"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_stays_where_it_is(mode, scale_dtype):
    x = tokens(5)
    bad = x.at[0, 0, 3, 1].set(jnp.nan).at[0, 1, 2, 17].set(jnp.inf)
    bad = bad.at[0, 1, 2, 18].set(-jnp.inf).at[0, 1, 7, :16].set(jnp.nan)
    options = dict(bits=4, group=16, mode=mode, scale_dtype=scale_dtype)
    codec, packed = code(bad, **options)
    decoded = codec.decode(packed, jnp.float32)
    assert jnp.isfinite(decoded).all()
    # As if the bad entries had been any harmless member of their group; others are untouched.
    clean = jnp.where(jnp.isfinite(bad), bad, 0)
    same = np.ones(x.shape, bool)
    same[0, 0, 3, :16] = same[0, 1, 2, 16:] = same[0, 1, 7, :16] = False
    reference = codec.decode(code(clean, **options)[1], jnp.float32)
    np.testing.assert_array_equal(np.asarray(decoded)[same], np.asarray(reference)[same])
    assert (decoded[0, 1, 7, :16] == 0).all()
    group = decoded[0, 1, 2, 16:]
    assert group[1] == group.max() and group[2] == group.min()
    finite_group = jnp.where(jnp.isfinite(bad[0, 1, 2, 16:]), bad[0, 1, 2, 16:], 0)
    assert jnp.abs(group).max() <= 1.2 * jnp.abs(finite_group).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_any_floating_input_and_output(dtype):
    x = tokens(1, spread=0.5).astype(dtype)
    codec, packed = code(x, bits=8, group=32, scale_dtype="f32")
    decoded = codec.decode(packed, dtype)
    assert decoded.dtype == dtype and codec.decode(packed).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        decoded.astype(jnp.float32), x.astype(jnp.float32), atol=float(jnp.abs(x).max()) / 100
    )


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        (dict(bits=5), None, "bits=5 is not accepted: give 2, 3, 4 or 8"),
        (dict(bits=0), None, "bits=0"),
        (dict(group=0), None, "group=0"),
        (dict(mode="affine"), None, "mode='affine'.*'symmetric' or 'asymmetric'"),
        (dict(scale_dtype="fp4"), None, "scale_dtype='fp4'.*e4m3, bf16 or f32"),
        (dict(scale_dtype=jnp.int8), None, "scale_dtype"),
        (dict(group=48), (1, 1, 4, 128), "group=48 must divide head_dim=128; got remainder 32"),
        (dict(bits=3, group=4), (1, 1, 4, 20), "head_dim=20.*bits=3.*multiple of 8"),
        (dict(), (1, 4, 128), r"shape=\(1, 4, 128\) has rank 3"),
        (dict(), (1, 1, 0, 128), r"shape=\(1, 1, 0, 128\) has an empty axis"),
    ],
)
def test_bad_input(options, shape, message):
    with pytest.raises(ValueError, match=message):
        codec = residual_quantize(**options)
        jax.eval_shape(lambda x: codec.encode(x, EmptyState()), jnp.zeros(shape, jnp.float32))
    if shape is not None:
        for use in (codec.init, codec.nbytes, codec.bits_per_element):
            with pytest.raises(ValueError, match=message):
                use(shape)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="dtype=int32"):
        residual_quantize().encode(jnp.zeros((1, 1, 4, 64), jnp.int32), EmptyState())


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
@given(power=st.integers(-90, 100), seed=st.integers(0, 999))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_normalized_spans_may_have_any_size(mode, power, seed):
    """What e4m3 would clip at 448 or lose below 2^-9 is as good as at any other size."""
    x = tokens(seed, spread=0.3)
    codec = residual_quantize(4, 16, mode, normalize=True)
    one, _ = codec.encode(x, EmptyState())
    other, _ = codec.encode(x * jnp.float32(2.0**power), EmptyState())
    np.testing.assert_array_equal(one.codes_BHTC, other.codes_BHTC)
    decoded = codec.decode(one, jnp.float32)
    assert jnp.linalg.norm((decoded - x).ravel()) < 0.15 * jnp.linalg.norm(x.ravel())
    scaled = np.asarray(codec.decode(other, jnp.float32))
    np.testing.assert_array_equal(scaled, np.asarray(decoded) * np.float32(2.0**power))
    assert packed_bytes(one) == codec.nbytes(x.shape)


def test_values_of_700_are_clipped_in_the_published_format_and_kept_when_normalized():
    x = jnp.asarray([700.0, -650.0, 300.0, 0.0], jnp.float32).reshape(1, 1, 1, 4)
    error = {}
    for normalize in (False, True):
        codec = residual_quantize(2, 4, normalize=normalize)
        packed, _ = codec.encode(x, EmptyState())
        error[normalize] = float(jnp.abs(codec.decode(packed, jnp.float32) - x).max())
        assert codec.nbytes(x.shape) == packed_bytes(packed) == 2 + normalize
    assert error[False] == 700 - 448 and error[True] <= 300
    assert float(codec.decode(packed, jnp.float32)[0, 0, 0, 0]) == pytest.approx(700, rel=1 / 16)
