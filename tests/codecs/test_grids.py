"""Grids, their scales, and bits by channel: levels, storage, gains, edges, bad input."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_jax.codecs.accounting import packed_bytes
from qvg_jax.codecs.base import EmptyState
from qvg_jax.codecs.quantize import (
    allocated_quantize,
    grid_quantize,
    lattice_quantize,
    minmax_quantize,
    nvfp4_quantize,
)
from qvg_jax.codecs.quantize.allocated import allocate
from qvg_jax.codecs.quantize.bitstream import pack_bits, packed_bits_width, unpack_bits
from qvg_jax.codecs.quantize.lattice import _nearest, _points, patterns
from qvg_jax.codecs.quantize.levels import (
    best_ratio,
    lloyd_max_levels,
    midrise_levels,
    normal_error,
)
from qvg_jax.codecs.quantize.radix import (
    LEVEL_COUNTS,
    pack_levels,
    packed_levels_width,
    unpack_levels,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Level 0: each program runs once or twice here, so that compile time is what counts.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tokens(seed, shape=(2, 2, 24, 32), spread=0.6):
    """Normal channels, token sizes that differ, float32."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, spread, (*shape[:3], 1)))
    return jnp.asarray(rng.normal(0, 1, shape) * size, jnp.float32)


def code(codec, x):
    packed, state = jit(codec.encode)(x, codec.init(x.shape, x.dtype))
    assert state == EmptyState() and packed_bytes(packed) == codec.nbytes(x.shape)
    return packed, np.asarray(codec.decode(packed, jnp.float32))


def energy(x):
    return float((np.asarray(x, np.float64) ** 2).sum())


# Levels.


@pytest.mark.parametrize("count", [2, 3, 4, 6, 8, 16])
def test_normal_error_is_the_integral(count):
    t = np.linspace(-9, 9, 360_001)
    density = np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)
    for levels, ratio in ((midrise_levels(count), 0.7), (lloyd_max_levels(count), 1.0)):
        scaled = ratio * np.asarray(levels)
        nearest = np.abs(t[:, None] - scaled).argmin(1)
        integral = np.trapezoid((t - scaled[nearest]) ** 2 * density, t)
        assert normal_error(levels, ratio) == pytest.approx(integral, abs=1e-6)


def test_known_grids_of_a_normal_density():
    # J. Max (1960), tables I and II: steps of the uniform grids and levels of the others.
    for count, step in ((2, 1.596), (3, 1.224), (4, 0.9957), (8, 0.5860), (16, 0.3352)):
        assert best_ratio(midrise_levels(count)) == pytest.approx(
            step, abs=6e-5 if count > 3 else 6e-4
        )
    np.testing.assert_allclose(lloyd_max_levels(4), [-1.510, -0.4528, 0.4528, 1.510], atol=5e-4)
    np.testing.assert_allclose(lloyd_max_levels(3), [-1.224, 0, 1.224], atol=5e-4)
    for count, error in ((2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)):
        levels = lloyd_max_levels(count)
        assert normal_error(levels) == pytest.approx(error, abs=5e-5 if count < 16 else 5e-6)
        assert best_ratio(levels) == pytest.approx(1, abs=1e-6)


# Packing.


@pytest.mark.parametrize("levels", LEVEL_COUNTS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=3, deadline=None, derandomize=True)
def test_levels_pack_and_unpack(levels, seed):
    codes = np.random.default_rng(seed).integers(0, levels, (3, 40), dtype=np.uint8)
    packed = pack_levels(jnp.asarray(codes), levels)
    assert packed.shape == (3, packed_levels_width(40, levels)) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack_levels(packed, levels, 40), codes)


def test_trits_by_hand():
    codes = jnp.asarray([[2, 1, 0, 2, 1, 2]], jnp.uint8)
    packed = pack_levels(codes, 3)
    # 2*81 + 1*27 + 0*9 + 2*3 + 1, then 2*81 and four empty places.
    np.testing.assert_array_equal(packed, [[196, 162]])
    np.testing.assert_array_equal(unpack_levels(packed, 3, 6), codes)
    assert packed_levels_width(128, 3) == 26 and packed_levels_width(128, 2) == 16
    with pytest.raises(ValueError, match="levels=17 is not accepted: give 2 to 16, or 256"):
        packed_levels_width(128, 17)


