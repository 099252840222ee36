"""Bad input, full disks and Ctrl-C: one line, the right exit code, and files that stay valid."""

import errno
import os
import signal
import subprocess
import sys

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.pocket_world import job, pipeline
from models.pocket_world.params import save_weights
from qvg_jax.app import cli
from qvg_jax.app.film import REAL_SHOWN
from qvg_jax.app.video import Mp4
from tests.support.outputs import beside_progress
from tests.support.tiny_world import (
    FRAMES,
    TOUR,
    as_in_its_own_process,
    random_params,
    random_weights,
)


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with as_in_its_own_process(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def run(weights, tmp_path, capsys):
    """run("--codec", "qvg") -> exit code, stdout, stderr; files go to tmp_path / "out"."""

    def run(*argv, frames=FRAMES):
        common = ["generate", "--weights", str(weights), "--out", str(tmp_path / "out")]
        sizes = [f"--tour={TOUR}", *([f"--frames={frames}"] if frames else [])]
        code = cli.main([*common, *sizes, *argv])
        return code, *capsys.readouterr()

    return run


def decoded(path):
    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


def error_line(stderr):
    assert stderr.endswith("\n") and stderr.count("\n") == 1, stderr
    assert stderr.startswith("qvg: error: ") and "Traceback" not in stderr
    return stderr


@pytest.mark.parametrize(
    "argv, parts",
    [
        ([], ["COMMAND"]),
        (["dance"], ["'dance'", "generate", "codecs"]),
        (["generate", "--frames", "0"], ["--frames", "'0'", "above 0"]),
        (["generate", "--frames", "-4"], ["--frames", "'-4'", "above 0"]),
        (["generate", "--frames", "many"], ["--frames", "'many'", "whole number"]),
        (["generate", "--fps", "0"], ["--fps", "'0'"]),
        (["generate", "--steps", "0"], ["--steps", "'0'"]),
        (["generate", "--seed", "-1"], ["--seed", "'-1'"]),
        (["generate", "--loud"], ["--loud"]),
        (["generate", "--model", "wan"], ["'wan'", "accepted: pocket-world"]),
        (["codecs", "--shape", "1,2,3"], ["'1,2,3'", "four whole numbers"]),
        (["codecs", "--shape", "1,1,512,0"], ["'1,1,512,0'"]),
        (["codecs", "--shape", "1,1,512,96"], ["group=64", "head_dim=96", "accepted"]),
        (["codecs", "--shape", "1,1,100,128"], ["num_centroids=256", "100 tokens", "accepted"]),
    ],
)
def test_bad_arguments(argv, parts, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert beside_progress(out) == "" and all(part in error_line(err) for part in parts), err


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--codec", "zip"], ["'zip'", "accepted: qvg"]),
        (["--compare", "rtn,zip"], ["'zip'", "accepted: qvg"]),
        (["--codec", "qvg:group"], ["'qvg:group'", "NAME:SETTING=VALUE"]),
        (["--codec", "qvg:mood=1"], ["'qvg'", "mood"]),
        (["--codec", "qvg:encoder=cuda"], ["encoder='cuda'", "'mosaic'"]),
        (["--codec", "qvg:encoder=mosaic"], ["'qvg:encoder=mosaic'", "a Hopper GPU", "'xla'"]),
        (["--codec", "qvg:group=48"], ["group=48", "head_dim=128", "accepted: 1, 2, 4"]),
        (["--codec", "qvg:num_centroids=900"], ["num_centroids=900", "768 tokens", "1 to 768"]),
        (["--actions", "w-8,jump-2"], ["'jump-2'", "accepted", "w, s, a, d"]),
        (["--actions", "w-0"], ["'0'", "'w-0'", "above 0"]),
        (["--tour", "3"], ["tour=3", "at least one block, 4 frames"]),
        (["--seed", str(2**31)], [f"seed={2**31}", f"0 to {2**31 - 1}"]),
        (["--weights", "nowhere.safetensors"], ["'nowhere.safetensors'", "missing or corrupt"]),
    ],
)
def test_bad_input_to_generate(argv, parts, run, tmp_path):
    code, out, err = run(*argv)
    assert code == 2 and beside_progress(out) == ""
    assert all(part in error_line(err) for part in parts), err
    assert not (tmp_path / "out").exists()


