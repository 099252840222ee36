"""The dithered grid: its formula, its dither, its ends, channels of any size, and what is not finite."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequantize.dither import dither
from qvg_jax.codecs import presets
from qvg_jax.codecs.quantize.dithered import dithered_quantize
from qvg_jax.codecs.quantize.packing import unpack
from tests.support.spans import normal_tokens, round_trip

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def tokens(shape):
    return normal_tokens(0, shape)


def coded(codec, x):
    packed, _, decoded = round_trip(codec, x)
    return packed, np.asarray(decoded)


def fixed(group):
    """A grid without dither and with one step for loud and quiet channels."""
    return presets.get("rtn", group=group, mode="asymmetric")


def steps(packed):
    """The step of every value, in the units of x."""
    exponents = 2.0 ** np.asarray(packed.exponents_BH, np.float32)[..., None, None]
    scale = np.asarray(packed.scales_BHT1, np.float32) * exponents
    return scale * np.asarray(packed.deviations_BHD, np.float32)[:, :, None]


def test_a_code_and_its_dither_are_one_byte():
    x = tokens((2, 3, 50, 64)) * 5
    packed, decoded = coded(dithered_quantize(), x)
    t, c = np.mgrid[:50, :64]
    j = ((t * 0x63DE254D % 2**32 >> 26) + 37 * c) % 64
    byte = 64 * np.asarray(unpack(packed.codes_BHTC, 2), np.int64) + j
    np.testing.assert_allclose(decoded, (byte - 127.5) / 64 * steps(packed), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(dither(50, 64)), j)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_codes_are_the_nearest_and_ends_are_inside(bits, asymmetric):
    x = tokens((1, 2, 300, 64))
    n = 2**bits
    codec = dithered_quantize(bits, asymmetric=asymmetric, gain="none")
    packed, decoded = coded(codec, x)
    error = np.abs(decoded - np.asarray(x)) / steps(packed)
    codes = np.asarray(unpack(packed.codes_BHTC, bits))
    inner = (codes > 0) & (codes < n - 1)
    assert error[inner].max() <= 0.5 + 1e-3
    reach = (n - 0.5 if asymmetric else n - 0.25) * (1 + 1 / 16)  # e4m3 steps are up to 1/16 off
    moved = n / 16 * asymmetric  # and so are middles
    assert error.max() <= (reach - n + 2) / 2 + moved
    assert {0, n - 1} <= set(np.unique(codes))
    whole = dithered_quantize(bits, asymmetric=asymmetric, reach=n - 1, gain="none")
    packed, decoded = coded(whole, x)
    error = np.abs(decoded - np.asarray(x)) / steps(packed)
    assert error.max() <= 0.5 + (n - 1) / 16 / 2 + moved


@pytest.mark.parametrize("stride", [1, 24, 880, 1560])
def test_errors_of_like_tokens_cancel(stride):
    frames = 16
    x = np.tile(np.asarray(tokens((1, 1, stride, 64))), (1, 1, frames, 1))
    x = jnp.asarray(x)

    def shares(codec):
        """The energy of the error, and of its mean over the frames."""
        _, decoded = coded(codec, x)
        error = (decoded - np.asarray(x)).reshape(frames, stride, 64)
        return np.mean(error**2), np.mean(error.mean(0) ** 2)

    one, mean = shares(dithered_quantize(reach=3, gain="none"))
    assert mean < 0.6 * one / frames  # less than independent errors leave
    one, mean = shares(fixed(64))
    assert mean > 0.9 * one  # a fixed grid repeats its errors


def test_gains():
    x = tokens((1, 2, 400, 128))

    def along(**settings):
        """<x, x_hat> and |x_hat|^2, over |x|^2."""
        decoded = coded(dithered_quantize(**settings), x)[1]
        size = np.sum(np.asarray(x) ** 2)
        return np.sum(np.asarray(x) * decoded) / size, np.sum(decoded**2) / size

    assert along(gain="none", reach=3)[0] == pytest.approx(1, abs=5e-3)  # nothing to correct
    assert along(gain="none")[0] == pytest.approx(0.97, abs=0.02)
    assert along()[0] == pytest.approx(1, abs=5e-3)
    least = along(gain="lsq")
    assert least[0] == pytest.approx(least[1], rel=5e-3) and least[0] < 0.9
    assert along(gain=0.5)[1] == pytest.approx(1, abs=5e-3)  # keeps the energy


@pytest.mark.parametrize("name", ["dither", "dither-asym"])
def test_factors_of_channels_come_out_again(name):
    x = tokens((1, 2, 128, 64)) + 3
    factor = jnp.ones(64).at[jnp.array([3, 20, 41])].set(jnp.array([8.0, 1024.0, 1 / 32]))
    for codec in presets.pair(name, num_centroids=8):
        plain, scaled = (coded(codec, a)[1] for a in (x, x * factor[None, None, None]))
        np.testing.assert_array_equal(plain * np.asarray(factor), scaled)


def test_a_loud_channel_does_not_cost_the_others():
    x = np.asarray(tokens((1, 1, 512, 128))).copy()
    quiet = coded(dithered_quantize(), jnp.asarray(x))[1]
    loud = x.copy()
    loud[..., 5] *= 13
    louder = coded(dithered_quantize(), jnp.asarray(loud))[1]
    others = np.arange(128) != 5
    before, after = (np.mean((d - x)[..., others] ** 2) for d in (quiet, louder))
    assert after == pytest.approx(before, rel=0.02)
    there = coded(fixed(128), jnp.asarray(loud))[1]
    assert np.mean((there - x)[..., others] ** 2) > 2 * before


@pytest.mark.parametrize("size", [1e-12, 1440.0, 1e30])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_any_size_of_values(size, asymmetric):
    x = tokens((1, 2, 64, 64))
    codec = dithered_quantize(asymmetric=asymmetric)
    one = np.linalg.norm(coded(codec, x)[1] - np.asarray(x)) / np.linalg.norm(x)
    big = np.asarray(x, np.float64) * size
    decoded = coded(codec, jnp.asarray(big, jnp.float32))[1]
    assert np.linalg.norm(decoded - big) / np.linalg.norm(big) == pytest.approx(one, rel=0.05)


def test_zeros_and_what_is_not_finite():
    for asymmetric in (False, True):
        codec = dithered_quantize(asymmetric=asymmetric)
        assert not coded(codec, jnp.zeros((1, 1, 8, 64)))[1].any()
        x = tokens((1, 1, 32, 64))
        clean = coded(codec, x.at[0, 0, 3, :3].set(0))[1]
        bad = x.at[0, 0, 3, :3].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
        packed, decoded = coded(codec, bad)
        assert np.isfinite(decoded).all()
        np.testing.assert_array_equal(decoded[0, 0, :, 3:], clean[0, 0, :, 3:])
        codes = np.asarray(unpack(packed.codes_BHTC, 2))[0, 0, 3, 1:3]
        np.testing.assert_array_equal(codes, [3, 0])


def test_asymmetric_help_where_tails_have_one_side():
    x = jnp.abs(tokens((1, 1, 256, 128))) ** 2
    errors = [
        np.linalg.norm(coded(dithered_quantize(asymmetric=z), x)[1] - np.asarray(x))
        for z in (False, True)
    ]
    assert errors[1] < 0.65 * errors[0]


@pytest.mark.parametrize(("gain", "share"), [("none", -1), ("match", -1), (0.5, 0)])
def test_the_variance_that_it_adds(gain, share):
    x = tokens((1, 2, 400, 128))
    codec = dithered_quantize(reach=3, gain=gain)
    packed, decoded = coded(codec, x)
    energy = float(np.mean((decoded - np.asarray(x)) ** 2))
    added = float(np.mean(decoded**2) - np.mean(np.asarray(x) ** 2))
    assert codec.deficit is not None
    told = float(np.mean(np.asarray(codec.deficit(packed))))
    assert told == pytest.approx(share * energy, rel=0.06)
    assert -added == pytest.approx(told, abs=0.05 * energy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(bits=1), "bits=1 is not accepted: give 2, 3 or 4"),
        (dict(bits=8), "bits=8"),
        (dict(reach=2.9), "reach=2.9 is not accepted: give 3 to 5 at bits=2"),
        (dict(bits=3, reach=9.5), "reach=9.5 is not accepted: give 7 to 9"),
    ],
)
def test_bad_settings_name_themselves(settings, message):
    with pytest.raises(ValueError, match=message):
        dithered_quantize(**settings)


def test_bad_shapes_name_themselves():
    with pytest.raises(ValueError, match="head_dim=66"):
        dithered_quantize().init((1, 1, 8, 66))


def test_bits():
    shape = (1, 12, 37_440, 128)
    bits = 2 + 8 / 128 + 8 / 128 + 8 * 256 / 37_440
    for name, more in (("dither", 0), ("dither-asym", 8 / 128)):
        for codec in presets.pair(name):
            assert codec.bits_per_element(shape) == pytest.approx(bits + more, abs=2e-3)


@pytest.mark.parametrize("name", ["dither", "dither-asym"])
def test_a_dither_adds_only_elementwise_operations_to_decoding(name):
    """So XLA can decode it in one fusion, as it does mid-rise levels: one gather, of centroids, each."""
    shape = (1, 2, 96, 64)
    texts = []
    for recipe in (name, "midrise"):
        codec = presets.pair(recipe, num_centroids=8)[0]
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        form = jax.eval_shape(lambda x, c=codec: c.encode(x, c.init(x.shape, x.dtype))[0], x)
        traced = jax.jit(codec.decode).trace(form)
        texts.append(traced.lower(lowering_platforms=("cuda",)).as_text())
    ours, midrise = (collections.Counter(re.findall(r"stablehlo\.(\w+)", t)) for t in texts)
    assert ours["gather"] == midrise["gather"] and not re.search(r"tensor<[^>]*[iu]64>", texts[0])
    elementwise = {"iota", "broadcast_in_dim", "reshape", "convert", "bitcast_convert", "constant"}
    elementwise |= {"add", "subtract", "multiply", "divide", "shift_left"}
    elementwise |= {"shift_right_logical", "and", "or"}
    assert set(ours - midrise) <= elementwise