@given(bits=st.integers(1, 8), count=st.integers(1, 50), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_bitstream(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, count), dtype=np.uint8)
    stream = np.unpackbits(codes[..., None], axis=-1)[..., 8 - bits :].reshape(2, -1)
    packed = pack_bits(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(packed, np.packbits(stream, axis=-1))
    assert packed.shape[1] == packed_bits_width(count, bits)
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), codes)


# Grids.


def test_a_grid_by_hand():
    x = jnp.asarray([[[[-3, -1, 1, 3], [6, 2, -2, -6], [0, 0, 0, 0]]]], jnp.float32)
    packed, decoded = code(grid_quantize(2, gain="lsq"), x)
    np.testing.assert_array_equal(decoded, x)  # steps 2 and 4: numbers of e4m3
    np.testing.assert_array_equal(packed.codes_BHTC[0, 0, :2, 0], [0b00011011, 0b11100100])
    # The largest entry is below 2^3, so scales are stored times 2^(6 - 3).
    np.testing.assert_array_equal(packed.exponents_BH, [[3 - 6]])
    np.testing.assert_array_equal(
        packed.scales_BHTG.astype(jnp.float32)[0, 0, :, 0], [2 * 8, 4 * 8, 0]
    )


@pytest.mark.parametrize("gain", ["none", "lsq", "match", 0.5])
@pytest.mark.parametrize("options", [dict(bits=2), dict(levels=3), dict(bits=1), dict(bits=3)])
def test_gains_by_their_definition(options, gain):
    x = tokens(0)
    _, hat = code(grid_quantize(**options, gain=gain, scale_dtype="f32", group=16, refine=3), x)
    x, hat = (np.asarray(a, np.float64).reshape(-1, 16) for a in (x, hat))
    xx, xh, hh = (x * x).sum(1), (x * hat).sum(1), (hat * hat).sum(1)
    if gain == "match":
        np.testing.assert_allclose(xh, xx, rtol=1e-5)
    elif gain == 0.5:  # the geometric mean of least squares and match: the energy is right
        np.testing.assert_allclose(hh, xx, rtol=1e-5)
    elif gain == "lsq":  # nearly at the fixed point, as codes follow the last scale
        np.testing.assert_allclose(xh, hh, rtol=0.12)
        assert abs((xh - hh).mean()) < 0.02 * hh.mean()


@pytest.mark.parametrize(
    ("options", "error"),
    [  # shares of a normal vector's energy; least squares per token beats the density by a little
        (dict(bits=2, gain="none"), 0.1188),
        (dict(bits=2, gain="lsq"), 0.1175),
        (dict(bits=2, grid="lloyd_max", gain="lsq"), 0.1165),
        (dict(bits=2, gain="match"), 0.1330),
        (dict(bits=1, gain="lsq"), 0.3620),
        (dict(levels=3, gain="lsq"), 0.1890),
        (dict(levels=6, gain="lsq"), 0.0595),
        (dict(bits=4, gain="lsq"), 0.0112),
    ],
)
def test_error_of_normal_tokens(options, error):
    x = tokens(1, (1, 1, 600, 128))
    _, hat = code(grid_quantize(**options), x)
    assert energy(x - hat) / energy(x) == pytest.approx(error, rel=0.04)


@pytest.mark.parametrize("grid", ["midrise", "lloyd_max", (-2.0, -0.5, 0.0, 0.5, 2.0)])
def test_codes_are_the_nearest_levels_under_the_stored_scale(grid):
    x = tokens(2)
    codec = grid_quantize(None, grid, 8, gain="lsq")
    packed, hat = code(codec, x)
    scale = (
        np.asarray(packed.scales_BHTG, np.float32)
        * np.exp2(np.asarray(packed.exponents_BH, np.float32))[..., None, None]
    )
    levels = {"midrise": midrise_levels(4), "lloyd_max": lloyd_max_levels(4)}.get(grid, grid)
    reach = scale[..., None, None] * np.asarray(levels, np.float32)
    best = np.abs(np.asarray(x).reshape(2, 2, 24, 4, 8, 1) - reach).min(-1)
    error = np.abs(np.asarray(x) - hat).reshape(2, 2, 24, 4, 8)
    np.testing.assert_allclose(error, best, atol=1e-5)


