"""Processes that are killed, or whose disk is full, go on to the bytes of a run that nothing disturbed."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from models.pocket_world import world
from tests.support.tiny_runs import RUNS, Runner, at, playable_frames, said_frames, stored

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CHAINS, KILLS = 10, 5  # of a model at night; the kills of a chain come one after another
HEADER = 2048  # bytes of a growing video that has no frame yet, at most
BLOCK_BYTES = 4 * world.HEIGHT * world.WIDTH * 3 * 4  # of pocket world


class Undisturbed:
    """A model's run that nothing disturbed: when it stored its blocks, and what it left."""

    def __init__(self, model: str, folder: Path):
        self.runner = Runner(model, folder)
        self.times = self.runner.timeline(folder / "whole")
        self.products = self.runner.products(folder / "whole")

    def random_points(self, rng: np.random.Generator, count: int) -> list[float]:
        """Points between the start and the end of the process, in their order; see `at`."""
        return sorted(rng.uniform(0, len(self.times), count).tolist())

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
            told = f"{number.name} at block {point:.2f}, exit code {ended.code}: {ended.said}"
            assert "Traceback" not in ended.said, told
            assert ended.code in (0, -number, 128 + number), told
            assert stored(out) >= before or (out / "report.json").exists(), told
            if (frames := said_frames(ended.said)) is not None:
                assert playable_frames(out / "video.mp4") == frames, told
            elif (out / "video.mp4").exists() and (out / "video.mp4").stat().st_size > HEADER:
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


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A file system of so many bytes, and a function that changes its options."""
    folder.mkdir()

    def mount(*words: str) -> None:
        subprocess.run(["mount", *words, str(folder)], check=True, capture_output=True, text=True)

    try:
        mount("-t", "tmpfs", "-o", f"size={size}", "none")
    except FileNotFoundError:
        pytest.skip("this machine has no mount command")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no file system can be mounted here: {error.stderr.strip()}")
    try:
        yield lambda options: mount("-o", f"remount,{options}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(request, tmp_path_factory):
    return Undisturbed(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
@pytest.mark.parametrize("undisturbed", ["self-forcing"], indirect=True)
def test_a_killed_run_goes_on(undisturbed, tmp_path):
    middle = len(undisturbed.times) / 2
    assert undisturbed.survives(tmp_path / "out", [middle], np.random.default_rng(0)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("undisturbed", ["pocket-world"], indirect=True)
def test_a_disk_fills_up_and_is_made_larger(undisturbed, tmp_path):
    """And then the run is killed, too."""
    runner, out = undisturbed.runner, tmp_path / "disk"
    with small_disk(out, size=9 * BLOCK_BYTES) as remount:
        ended = runner.run(out)
        assert ended.code == 2 and "Traceback" not in ended.said
        line = ended.said.splitlines()[-1]
        assert line.startswith("qvg: error: ") and "No space left on device" in line
        assert (before := stored(out)) > 0
        remount("ro")
        ended = runner.run(out, "--resume")
        assert ended.code == 2 and "Read-only file system" in ended.said.splitlines()[-1]
        assert stored(out) == before and "Traceback" not in ended.said
        remount(f"rw,size={10**8}")
        later = (before + len(undisturbed.times)) / 2
        assert undisturbed.survives(out, [later], np.random.default_rng(1)) == 1


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
