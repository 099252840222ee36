"""An interrupted run of pocket world goes on to the bytes of an undisturbed one."""

import functools
import json
import os
import re
import signal

import pytest

from models.pocket_world import job, params, pipeline
from models.pocket_world.entry import Options
from qvg_jax.app import cli
from qvg_jax.app.film import REAL_SHOWN
from qvg_jax.app.video import Mp4
from tests.support.faulty_disk import ERRORS, FaultyDisk, Killed
from tests.support.tiny_runs import stored
from tests.support.tiny_world import FRAMES, TOUR, as_in_its_own_process, random_weights

ARMS = ("--codec", "qvg", "--compare", "bf16")
BLOCK = 4


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with (
        as_in_its_own_process(tmp_path_factory.getbasetemp()),
        pytest.MonkeyPatch.context() as patch,
    ):
        for module, name in ((params, "load_weights"), (pipeline, "make_step")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))  # compiled once
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def run(weights, capsys):
    """run(out, "--resume") -> exit code, stderr."""

    def run(out, *argv):
        common = ["generate", "--weights", str(weights), "--out", str(out)]
        code = cli.main([*common, f"--tour={TOUR}", f"--frames={FRAMES}", *ARMS, *argv])
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, weights):
    out = tmp_path_factory.mktemp("whole")
    sizes = [f"--tour={TOUR}", f"--frames={FRAMES}"]
    assert cli.main(["generate", "--weights", str(weights), "--out", str(out), *sizes, *ARMS]) == 0
    return products(out)


def products(out):
    """What a run leaves, but for its timings: the video's bytes and the report."""
    report = json.loads((out / "report.json").read_text())
    assert report.pop("timings")["total_seconds"] > 0
    left = {p.name for p in out.iterdir()}
    assert left == {".lock", "report.html", "report.json", "report.png", "video.mp4"}
    return (out / "video.mp4").read_bytes(), report


def test_sigterm_leaves_a_video_and_the_run_goes_on(run, whole, tmp_path, monkeypatch):
    add, number = Mp4.add, signal.SIGTERM

    def press(self, frame):
        add(self, frame)
        if self.frames == REAL_SHOWN + BLOCK + 2:
            signal.raise_signal(number)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Mp4, "add", press)
        code, err = run(tmp_path)
    assert code == 128 + number
    assert err.endswith(f"has the {REAL_SHOWN + 2 * BLOCK} frames so far; --resume goes on\n")
    assert signal.getsignal(number) is handler
    code, err = run(tmp_path)
    assert code == 2 and re.search(r"first \d blocks of this run, interrupted.*--resume", err)
    code, err = run(tmp_path, "--seed", "1", "--resume")
    assert code == 2 and "made with seed=0, now it is 1" in err
    assert run(tmp_path, "--resume")[0] == 0
    assert products(tmp_path) == whole
    made = (tmp_path / "video.mp4").stat().st_mtime_ns
    code, err = run(tmp_path, "--resume")  # nothing is left to do, and nothing is touched
    assert code == 0 and "from the beginning" not in err
    code, err = run(tmp_path, "--seed", "1", "--resume")
    assert code == 2 and "is finished and was made with other settings: " in err
    assert (tmp_path / "video.mp4").stat().st_mtime_ns == made and products(tmp_path) == whole


def test_faults_of_the_disk_one_after_another(run, whole, weights, tmp_path):
    """Each run ends at a fault a little further on, until the last finds a sound disk."""
    faults = ("full", "kill", "broken")
    for number, fault in enumerate(faults, 8):  # a block is written in 8 steps
        before = stored(tmp_path)
        with FaultyDisk(tmp_path, fails_at=number, fault=fault, begins=".bin") as disk:
            try:
                code, err = run(tmp_path, "--resume")
            except Killed:
                code = None
        assert disk.failed and stored(tmp_path) >= before
        if fault in ERRORS:
            line = err.splitlines()[-1]
            assert code == 2 and line.startswith("qvg: error: ") and "Traceback" not in err
            assert os.strerror(ERRORS[fault]) in line
    assert stored(tmp_path) >= len(faults)
    assert run(tmp_path, "--resume")[0] == 0
    assert products(tmp_path) == whole
    asked = Options(weights=str(weights), out=tmp_path, tour=TOUR, frames=FRAMES)
    assert job.prepare(asked)  # a finished run is replaced without asking