SPREADS = [
    grid_quantize(2),
    grid_quantize(levels=3, gain="lsq", group=8),
    minmax_quantize(2, 8, scale_dtype="e4m3"),
    nvfp4_quantize(),
    allocated_quantize(2.0),
    lattice_quantize(),
]


@pytest.mark.parametrize("codec", SPREADS, ids=lambda c: c.name)
@pytest.mark.parametrize("power", [-60, -13, 9, 100])
def test_a_power_of_two_changes_no_code(codec, power):
    x = tokens(3)
    one, hat = code(codec, x)
    other, scaled = code(codec, x * jnp.float32(2.0**power))
    np.testing.assert_array_equal(one[0] if isinstance(one, tuple) else one.codes_BHTC,
                                  other[0] if isinstance(one, tuple) else other.codes_BHTC)  # fmt: skip
    np.testing.assert_array_equal(hat * np.float32(2.0**power), scaled)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("codec", SPREADS, ids=lambda c: c.name)
@given(size=st.sampled_from([1e-30, 1e-3, 700.0, 1e6, 1e30, 3e38]), seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_size_of_numbers(codec, dtype, size, seed):
    x = np.clip(np.random.default_rng(seed).normal(0, 0.3, (1, 1, 8, 32)), -1, 1) * size
    x = jnp.asarray(x, dtype)
    _, hat = code(codec, x)
    assert np.isfinite(hat).all()
    if size < 1e36:  # beyond that, scales saturate
        relative = np.asarray(x, np.float64) / size - hat.astype(np.float64) / size
        assert energy(relative) < 0.45 * energy(np.asarray(x, np.float64) / size)


@pytest.mark.parametrize("codec", SPREADS, ids=lambda c: c.name)
def test_zero_constant_and_single_tokens(codec):
    zero = jnp.zeros((1, 2, 5, 32), jnp.float32)
    _, hat = code(codec, zero)
    np.testing.assert_array_equal(hat, zero)
    half = tokens(4).at[:, :, 10].set(0)
    _, hat = code(codec, half)
    if "channel" not in codec.name:  # there, a zero is one value among those of other tokens
        np.testing.assert_array_equal(hat[:, :, 10], 0)
    _, hat = code(codec, tokens(5, (1, 1, 1, 32)))
    assert np.isfinite(hat).all()
    _, hat = code(codec, jnp.full((1, 1, 6, 32), 3.5, jnp.float32))
    assert np.isfinite(hat).all() and (hat >= 0).all()


@pytest.mark.parametrize("codec", SPREADS, ids=lambda c: c.name)
def test_what_is_not_finite(codec):
    x = tokens(6)
    bad = x.at[0, 0, 3, 1].set(jnp.nan).at[0, 0, 9, 17].set(jnp.inf)
    bad = bad.at[0, 0, 9, 18].set(-jnp.inf).at[0, 0, 7].set(jnp.nan)
    packed, hat = code(codec, bad)
    assert np.isfinite(hat).all()
    clean, want = code(codec, x)
    np.testing.assert_array_equal(hat[:, 1], want[:, 1])  # other heads
    np.testing.assert_array_equal(hat[1], want[1])
    good = np.ones(24, bool)
    good[[3, 7, 9]] = False
    near = energy(hat[0, 0, good] - np.asarray(x)[0, 0, good])
    assert near < 1.3 * energy(want[0, 0, good] - np.asarray(x)[0, 0, good]) + 1e-6
    assert np.abs(hat).max() <= 4 * np.abs(np.asarray(x)).max()
    if not codec.name.startswith("allocated"):
        assert hat[0, 0, 9, 17] >= hat[0, 0, 9, 18]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid_quantize(5), "bits=5 is not accepted: give 1, 2, 3, 4 or 8"),
        (lambda: grid_quantize(2, levels=3), "bits=2 and levels=3 are both given"),
        (lambda: grid_quantize(levels=17), "levels=17"),
        (lambda: grid_quantize(8, "lloyd_max"), "levels=256"),
        (lambda: grid_quantize(2, "midtread"), "grid='midtread'.*'midrise', 'lloyd_max' or levels"),
        (lambda: grid_quantize(None, (1.0, 0.0)), "ascending levels"),
        (lambda: grid_quantize(2, (0.0, 1.0)), "neither bits nor levels"),
        (lambda: grid_quantize(gain="more"), "gain='more'.*none, lsq, match"),
        (lambda: grid_quantize(gain=-1.0), "gain=-1.0"),
        (lambda: grid_quantize(refine=0), "refine=0"),
        (lambda: grid_quantize(group=0), "group=0"),
        (lambda: grid_quantize(scale_dtype="fp4"), "scale_dtype='fp4'.*e4m3, bf16 or f32"),
        (lambda: grid_quantize(group=48).init((1, 1, 4, 128)), "group=48 must divide head_dim=128"),
        (lambda: grid_quantize().init((1, 4, 128)), r"rank 3; accepted: \(B, H, T, D\)"),
        (lambda: grid_quantize().init((1, 1, 4, 30)), "head_dim=30 does not fill whole bytes"),
        (lambda: minmax_quantize(1), "bits=1"),
        (lambda: minmax_quantize(group=0), "group=0"),
        (lambda: minmax_quantize(axis="head"), "axis='head'.*'channel' or 'token'"),
        (lambda: minmax_quantize(clip=0.0), "clip=0.0"),
        (lambda: minmax_quantize(percentile=0.5), "percentile=0.5"),
        (lambda: minmax_quantize(2, 48, "token").init((1, 1, 4, 64)), "group=48 must divide"),
        (lambda: nvfp4_quantize().init((1, 1, 4, 24)), "head_dim=24.*multiple of 16"),
        (lambda: lattice_quantize().init((1, 1, 4, 12)), "head_dim=12.*multiple of 8"),
        (lambda: lattice_quantize(gain=-1.0), "gain=-1.0"),
        (lambda: lattice_quantize(refine=0), "refine=0"),
        (lambda: allocated_quantize(2.0, min_bits=3), "min_bits=3"),
        (lambda: allocated_quantize(0.0), "bits=0.0"),
        (lambda: allocated_quantize(9.0), "bits=9.0"),
        (lambda: allocated_quantize(2.0, max_bits=9), "max_bits=9"),
        (lambda: allocated_quantize(gain=3.0), "gain=3.0"),
        (lambda: allocated_quantize(gain_axis="head"), "gain_axis='head'"),
        (lambda: allocated_quantize(refine=0), "refine=0"),
        (lambda: allocated_quantize(2.1).init((1, 1, 4, 64)), "bits=2.1 times head_dim=64"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Min-max.


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(1, 2, 24, 16), (1, 1, 21, 16), (1, 1, 3, 16)])
def test_keys_by_channel_against_numpy(bits, shape):
    x = np.asarray(tokens(7, shape))
    _, hat = code(minmax_quantize(bits, 8, scale_dtype="f32"), jnp.asarray(x))
    for start in range(0, shape[2], 8):
        block = x[:, :, start : start + 8]  # the last one may be shorter
        low, high = block.min(2, keepdims=True), block.max(2, keepdims=True)
        step = (high - low) / np.float32(2**bits - 1)
        steps = np.where(step > 0, np.floor((block - low) / np.where(step > 0, step, 1) + 0.5), 0)
        np.testing.assert_allclose(hat[:, :, start : start + 8], steps * step + low, atol=1e-5)


