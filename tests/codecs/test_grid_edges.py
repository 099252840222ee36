"""What every quantizer of scales does with numbers of any size, with nothing, and with bad input."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_jax.codecs.quantize import (
    allocated_quantize,
    dithered_quantize,
    grid_quantize,
    lattice_quantize,
    minmax_quantize,
    nvfp4_quantize,
)
from tests.support.spans import code, energy
from tests.support.spans import normal_tokens as tokens

pytestmark = pytest.mark.usefixtures("strict_dtypes")


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


@pytest.mark.parametrize("codec", [grid_quantize(gain=2.0), dithered_quantize(gain=2.0)])
def test_a_token_of_zeros_is_zero_whatever_the_gain(codec):
    """Zero has no negative power."""
    _, hat = code(codec, tokens(3).at[:, :, 1].set(0))
    assert np.isfinite(hat).all() and not hat[:, :, 1].any() and hat[:, :, 0].all()


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
