"""Min-max integers, NVFP4 and the E8 lattice, by their definitions."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qvg_jax.codecs.quantize import (
    lattice_quantize,
    minmax_quantize,
    nvfp4_quantize,
)
from qvg_jax.codecs.quantize.lattice import _nearest, _points, patterns
from tests.support.spans import code, energy, jit
from tests.support.spans import normal_tokens as tokens

pytestmark = pytest.mark.usefixtures("strict_dtypes")


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
