"""A disk that is full, or cannot be written: nothing that was generated is lost."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from models.pocket_world import world
from tests.support.tiny_runs import Runner, stored

BLOCK_BYTES = 4 * world.HEIGHT * world.WIDTH * 3 * 4


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


@pytest.mark.slow
def test_a_disk_fills_up_and_is_made_larger(tmp_path):
    runner, out = Runner("pocket-world", tmp_path), tmp_path / "disk"
    runner.timeline(tmp_path / "whole")
    with small_disk(out, size=9 * BLOCK_BYTES) as remount:
        ended = runner.run(out, "--resume")
        assert ended.code == 2 and "Traceback" not in ended.said
        line = ended.said.splitlines()[-1]
        assert line.startswith("qvg: error: ") and "No space left on device" in line
        assert (before := stored(out)) > 0
        remount("ro")
        ended = runner.run(out, "--resume")
        assert ended.code == 2 and "Read-only file system" in ended.said.splitlines()[-1]
        assert stored(out) == before and "Traceback" not in ended.said
        remount(f"rw,size={10**8}")
        ended = runner.run(out, "--resume")
        assert ended.code == 0, ended.said
        assert runner.products(out) == runner.products(tmp_path / "whole")
