"""Files of a run survive every fault of the disk at every operation."""

import contextlib
from pathlib import Path

import numpy as np
import pytest

from qvg_jax.app import saved_blocks
from qvg_jax.app.saved_blocks import SavedBlocks
from qvg_jax.app.video import Mp4
from qvg_jax.errors import UserError
from qvg_jax.files import replacing
from tests.support.faulty_disk import FAULTS, FaultyDisk, Killed
from tests.support.tiny_runs import playable_frames

ARMS, SHAPE, COUNT = ("bf16", "qvg:bits=2"), (2, 3), 2
BLOCKS = np.random.default_rng(0).normal(size=(len(ARMS), COUNT, *SHAPE)).astype(np.float32)
OLD, NEW = "of the run before", "of this run"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Versions are looked up once: they cost more than all the rest."""
    known = saved_blocks.versions()
    monkeypatch.setattr(saved_blocks, "versions", lambda: known)


class Run:
    """All that a run does to its folder, but for the video; counts the blocks that it was told are safe."""

    def __init__(self, folder: Path, request: dict):
        self.folder, self.request, self.safe = folder, request, dict.fromkeys(ARMS, 0)

    def go(self, *, keep: bool, **which: bool) -> None:
        saved = SavedBlocks(self.folder / "saved", self.request, SHAPE, np.float32, **which)
        kept = {}
        for blocks, arm in zip(BLOCKS, ARMS, strict=True):
            kept[arm] = len(found := saved.read(arm))
            assert kept[arm] >= self.safe[arm]
            np.testing.assert_array_equal(found, blocks[: len(found)])
        for number in range(COUNT):
            for blocks, arm in zip(BLOCKS, ARMS, strict=True):
                if number >= kept[arm]:
                    saved.add(arm, number, blocks[number])
                    self.safe[arm] = number + 1
        with replacing(self.folder / "report.json") as partial:
            partial.write_text(NEW)
        if not keep:
            self.safe = dict.fromkeys(ARMS, 0)  # the run is whole without them
        saved.finish(keep=keep)

    def products(self) -> dict[str, bytes]:
        files = (p for p in self.folder.rglob("*") if p.is_file())
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in files}


def folder_of_an_older_run(path: Path) -> Path:
    """A finished run of another request is there; it is replaced."""
    with FaultyDisk(path):
        path.mkdir()
        Run(path, {"seed": 0}).go(keep=True)
        (path / "report.json").write_text(OLD)
    return path


@pytest.mark.parametrize(
    "fault, keep", [*((fault, True) for fault in FAULTS), ("full", False), ("kill", False)]
)
def test_no_fault_loses_a_block_or_tears_a_file(tmp_path, fault, keep):
    """The first run ends at its n-th operation, for every n; the second goes on."""
    with FaultyDisk(tmp_path) as disk:
        whole = Run(folder_of_an_older_run(tmp_path / "whole"), {"seed": 1})
        before = len(disk.operations)
        whole.go(keep=keep)
    count = len(disk.operations) - before
    assert count > 30
    failed = 0
    for number in range(count):
        run = Run(folder_of_an_older_run(tmp_path / f"at {number}"), {"seed": 1})
        with (
            FaultyDisk(run.folder, fails_at=number, fault=fault) as disk,
            contextlib.suppress(OSError, Killed),
        ):
            run.go(keep=keep)
        failed += disk.failed
        assert (run.folder / "report.json").read_text() in (OLD, NEW)
        with FaultyDisk(run.folder):
            go_on(run, keep)
        assert run.products() == whole.products(), (number, disk.operations[-1])
    assert failed == count or (fault == "full" and failed > count / 2)  # the end needs no room


def go_on(run: Run, keep: bool) -> None:
    try:
        run.go(keep=keep, resume=True)
    except UserError as error:  # it ended before it began: what is there is the older run
        assert "made with seed=0" in str(error) and not any(run.safe.values())
        run.go(keep=keep)


class Film:
    """A video of six frames; counts those that were taken without an error."""

    def __init__(self, path: Path, **options: bool):
        self.video = Mp4(path, 8, **options)

    def go(self) -> None:
        with self.video:
            for shade in range(6):
                self.video.add(np.full((32, 48, 3), 40 * shade, np.uint8))


@pytest.mark.parametrize(
    "fault, growing",
    [(fault, growing) for growing in (False, True) for fault in FAULTS if fault != "read-only"],
)
def test_a_video_is_the_older_one_or_whole_or_plays(tmp_path, fault, growing):
    path = tmp_path / "video.mp4"
    Film(path, growing=growing).go()
    whole = path.read_bytes()
    with FaultyDisk(tmp_path) as disk:
        Film(path, growing=growing).go()
    assert path.read_bytes() == whole and len(disk.operations) > 3
    for number in range(len(disk.operations)):
        path.write_text(OLD)
        film = Film(path, growing=growing)
        with (
            FaultyDisk(tmp_path, fails_at=number, fault=fault) as disk,
            contextlib.suppress(OSError, Killed),
        ):
            film.go()
        told = number, disk.operations[-1]
        if not growing:
            assert path.read_bytes() in (OLD.encode(), whole), told
            clean = fault in ("full", "broken") and told[1] != ("unlink", "video.mp4.partial")
            assert not clean or [p.name for p in tmp_path.iterdir()] == ["video.mp4"]
        elif film.video.frames > 1 and fault != "power cut":
            # The muxer holds a frame back until it knows how long it lasts.
            assert playable_frames(path) >= film.video.frames - 2, told
