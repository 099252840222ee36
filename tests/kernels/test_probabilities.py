"""Probabilities in e4m3 by arithmetic on bits: every thread of a warpgroup, in numpy."""

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.dequant_attention.probabilities import SHIFT, of_thread
from pallas_kernels.dequant_attention.reference import MASK_VALUE
from pallas_kernels.gpu.lanes import Lane
from tests.support.lane_machine import Machine, Value

ROWS, COLUMNS = 64, 256
LEAST = 1e-30  # the scale of a query of zeros


@pytest.fixture
def probabilities(monkeypatch):
    """`of_thread` on a matrix of logits in the layout of products: P (64, 256) and the new m."""
    machine = Machine()
    machine.install(monkeypatch)
    machine.one_cta()
    thread = np.arange(128)
    row = thread // 32 * 16 + thread % 32 // 4
    column = thread % 4 * 2

    def run(s, m, scale):
        lane = lambda x: Lane(Value(np.asarray(x, np.float32), "f32"))  # noqa: E731
        numbers = [
            [(lane(s[r, column + g]), lane(s[r, column + g + 1])) for g in range(0, COLUMNS, 8)]
            for r in (row, row + 8)
        ]
        per_row = [[lane(np.broadcast_to(x, ROWS)[r]) for r in (row, row + 8)] for x in (m, scale)]
        words, m_new = of_thread(numbers, *per_row)
        p, m_out = np.full((ROWS, COLUMNS), np.nan), np.full(ROWS, np.nan)
        for r, its_words, its_m in zip((row, row + 8), words, m_new, strict=True):
            m_out[r] = its_m.value.x
            np.testing.assert_array_equal(m_out[r], its_m.value.x)  # in all threads of a row
            for i, word in enumerate(its_words):
                four = (
                    np.ascontiguousarray(word.value.x).view(ml_dtypes.float8_e4m3fn).reshape(-1, 4)
                )
                for j in range(4):
                    p[r, column + 16 * i + 8 * (j // 2) + j % 2] = four[:, j]
        return p, m_out

    return run


def _logits(spread, rng=None):
    rng = np.random.default_rng(0) if rng is None else rng
    return rng.standard_normal((ROWS, COLUMNS)).astype(np.float32) * spread


def test_they_are_as_close_as_rounding_the_powers_themselves(probabilities):
    s, scale = _logits(300.0), 0.01
    p, m = probabilities(s, MASK_VALUE, scale)
    x = s.astype(np.float64) * scale - m[:, None]
    counts = x > -4
    rounded = np.exp2(x).astype(ml_dtypes.float8_e4m3fn)
    errors = [(y / np.exp2(x) - 1)[counts] for y in (p, rounded.astype(np.float64))]
    ours, right = (np.sqrt(np.mean(e**2)) for e in errors)
    assert 0.02 < right < 0.03 and ours < 1.03 * right
    assert abs(np.mean(errors[0]) - np.mean(errors[1])) < 1e-3
    assert np.abs(errors[0]).max() < 0.07
    # Columns by the units for powers and columns by bits are weighed alike.
    by_units = np.broadcast_to(np.arange(COLUMNS) // 16 % 4 == 3, counts.shape)[counts]
    assert abs(errors[0][by_units].mean() - errors[0][~by_units].mean()) < 4e-3


def test_the_largest_probability_is_in_the_middle_of_the_range(probabilities):
    for spread in (1e-4, 1.0, 30.0, 1000.0):
        s = _logits(spread)
        p, m = probabilities(s, MASK_VALUE, 1.0)
        x = s.max(axis=1) - m
        assert (p.max(axis=1) <= 256).all() and (p >= 0).all()
        assert (x <= SHIFT + 0.03).all() and (x >= SHIFT - max(0.2, spread / 500)).all()


def test_m_only_grows_and_stays_where_it_is(probabilities):
    s = _logits(5.0)
    _, m = probabilities(s, MASK_VALUE, 1.0)
    p, again = probabilities(s, m, 1.0)
    np.testing.assert_array_equal(again, m)
    p_low, still = probabilities(s - 100, m, 1.0)
    np.testing.assert_array_equal(still, m)
    assert p.max() > 200 and p_low.max() == 0


def test_m_does_not_move_over_many_tiles(probabilities):
    """Made anew from itself at each tile, m would lose a step each time if it were rounded on the way."""
    largest = np.concatenate(
        [np.geomspace(0.1, 7000, 50), np.arange(7, 14), -np.geomspace(0.1, 900, 7)]
    )
    s = np.full((ROWS, COLUMNS), MASK_VALUE, np.float32)
    s[:, 5] = np.float16(largest)  # as many as rows
    p_first, first = probabilities(s, MASK_VALUE, 1.0)
    m = first
    for _ in range(50):
        p, m = probabilities(s, m, 1.0)
    np.testing.assert_array_equal(m, first)
    np.testing.assert_array_equal(p, p_first)


@pytest.mark.parametrize("scale", [0.05, LEAST, 0.0], ids=["usual", "zeros", "zero"])
def test_masked_keys_count_nothing(probabilities, scale):
    """Also for a query of zeros, whose scale is tiny: its other keys count all the same."""
    s = _logits(20.0) if scale > LEAST else np.zeros((ROWS, COLUMNS), np.float32)
    s[:, 100:] = MASK_VALUE
    p, m = probabilities(s, MASK_VALUE, scale)
    assert (p[:, 100:] == 0).all() and np.isfinite(m).all()
    if scale <= LEAST:
        assert np.abs(p[:, :100] / 256 - 1).max() < 0.13  # one step of e4m3


def test_a_nan_reaches_its_row_and_no_other(probabilities):
    s = _logits(20.0)
    s[3, 77] = np.nan
    p, m = probabilities(s, MASK_VALUE, 0.05)
    assert np.isnan(m[3]) and np.isnan(p[3]).all()
    others = np.delete(np.arange(ROWS), 3)
    assert np.isfinite(m[others]).all() and np.isfinite(p[others]).all()


@pytest.mark.parametrize("largest", [2000.0, 7900.0])
def test_large_logits_leave_one_key(probabilities, largest):
    s = _logits(1.0)
    s[:, 20], s[:, 200] = 6e4, 3e4
    p, m = probabilities(s, MASK_VALUE, largest / 6e4)
    assert (p[:, 20] > 0).all() and (p[:, 20] <= 256).all() and np.isfinite(m).all()
    assert (np.delete(p, 20, axis=1) == 0).all()


def test_beyond_float16_nothing_counts(probabilities):
    p, m = probabilities(np.full((ROWS, COLUMNS), 6e4, np.float32), MASK_VALUE, 0.2)
    assert np.isposinf(m).all() and (p == 0).all()