def test_steady_channels_cost_nothing():
    x = jnp.broadcast_to(jnp.linspace(-40, 40, 32)[None, None, None], (1, 1, 50, 32))
    x = x.astype(jnp.bfloat16)
    _, hat = code(minmax_quantize(2, 16), x)
    np.testing.assert_array_equal(hat, np.asarray(x, np.float32))


def test_clipping_moves_the_ends_inwards():
    x = jnp.linspace(0, 1, 101, dtype=jnp.float32).reshape(1, 1, 101, 1) * jnp.ones((1, 1, 1, 4))
    ends = lambda **options: (lambda hat: (hat.min(), hat.max()))(  # noqa: E731
        code(minmax_quantize(2, 101, scale_dtype="f32", **options), x)[1]
    )
    np.testing.assert_allclose(ends(), (0, 1), atol=1e-6)
    np.testing.assert_allclose(ends(clip=0.5), (0.25, 0.75), atol=1e-6)
    np.testing.assert_allclose(ends(percentile=0.1), (0.1, 0.9), atol=1e-6)
    np.testing.assert_allclose(ends(percentile=0.1, clip=0.5), (0.3, 0.7), atol=1e-6)


# NVFP4.


def test_nvfp4_against_the_float4_type():
    x = tokens(8, (1, 2, 40, 32))
    packed, hat = code(nvfp4_quantize(), x)
    x = np.asarray(x)
    span = np.abs(x).max((2, 3), keepdims=True) / np.float32(6 * 448)
    groups = x.reshape(1, 2, 40, 2, 16)
    scale = np.abs(groups).max(-1) / (6 * span)
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * span
    ratio = (groups / scale[..., None]).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_allclose(
        hat, (ratio * scale[..., None]).reshape(x.shape), rtol=1e-5, atol=1e-6
    )
    assert nvfp4_quantize().bits_per_element((1, 1, 10_000, 128)) == pytest.approx(4.5, abs=1e-4)


