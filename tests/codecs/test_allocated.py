"""Bits by channel: the allocation is the best one, and is worth its bookkeeping."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_jax.codecs.quantize import (
    allocated_quantize,
    grid_quantize,
)
from qvg_jax.codecs.quantize.allocated import allocate
from qvg_jax.codecs.quantize.levels import (
    best_ratio,
    midrise_levels,
    normal_error,
)
from tests.support.spans import code, energy
from tests.support.spans import normal_tokens as tokens

pytestmark = pytest.mark.usefixtures("strict_dtypes")


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
