"""The benchmark of k-means on fewer tokens, at a small size."""

import json

import numpy as np
import pytest

from benchmarks import subsample


@pytest.mark.slow
def test_the_table_compares_with_learning_from_all_tokens(tmp_path, capsys):
    pocket, out = tmp_path / "pocket.npz", tmp_path / "out.json"
    x = np.random.default_rng(0).normal(size=(2, 1, 512, 128)).astype(np.float16)
    np.savez(pocket, k=x[0], v=x[1])
    here = ["--keys-and-values", str(pocket), "--clip", "8", "8", "8", "1", "--out", str(out)]
    found = subsample.main(
        [*here, "--recipes", "qvg", "--samples", "1", "2", "--iterations", "2:1"]
    )
    assert json.loads(out.read_text()) == found and len(found) == 4
    of = {key: found[f"qvg, {key}"] for key in ("made up, 2 1, 1", "pocket world, 2 1, 2")}
    assert 0 < of["made up, 2 1, 1"]["warm K"] < 1 and of["made up, 2 1, 1"]["cold attention"] > 0
    assert "cold attention" not in of["pocket world, 2 1, 2"]
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0][4].strip() == rows[0][5].strip() == "1.000, 1.000, 1.000"
    assert rows[2][4].strip() == "1.000, 1.000, -" and rows[1][4] != rows[0][4]
