"""The model on paper of many devices."""

import dataclasses
import json

import pytest

from benchmarks.scale import measured_from, table, workload
from qvg_jax.cache.plan import Plan
from qvg_jax.study.scale import Measured, predict, scale_table

WORK = workload("qvg", history=150, span=24)
TIMES = Measured(network=1.0, attention=2.0, encode=0.8, fixed=0.1, link=300e9, latency=0.0)


def test_the_work_of_self_forcing_follows_from_its_sizes():
    assert (WORK.tokens, WORK.spans, WORK.span_tokens, WORK.passes) == (4680, 6, 37440, 5)
    bf16 = 2 * 2 * WORK.span_tokens * WORK.kv_heads * WORK.head_dim
    assert 6.5 < bf16 / WORK.span_bytes < 8


def test_one_device_waits_for_nobody():
    for axis in ("heads", "spans", "ring"):
        found = predict(Plan(**{axis: 1}), WORK, TIMES)
        assert found.seconds == pytest.approx(0.1 + 1 + 2 + 0.8 / 8)
        assert (found.exchange, found.sent, found.speedup) == (0, 0, pytest.approx(1))


def test_seconds_are_the_sum_that_the_docstring_writes():
    n, T, M = 2, 4680, 12 * 128
    found = predict(Plan(heads=n), WORK, TIMES)
    sent = 30 * 5 * 0.5 * 4 * 2 * T * M / n
    assert found.sent == pytest.approx(sent)
    assert found.seconds == pytest.approx(0.1 + 1.5 + 0.1 + sent / 300e9)
    spans = predict(Plan(spans=n), WORK, TIMES)  # three spans each: as even as heads
    sent = 30 * 5 * 0.5 * (2 * T * M + 4 * T * (M + 12) + 8 * T * 12)
    gathered = 30 * 0.5 * 37440 * M * 2 * 2 / 8
    assert spans.sent == pytest.approx(sent + gathered)
    assert spans.seconds == pytest.approx(0.1 + 1.5 + 0.1 + (sent + gathered) / 300e9)


def test_spans_that_devices_share_unevenly_take_the_time_of_the_most():
    work = dataclasses.replace(WORK, spans=5)
    slow, even = (predict(Plan(spans=2), w, TIMES) for w in (work, WORK))
    assert slow.seconds > even.seconds


def test_a_ring_waits_only_for_what_attention_does_not_hide():
    assert predict(Plan(ring=2), WORK, TIMES).exchange == 0
    slow = dataclasses.replace(TIMES, link=1e9)
    ring = predict(Plan(ring=2), WORK, slow)
    kv = 2 * 4680 * 12 * 128 * 2
    sent = 150 * 0.5 * (6 * WORK.span_bytes + kv)
    assert ring.sent == pytest.approx(sent)
    assert ring.exchange == pytest.approx(sent / 1e9 - 1.0)
    more = predict(
        Plan(ring=2), dataclasses.replace(WORK, slots=8), slow
    )  # two are empty, and go along
    assert more.sent - ring.sent == pytest.approx(150 * 0.5 * 2 * WORK.span_bytes)


def test_shared_weights_are_gathered_for_each_layer_and_pass():
    shared = dataclasses.replace(WORK, layer_bytes=80_000_000)
    for plan in (Plan(spans=4), Plan(heads=4)):
        more, less = (predict(plan, w, TIMES) for w in (shared, WORK))
        assert more.sent - less.sent == pytest.approx(150 * 0.75 * 80_000_000)
        assert more.seconds - less.seconds == pytest.approx((more.sent - less.sent) / 300e9)


def test_the_table_has_the_plans_that_divide_the_work():
    found = scale_table((2, 8, 64), WORK, TIMES)
    plans = [(p.plan.devices, p.plan.axis) for p in found]
    assert plans == [(2, "heads"), (2, "spans"), (2, "ring")] + [
        (n, axis) for n in (8, 64) for axis in ("spans", "ring")
    ]
    lines = table(found).splitlines()
    assert "devices" in lines[0] and len([x for x in lines if " x" in x]) == len(found)
    with pytest.raises(ValueError, match="heads=8 does not divide heads=12"):
        predict(Plan(heads=8), WORK, TIMES)


def test_measured_times_are_checked():
    given = dict(network=1, attention=2, link=1e9, device="a card")
    assert measured_from(json.dumps(given)) == Measured(network=1, attention=2, link=1e9)
    with pytest.raises(ValueError, match="measured times lack attention"):
        measured_from('{"network": 1}')
    with pytest.raises(ValueError, match="link=0 is not accepted: give a number > 0"):
        Measured(network=1, attention=2, link=0)