def test_nvfp4_ties():
    # The block's largest entry 6 * 448 and no other block: both scales are exact powers of two.
    x = np.zeros((1, 1, 1, 16), np.float32)
    x[..., :8] = np.array([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]) * 448
    _, hat = code(nvfp4_quantize(), jnp.asarray(x))
    np.testing.assert_array_equal(hat[0, 0, 0, :8] / 448, [6, 0, 1, 1, 2, 2, 4, 4])


# E8.


def every_point():
    index = np.arange(2**16)
    codes = [
        jnp.asarray(part.astype(np.uint8))[None, None, None] for part in (index >> 8, index & 255)
    ]
    return np.asarray(_points(*codes)).reshape(-1, 8)


def test_lattice_points_are_points_of_a_shifted_e8():
    points = every_point()
    assert len(np.unique(points, axis=0)) == 2**16
    shift = np.where((points - 0.25) % 1 == 0.5, 0.25, -0.25)
    assert (np.abs(shift - shift[:, :1]) == 0).all()
    halves = points - shift
    assert (halves % 1 == 0.5).all() and (halves.sum(1) % 2 == 0).all()
    assert len(np.unique(patterns(), axis=0)) == 256
    norms = (patterns() ** 2).sum(1)
    assert sorted(set(norms.tolist())) == [2, 4, 6, 8, 10, 12] and (norms <= 10).sum() == 227


def test_lattice_codes_are_the_nearest_points():
    y = np.random.default_rng(0).normal(0, 1.2, (1, 1, 40, 8)).astype(np.float32)
    y[0, 0, 0] = 0
    got = np.asarray(_points(*jit(_nearest)(jnp.asarray(y), jnp.ones((1, 1, 40), jnp.float32))))
    points = every_point()
    for one, nearest in zip(y[0, 0], got[0, 0], strict=True):
        best = ((points - one) ** 2).sum(1).min()
        assert ((nearest - one) ** 2).sum() == pytest.approx(best, rel=1e-5)


def test_lattice_error_of_normal_tokens():
    x = tokens(12, (1, 1, 300, 128))
    _, hat = code(lattice_quantize(), x)
    assert energy(x - hat) / energy(x) == pytest.approx(0.0903, rel=0.02)
    _, hat = code(lattice_quantize(gain=1.0, scale_dtype="f32"), x)
    x = np.asarray(x)
    np.testing.assert_allclose((x * hat).sum(3), (x * x).sum(3), rtol=1e-5)
    assert energy(x - hat) / energy(x) == pytest.approx(0.0903 / (1 - 0.0903), rel=0.03)
    assert lattice_quantize().bits_per_element((1, 1, 10_000, 128)) == pytest.approx(
        2.0625, abs=1e-4
    )


