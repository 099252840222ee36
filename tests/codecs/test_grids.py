"""Grids of levels: their errors, gains and codes; and how levels are packed."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_jax.codecs.quantize import (
    grid_quantize,
)
from qvg_jax.codecs.quantize.bitstream import pack_bits, packed_bits_width, unpack_bits
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
from tests.support.spans import code, energy, jit
from tests.support.spans import normal_tokens as tokens

pytestmark = pytest.mark.usefixtures("strict_dtypes")


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


pack = jit(pack_bits, static_argnums=1)
unpack = jit(unpack_bits, static_argnums=(1, 2))


@given(bits=st.integers(1, 8), count=st.integers(1, 50), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_bitstream(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, count), dtype=np.uint8)
    stream = np.unpackbits(codes[..., None], axis=-1)[..., 8 - bits :].reshape(2, -1)
    packed = pack(codes, bits)
    np.testing.assert_array_equal(packed, np.packbits(stream, axis=-1))
    assert packed.shape[1] == packed_bits_width(count, bits)
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)


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
