"""The benchmark of WorldPlay runs, at a size where its numbers mean nothing."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_arms_and_limit_at_hardly_any_size(tmp_path):
    argv = ["--tiny", "--layers", "1", "--height", "64", "--width", "64", "--frames", "16"]
    argv += ["--arms", "single,cudnn", "--out", str(tmp_path)]
    argv += ["--codec", "qvg:num_centroids=4:group=32"]
    command = [sys.executable, "-m", "benchmarks.worldplay", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-2000:]
    results = json.loads((tmp_path / "worldplay.json").read_text())
    arms = results["blocks"]["arms"]
    assert list(arms) == ["single", "cudnn"]
    for name, arm in arms.items():
        assert arm["finite"] and len(arm["block_seconds"]) == len(arm["context_seconds"]) == 2
        assert arm["cache_bytes"] < arm["bf16_bytes"] or name == "cudnn"
    # A latent frame is 4 tokens of 2 heads, two encodings, K and V, 32 channels, two bytes.
    assert arms["cudnn"]["bf16_bytes"] == 12 * 4 * 2 * 2 * 2 * 32 * 2
    assert results["limit"]["ok"] and results["limit"]["finite"]
    assert "x of cudnn" in done.stdout and "16 latent frames" in done.stdout
