"""The benchmark for any GPU: its whole way at small sizes, and what it says of ratios."""

import json

import jax
import pytest

from benchmarks import all as benchmark

DEVICE = "NVIDIA H100 80GB HBM3"


def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert benchmark.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "the default device is cpu" in err


@pytest.mark.slow
def test_the_whole_program_at_small_sizes(tmp_path, capsys):
    file, accepted = tmp_path / "mine.json", tmp_path / "accepted.json"
    run = ["--tiny", "--repeats", "1", "--json", str(file), "--accepted", str(accepted)]
    assert benchmark.main([*run, "--accept"]) == 0
    kind, result = jax.devices()[0].device_kind, json.loads(file.read_text())
    assert f"{kind} has no accepted ratios" in capsys.readouterr().out
    assert result["device"] == kind and result["jax"] == jax.__version__ and not result["left_out"]
    found = benchmark.ratios(result)
    assert found.keys() == {"attention: tiny, xla", "encode: 3x1536, rtn, xla"}
    assert all(ratio > 0 for ratio in found.values())
    assert json.loads(accepted.read_text())[kind]["ratios"] == found


def test_what_has_not_begun_in_time_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "BUDGET", -1.0)
    result = benchmark.measure(1, tiny=True)
    assert result["left_out"] == ["attention: tiny", "encode: 3x1536, rtn"]
    assert "left out: attention: tiny" in capsys.readouterr().out


def test_only_a_ratio_that_is_worse_than_accepted_is_named(capsys):
    known = json.loads(benchmark.ACCEPTED.read_text())
    accepted = known[DEVICE]["ratios"]
    assert not benchmark.compared(DEVICE, accepted, known, 0.08)
    name = "attention: worldplay, cudnn"
    other = accepted | {name: 1.08 * accepted[name] + 1e-3, "attention: longcat, mosaic": 0.5}
    assert benchmark.compared(DEVICE, other, known, 0.08) == [name]
    out = capsys.readouterr().out
    assert "faster" in out and f"slower by more than 8%: {name}" in out
    del other[name]
    assert not benchmark.compared(DEVICE, other, known, 0.08)
