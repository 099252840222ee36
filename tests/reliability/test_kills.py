"""Processes that are killed go on to the bytes of a run that nothing disturbed."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny_runs import RUNS, Runner, at, playable_frames, said_frames, stored

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CHAINS, KILLS = 10, 5  # of a model at night; the kills of a chain come one after another
IN_START_UP = 0.2  # share of the kills that come before the first block is stored


class Undisturbed:
    """A model's run that nothing disturbed: when it stored its blocks, and what it left."""

    def __init__(self, model: str, folder: Path):
        self.runner = Runner(model, folder)
        self.times = self.runner.timeline(folder / "whole")
        self.products = self.runner.products(folder / "whole")

    def random_points(self, rng: np.random.Generator, count: int) -> list[float]:
        """Shares of the run's time, in their order."""
        first = self.times[0] / self.times[-1]
        early = rng.random(count) < IN_START_UP
        points = np.where(early, rng.uniform(0, first, count), rng.uniform(first, 1, count))
        return sorted(points.tolist())

    def survives(self, out: Path, points: Sequence[float], rng: np.random.Generator) -> int:
        """Kills a run at each point, and goes on after each; how many kills came before its end.

        Every other process writes a video that grows; the last one has an odd clock and locale.
        """
        kills = 0
        for i, (point, number) in enumerate(
            zip(points, rng.permutation(SIGNALS * 9), strict=False)
        ):
            before, number = stored(out), signal.Signals(number)
            argv = ["--resume", *(["--stream"] if i % 2 else [])]
            ended = self.runner.run(out, *argv, until=at(point, self.times, out), number=number)
            told = f"{number.name} at {point:.3f}, exit code {ended.code}: {ended.said}"
            assert "Traceback" not in ended.said, told
            assert ended.code in (0, -number, 128 + number), told
            assert stored(out) >= before or (out / "report.json").exists(), told
            if (frames := said_frames(ended.said)) is not None:
                assert playable_frames(out / "video.mp4") == frames, told
            elif (out / "video.mp4").exists():
                assert playable_frames(out / "video.mp4") > 0, told
            kills += ended.code != 0
        for file in out.rglob("*"):
            os.utime(file, (4e9, 4e9))
        ended = self.runner.run(out, "--resume", odd=True)
        assert ended.code == 0, ended.said
        found = self.runner.products(out)
        assert found.keys() == self.products.keys()
        assert not [name for name in found if found[name] != self.products[name]]
        return kills


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pocket-world", "self-forcing"])
def test_a_killed_run_goes_on(tmp_path, model):
    whole, rng = Undisturbed(model, tmp_path), np.random.default_rng(0)
    first = whole.times[0] / whole.times[-1]
    points = [first + (1 - first) * share for share in (0.2, 0.5)]
    assert whole.survives(tmp_path / "killed", points, rng) == 2


@pytest.fixture(scope="module")
def undisturbed(request, tmp_path_factory):
    return Undisturbed(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.nightly
@pytest.mark.parametrize("undisturbed", RUNS, indirect=True)
def test_fifty_kills(undisturbed, tmp_path):
    kills = 0
    for chain in range(CHAINS):
        rng = np.random.default_rng([0, chain])
        points = undisturbed.random_points(rng, KILLS)
        kills += undisturbed.survives(tmp_path / str(chain), points, rng)
        print(
            f"{undisturbed.runner.model}: {kills} kills in {chain + 1} runs, all went on",
            flush=True,
        )
    assert kills > CHAINS * KILLS * 0.8  # the others came when the run had just ended
