"""Reading of profiler events; the trace itself needs a GPU."""

import pytest

from benchmarks.device_time import collected, table


def test_times_of_two_equal_calls_are_averaged_and_the_gap_between_them_is_left_out():
    one = [("decode", 0, 3000), ("attend", 4000, 10_000), ("decode", 14_000, 3000)]
    two = [(name, start + 90_000, duration) for name, start, duration in one]
    profile = collected([*two, *one], 2)
    assert list(profile.kernels) == ["attend", "decode"]
    assert profile.kernels["decode"] == pytest.approx((0.006, 2.0))
    assert profile.busy_ms == pytest.approx(0.016)
    assert profile.gaps_ms == pytest.approx(0.001)
    text = table(profile, most=1)
    assert "attend" in text and "decode" not in text and "others" in text


def test_overlapping_kernels_are_busy_once():
    profile = collected([("a", 0, 4000), ("b", 1000, 1000), ("c", 3000, 3000)], 1)
    assert profile.busy_ms == pytest.approx(0.006) and profile.gaps_ms == 0
