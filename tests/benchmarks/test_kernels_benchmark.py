"""The benchmark of the kernels without a GPU: what it measures by XLA, and what users add."""

import argparse

import pytest

from benchmarks import kernels
from benchmarks.attention_cases import Row


@pytest.mark.slow
def test_other_implementations_are_timed_beside_ours(monkeypatch, capsys):
    monkeypatch.setattr(
        kernels, "ROWS", (Row("tiny", 2, 16, 512, 2), Row("wide", 1, 16, 512, 1, 64))
    )
    seen = []

    def mine(row, arrays):
        seen.append({name: x.shape for name, x in arrays.items() if name != "view"})
        return lambda: seen.append("run"), lambda: seen.append("wait")

    rows = kernels.attention_table(2, ["tiny"], ["xla"], also={"mine:f": mine})
    assert [(r["row"], r["read"]) for r in rows] == [("tiny", "xla"), ("tiny", "mine:f")]
    assert all(r["ms"] > 0 and r["keys"] == 2 * 512 + 16 for r in rows)
    shape = (1, 16, 2, 128)
    whole = (1, 1040, 2, 128)
    assert seen[0] == {"q": shape, "k": shape, "v": shape, "keys": whole, "values": whole}
    assert seen[1:3] == ["run", "wait"] and seen[-1] == "wait"  # the first call is not measured
    assert "tiny, mine:f" in capsys.readouterr().out
    (row,) = kernels.attention_table(1, ["wide"], ["xla"])
    assert row["row"] == "wide"


@pytest.mark.parametrize("text", ["json", "json:nothing", "no_such_module:f", ":f"])
def test_a_function_that_is_not_there_is_refused_before_anything_is_measured(text):
    with pytest.raises(argparse.ArgumentTypeError, match="give MODULE:FUNCTION"):
        kernels._named(text)