def damaged(path, weights):
    data = weights.read_bytes()
    broken = {"cut": data[: len(data) // 2], "empty": b"", "text": b"not weights at all"}
    if path.stem in broken:
        path.write_bytes(broken[path.stem])
        return
    cfg, params = random_params()
    blocks = params["blocks"]
    name = next(iter(blocks))
    leaf = next(iter(blocks[name]))
    if path.stem == "nan":
        blocks[name][leaf] = np.asarray(blocks[name][leaf]).copy()
        blocks[name][leaf].flat[3] = np.nan
    else:
        del blocks[name][leaf]
    save_weights(path, cfg, params)


@pytest.mark.parametrize(
    "kind, parts",
    [
        ("cut", ["missing or corrupt"]),
        ("empty", ["missing or corrupt"]),
        ("text", ["missing or corrupt"]),
        ("lacking", ["missing: blocks."]),
        ("nan", ["blocks.", "1 NaN or Inf", "accepted: finite"]),
    ],
)
def test_damaged_weights(kind, parts, run, tmp_path, weights):
    path = tmp_path / f"{kind}.safetensors"
    damaged(path, weights)
    code, _, err = run("--weights", str(path))
    assert code == 2
    assert all(part in error_line(err) for part in [*parts, path.name]), err


def test_weights_of_another_head_dim(run, tmp_path):
    save_weights(tmp_path / "w.safetensors", *random_params(head_dim=96))
    code, _, err = run("--codec", "qvg", "--weights", str(tmp_path / "w.safetensors"))
    assert code == 2 and "group=64 must divide head_dim=96" in error_line(err)


def test_an_out_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = run("--out", str(tmp_path / "file" / "below"))
    assert code == 2
    assert str(tmp_path / "file") in error_line(err) and "accepted: a folder" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_not_enough_memory(run, monkeypatch):
    def refused(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(pipeline, "make_cache", refused)
    code, _, err = run()
    assert code == 2 and "9 bytes" in error_line(err) and "fewer --frames" in err


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "report.png")


def test_a_full_disk_keeps_the_files_before(run, tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    code, _, err = run("--codec", "bf16")
    assert code == 2 and "report.png: No space left on device" in error_line(err)
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left == {".lock", "unfinished", "video.mp4"}  # so that --resume goes on
    assert len(decoded(tmp_path / "out" / "video.mp4")) == REAL_SHOWN + FRAMES


def test_a_disk_that_fills_up_under_the_video(run, tmp_path, monkeypatch):
    add = Mp4.add

    def fills(self, frame):
        if self.frames == 3:
            self._container.mux = full_disk
        add(self, frame)

    class Container:
        """An output container whose `mux` can be replaced."""

        def __init__(self, inner):
            self.mux, self.close, self.add_stream = inner.mux, inner.close, inner.add_stream

    opened = av.open
    monkeypatch.setattr("qvg_jax.app.video.av.open", lambda *a, **k: Container(opened(*a, **k)))
    monkeypatch.setattr(Mp4, "add", fills)
    code, _, err = run("--codec", "bf16")
    assert code == 2 and "video.mp4: No space left on device" in error_line(err)
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {".lock", "unfinished"}


def test_nan_in_k_and_v_keeps_the_frames_before(run, tmp_path, monkeypatch):
    render = pipeline.render_path

    def spoiled(*args, first_time=0, **kwargs):
        frames = render(*args, first_time=first_time, **kwargs)
        bad = first_time == TOUR - REAL_SHOWN + 8  # the video shows two blocks before it
        return frames * jnp.nan if bad else frames

    monkeypatch.setattr(pipeline, "render_path", spoiled)
    code, _, err = run("--codec", "bf16")
    assert code == 2
    line = error_line(err)
    block = (TOUR - REAL_SHOWN + 8) // 4
    assert f"bf16: K or V of block {block} is not finite" in line and "accepted: finite" in line
    assert "video.mp4 has the 8 frames before it" in line
    assert len(decoded(tmp_path / "out" / "video.mp4")) == 8


def test_ctrl_c_leaves_a_video_of_the_frames_so_far(run, tmp_path, monkeypatch):
    add = Mp4.add

    def press(self, frame):
        add(self, frame)
        if self.frames == 10:  # in the middle of a block
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Mp4, "add", press)
    handler = signal.getsignal(signal.SIGINT)
    code, _, err = run("--codec", "bf16")
    assert code == 130
    video = tmp_path / "out" / "video.mp4"
    assert err == f"qvg: interrupted; {video} has the 12 frames so far; --resume goes on\n"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".lock", "video.mp4"}
    assert len(decoded(tmp_path / "out" / "video.mp4")) == 12
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_while_the_report_is_drawn(run, tmp_path, monkeypatch):
    def press(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("qvg_jax.app.generate.write_figure", press)
    code, _, err = run("--codec", "bf16")
    assert code == 130 and f"video.mp4 has the {REAL_SHOWN + FRAMES} frames so far" in err
    assert len(decoded(tmp_path / "out" / "video.mp4")) == REAL_SHOWN + FRAMES


def test_ctrl_c_before_the_first_block(run, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "prepare", lambda request: signal.raise_signal(signal.SIGINT))
    code, _, err = run()
    assert (code, err) == (130, "qvg: interrupted\n")
    assert not (tmp_path / "out").exists()


def test_our_own_mistakes_are_not_blamed_on_the_user(run, monkeypatch):
    def broken(self, frame):
        raise ValueError("a bug")

    monkeypatch.setattr(Mp4, "add", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("--codec", "bf16")


def test_the_command_as_a_process(tmp_path):
    argv = [sys.executable, "-m", "qvg_jax", "generate", "--codec", "zip"]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 2
    first, *others = done.stdout.splitlines()  # said until the codec is looked at
    assert first == "pocket-world: loading JAX"
    assert all(line.startswith("pocket-world: loading ") for line in others)
    assert "codec='zip' is not known" in error_line(done.stderr)