# Bits by channel.


@given(seed=st.integers(0, 2**32 - 1), total=st.integers(1, 72))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_allocation_is_the_greedy_one(seed, total):
    energies = np.exp(np.random.default_rng(seed).normal(0, 2, 12)).astype(np.float32)
    error = [1.0] + [
        normal_error(midrise_levels(2**b), best_ratio(midrise_levels(2**b))) for b in range(1, 9)
    ]
    bits = np.zeros(12, int)
    for _ in range(total):
        drop = [
            energies[d] * (error[b] - error[b + 1]) if b < 8 else -1 for d, b in enumerate(bits)
        ]
        bits[np.argmax(drop)] += 1
    got = allocate(jnp.asarray(energies)[None, None], total)
    assert int(got.sum()) == total
    spent = sum(e * error[b] for e, b in zip(energies, np.asarray(got)[0, 0], strict=True))
    assert spent == pytest.approx(sum(e * error[b] for e, b in zip(energies, bits, strict=True)))


def test_every_channel_may_keep_a_bit():
    got = allocate(jnp.asarray([1e6, 1, 1e-9, 0], jnp.float32)[None, None], 8, min_bits=1)
    np.testing.assert_array_equal(got[0, 0], [5, 1, 1, 1])


def test_allocation_of_equal_and_of_silent_channels():
    equal = allocate(jnp.ones((1, 1, 8), jnp.float32), 12)
    np.testing.assert_array_equal(equal[0, 0], [2] * 4 + [1] * 4)
    silent = allocate(jnp.zeros((1, 1, 8), jnp.float32), 16)
    assert int(silent.sum()) == 16 and silent.max() <= 8
    loud = allocate(jnp.asarray([1e6, 1, 1, 1], jnp.float32)[None, None], 8)
    np.testing.assert_array_equal(loud[0, 0], [8, 0, 0, 0])


@pytest.mark.parametrize("bits", [0.5, 2.0, 3.25])
def test_allocated_by_the_book(bits):
    x = (
        tokens(9, (1, 2, 30, 32))
        * jnp.asarray(np.geomspace(4, 0.05, 32), jnp.float32)[None, None, None]
    )
    packed, hat = code(allocated_quantize(bits), x)
    given_bits = np.asarray(packed.bits_BHD)
    assert (given_bits.sum(-1) == bits * 32).all()
    for h in range(2):
        for t in range(30):
            stream = "".join(f"{byte:08b}" for byte in np.asarray(packed.codes_BHCT)[0, h, :, t])
            at = 0
            for d, b in enumerate(given_bits[0, h]):
                level = int(stream[at : at + b], 2) - (2**b - 1) / 2 if b else 0
                at += b
                want = level * float(packed.step_BHD[0, h, d]) * float(packed.scales_BHT[0, h, t])
                assert hat[0, h, t, d] == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_bits_where_the_energy_is_beat_even_bits():
    x = (
        tokens(10, (1, 1, 400, 64))
        * jnp.asarray(np.geomspace(8, 0.02, 64), jnp.float32)[None, None, None]
    )
    even, spent = grid_quantize(2, gain="lsq"), allocated_quantize(2.0)
    assert energy(x - code(spent, x)[1]) < 0.1 * energy(x - code(even, x)[1])
    errors = [energy(x - code(allocated_quantize(b), x)[1]) for b in (0.5, 1.0, 2.0)]
    assert all(b < 0.6 * a for a, b in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_gain_of_allocated_bits(axis):
    x = tokens(11, (1, 1, 300, 32))
    codec = allocated_quantize(2.0, gain=1.0, gain_axis=axis, scale_dtype="f32")
    packed, hat = code(codec, x)
    along = 2 if axis == "channel" else 3
    x = np.asarray(x)
    # The step is bfloat16, so a channel's gain is right to 2^-8.
    np.testing.assert_allclose(
        (x * hat).sum(along), (x * x).sum(along), rtol=5e-3 if along == 2 else 1e-5
    )
