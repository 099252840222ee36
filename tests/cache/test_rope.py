"""Rotary tables: pairs of channels turned by positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from qvg_jax.cache.rope import axial_rope, frequency_ladder

ROPE = axial_rope([frequency_ladder(4), frequency_ladder(2), frequency_ladder(2)])


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_axial_rope_multiplies_pairs_by_unit_complex_numbers(pairing):
    ladders = [frequency_ladder(4), (), frequency_ladder(8, theta=100.0)]
    rng = np.random.default_rng(0)
    x, pos = rng.normal(size=(2, 3, 5, 12)), rng.uniform(-50, 50, size=(2, 5, 3))
    angle = np.concatenate([pos[..., a, None] * np.array(w) for a, w in enumerate(ladders)], -1)
    half = pairing == "half"
    pairs = x.reshape(2, 3, 5, 2, 6).swapaxes(-1, -2) if half else x.reshape(2, 3, 5, 6, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None]
    want = np.stack([turned.real, turned.imag], -1)
    want = want.swapaxes(-1, -2) if half else want
    rope = axial_rope(ladders, pairing=pairing)
    table = rope.table(jnp.asarray(pos, jnp.float32))
    got = rope.rotate(jnp.asarray(x, jnp.float32), table)
    np.testing.assert_allclose(got, want.reshape(x.shape), atol=3e-5)  # float32 angles of 50 rad
    low = rope.rotate(jnp.asarray(x, jnp.bfloat16), table)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), want.reshape(x.shape), atol=3e-2)


def test_frequency_ladder_is_geometric():
    np.testing.assert_allclose(frequency_ladder(8, 10000.0), [1.0, 0.1, 0.01, 0.001], rtol=1e-12)
    assert frequency_ladder(0) == ()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: frequency_ladder(7), "channels=7 is not accepted: give an even number"),
        (lambda: frequency_ladder(8, 0.0), "theta=0.0 is not accepted"),
        (lambda: axial_rope([]), "is empty; give at least one frequency"),
        (lambda: axial_rope([(1.0,)], pairing="quarter"), "pairing='quarter' is not accepted"),
        (lambda: ROPE.table(jnp.zeros((1, 4))), "positions have 4 components"),
        (
            lambda: ROPE.rotate(jnp.zeros((1, 1, 1, 6)), ROPE.table(jnp.zeros((1, 1, 3)))),
            r"head_dim=6 .* rotates 8 channels",
        ),
    ],
)
def test_rope_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
