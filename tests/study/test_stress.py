"""Made-up tensors with heavy tails: they have the statistics that their docstring says, and judge codecs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvg_jax.errors import UserError
from qvg_jax.study.stress import LARGEST_VALUE, LOUD_HEAD, stress
from qvg_jax.study.tune import Bench


@pytest.fixture(scope="module")
def made():
    return stress(3)


def test_sizes_and_seeds(made):
    assert made.k_LBHTD.shape == made.v_LBHTD.shape == (1, 1, 4, 3072, 128)
    assert made.q_LBHQD.shape == (1, 1, 4, 256, 128)
    small = dict(frames=2, height=4, width=4, heads=1, queries=8)
    one, same, other = stress(1, **small), stress(1, **small), stress(2, **small)
    for field in ("k_LBHTD", "v_LBHTD", "q_LBHQD"):
        np.testing.assert_array_equal(getattr(one, field), getattr(same, field))
        assert not np.array_equal(getattr(one, field), getattr(other, field))


def test_keys_have_loud_channels_and_a_loud_head(made):
    size_HD = np.sqrt(np.mean(made.k_LBHTD[0, 0] ** 2, axis=1))
    contrast_HD = np.sort(size_HD / np.median(size_HD, axis=1, keepdims=True), axis=1)
    assert contrast_HD[:, -3:].min() > 4 and contrast_HD[:, -3:].max() < 15
    assert contrast_HD[:, -4].max() < 3
    norm_H = np.median(np.linalg.norm(made.k_LBHTD[0, 0], axis=-1), axis=1)
    assert norm_H[0] / np.median(norm_H[1:]) == pytest.approx(LOUD_HEAD, rel=0.3)


def test_values_have_heavy_tails(made):
    v_HTD = np.abs(made.v_LBHTD[0, 0])
    assert v_HTD[0].max() == v_HTD.max() == LARGEST_VALUE
    assert v_HTD.max() / np.median(v_HTD) > 100


def test_frames_repeat(made):
    k_FND = made.k_LBHTD[0, 0, 1].reshape(12, 256, 128)
    k_FND = k_FND - k_FND.mean((0, 1))
    a, b = k_FND[4], k_FND[9]
    cosine = np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.median(cosine) > 0.75 and np.quantile(cosine, 0.05) < 0.6


def test_attention_is_neither_flat_nor_a_copy(made):
    q, k = (jnp.asarray(x[0, 0]) for x in (made.q_LBHQD, made.k_LBHTD))
    weights = jax.nn.softmax(jnp.einsum("hqd,htd->hqt", q, k) / np.sqrt(128), -1)
    tokens_H = np.mean(1 / np.sum(np.asarray(weights) ** 2, -1), -1)
    assert tokens_H.min() > 5 and tokens_H.max() < 1000


def test_tails_can_be_left_out():
    small = dict(frames=3, height=8, width=8, heads=2, queries=16)
    calm = stress(0, tails=False, **small)
    size_HD = np.sqrt(np.mean(calm.k_LBHTD[0, 0] ** 2, axis=1))
    assert (size_HD.max(1) / np.median(size_HD, 1)).max() < 3
    assert np.abs(calm.v_LBHTD).max() < 10


def test_dithered_grids_stand_the_stress(made):
    half = {
        f.name: getattr(made, f.name)[:, :, :2] if f.name[0] in "kvq" else getattr(made, f.name)
        for f in dataclasses.fields(made)
    }
    bench = Bench(dataclasses.replace(made, **half), 3072)
    errors = {
        name: bench.score(f"{name}:num_centroids=64").attention_error
        for name in ("qvg", "qvg-asym", "midrise", "dither")
    }
    assert errors["dither"] < 0.7 * min(e for name, e in errors.items() if name != "dither")


def test_bad_sizes_name_themselves():
    with pytest.raises(UserError, match="'frames': 0"):
        stress(frames=0)
    with pytest.raises(UserError, match="'head_dim': 4"):
        stress(head_dim=4)
    with pytest.raises(UserError, match="queries=300 is not accepted: give at most 256"):
        stress(queries=300)
