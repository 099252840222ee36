"""The `qvg` command, end to end on a tiny pocket world with random weights."""

import errno
import json
import os
import signal
import subprocess
import sys

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from models.pocket_world import camera, job, pipeline, world
from models.pocket_world.config import PocketWorldConfig
from models.pocket_world.modeling import PocketWorld
from models.pocket_world.params import save_weights
from qvg_jax import cli
from qvg_jax.compare import Request
from qvg_jax.panels import Sheet
from qvg_jax.presets import PRESETS
from qvg_jax.video import Mp4

TOUR, FRAMES = 48, 18  # one compressed span of 8 blocks; 18 is not a whole number of blocks


@pytest.fixture(scope="module", autouse=True)
def compilations(tmp_path_factory):
    """`main` keeps compiled programs in the user's folder: here a temporary one, and not for good."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        before = jax.config.jax_persistent_cache_min_compile_time_secs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        with jax.numpy_rank_promotion("allow"):  # as in the command's own process
            yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    compilation_cache.reset_cache()


def random_params(**sizes):
    cfg = PocketWorldConfig(**(vars(PocketWorldConfig.smoke()) | sizes))
    return cfg, nnx.to_pure_dict(nnx.state(PocketWorld(cfg, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "smoke.safetensors"
    save_weights(path, *random_params())
    return path


@pytest.fixture
def run(weights, tmp_path, capsys):
    """run("--codec", "qvg") -> exit code, stdout, stderr; files go to tmp_path / "out"."""

    def run(*argv, frames=FRAMES):
        common = ["generate", "--weights", str(weights), "--out", str(tmp_path / "out")]
        sizes = [f"--tour={TOUR}", *([f"--frames={frames}"] if frames else [])]
        code = cli.main([*common, *sizes, *argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def done(weights, tmp_path_factory):
    """The same command twice: two folders."""
    folders = [tmp_path_factory.mktemp(name) / "new" / "out" for name in ("first", "second")]
    for out in folders:
        argv = f"generate --weights {weights} --tour {TOUR} --frames {FRAMES} --seed 5"
        assert cli.main([*argv.split(), "--compare", "rtn", "--out", str(out)]) == 0
    return folders


def decoded(path):
    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


def test_the_three_files_are_there_and_nothing_else(done):
    for out in done:
        assert {p.name for p in out.iterdir()} == {"video.mp4", "report.json", "report.png"}


def test_the_video_has_every_frame_of_every_arm(done):
    frames = decoded(done[0] / "video.mp4")
    sheet = Sheet(4, world.HEIGHT, world.WIDTH, tour=TOUR, frames=FRAMES)
    assert frames.shape == (TOUR + FRAMES, sheet.height, sheet.width, 3)

    def panel(frame, i):
        left, top, right, bottom = sheet.box(i)
        half = sheet.scale // 2
        return frame[top + half : bottom : sheet.scale, left + half : right : sheet.scale]

    key = jax.random.fold_in(jax.random.key(5), 0)
    tour = camera.wander(key, jnp.zeros(3), TOUR, job.HALF_WIDTH)
    real = np.asarray(pipeline.render_path(jnp.array([5]), tour[None, :4]))[0]
    for i in range(4):  # during the tour all panels show the world
        error = (panel(frames[3], i) / 127.5 - 1) - real[3]
        assert np.abs(error).mean() < 0.02
    truth, bf16 = panel(frames[-1], 0), panel(frames[-1], 1)
    assert np.abs(truth.astype(int) - bf16).mean() > 10  # the model knows nothing


def test_the_same_seed_gives_the_same_bytes(done):
    a, b = done
    for name in ("video.mp4", "report.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    reports = [json.loads((out / "report.json").read_text()) for out in done]
    timings = [r.pop("timings") for r in reports]
    assert reports[0] == reports[1] and timings[0] != timings[1]


def test_the_report_says_what_was_done(done):
    report = json.loads((done[0] / "report.json").read_text())
    config = report["config"]
    assert (config["seed"], config["frames"], config["tour_frames"]) == (5, FRAMES, TOUR)
    assert config["sampler"]["steps"] == 4 and config["fps"] == 8
    assert config["weights"]["file"] == "smoke.safetensors"
    assert report["versions"]["jax"] == jax.__version__
    assert list(report["arms"]) == ["bf16", "qvg", "rtn"]
    for name, arm in report["arms"].items():
        assert all(len(values) == FRAMES for values in arm["frames"].values())
        bits = arm["bits_per_element"]
        assert bits["from_formats"] == pytest.approx(bits["from_buffers"], abs=1e-12)
        assert (name == "bf16") == (bits["from_buffers"] == 16)
    assert report["seen_in_tour"] == [1.0] * FRAMES  # back over the tour
    # Same noise, and only the cache differs: far closer to bf16 than two noises would be.
    assert report["arms"]["qvg"]["means"]["psnr_vs_bf16"] > 30
    assert report["arms"]["qvg"]["means"]["psnr_vs_truth"] < 20
    assert Image.open(done[0] / "report.png").size[0] == 1650


def test_actions_set_the_path_and_the_length(run, tmp_path):
    code, out, _ = run("--actions", "d-3,up-2", "--codec", "bf16", "--fps", "5", frames=None)
    assert code == 0 and f"{TOUR} real frames, then 8 generated, for each of bf16" in out
    assert "PSNR truth" in out and "video.mp4" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["config"]["actions"] == "d-3,up-2" and list(report["arms"]) == ["bf16"]
    with av.open(str(tmp_path / "out" / "video.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.frames, stream.average_rate) == (TOUR + 8, 5)


def test_the_default_path_goes_back_and_forth_without_a_cut():
    tour, path = 8, job._path(3, 8, 30, None)
    there = list(range(tour))
    back = there[-2::-1]
    want = [*there, *(back + there[1:]) * 3]
    np.testing.assert_array_equal(path, path[want[: len(path)]])
    assert np.abs(np.diff(path, axis=0)[:, :2]).max() <= camera.SPEED


def test_actions_repeat_from_the_end_of_the_tour():
    path = job._path(3, 8, 6, camera.parse_actions("d-1,s-1"))
    want = np.array([[8, 0, 0], [0, 8, 0]] * 3, np.float32)
    np.testing.assert_array_equal(np.diff(path[7:], axis=0), want)


def test_seen_is_the_share_of_the_view():
    far, half = [10_000.0, 0, 0], [world.WIDTH / 2, 0, 0]
    path = np.array([[0, 0, 0], [0, 0, 0], half, far, [0, 0, 2]], np.float32)
    seen = job.seen_in_tour(path, 1)
    np.testing.assert_allclose(seen, [1, 1, 0.5, 0, 0.25], atol=0.03)


def test_a_longer_video_runs_the_same_program(weights):
    sizes = [(12, 40), (48, 400)]
    jobs = [job.prepare(Request(weights=str(weights), tour=t, frames=f)) for t, f in sizes]
    shapes = [jax.tree.map(jnp.shape, [arm.state for arm in j.arms]) for j in jobs]
    assert shapes[0] == shapes[1]
    assert jobs[0].arms[1].codec is jobs[1].arms[1].codec


def test_the_list_of_codecs(capsys):
    assert cli.main(["codecs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(PRESETS)
    assert lines[2].split()[:4] == ["qvg", "2", "2.2969", "6.97x"]  # as published
    assert cli.main(["codecs", "--shape", "1,24,29640,128"]) == 0
    assert "6.88x" in capsys.readouterr().out


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("qvg ")


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
    assert out == "" and all(part in error_line(err) for part in parts), err


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--codec", "zip"], ["'zip'", "accepted: qvg"]),
        (["--compare", "rtn,zip"], ["'zip'", "accepted: qvg"]),
        (["--codec", "qvg:group"], ["'qvg:group'", "NAME:SETTING=VALUE"]),
        (["--codec", "qvg:mood=1"], ["'qvg'", "mood"]),
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
    assert code == 2 and out == ""
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
    code, _, err = run("--weights", str(tmp_path / "w.safetensors"))
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
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["video.mp4"]
    assert len(decoded(tmp_path / "out" / "video.mp4")) == TOUR + FRAMES


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
    monkeypatch.setattr("qvg_jax.video.av.open", lambda *a, **k: Container(opened(*a, **k)))
    monkeypatch.setattr(Mp4, "add", fills)
    code, _, err = run("--codec", "bf16")
    assert code == 2 and "video.mp4: No space left on device" in error_line(err)
    assert list((tmp_path / "out").iterdir()) == []


def test_nan_in_k_and_v_keeps_the_frames_before(run, tmp_path, monkeypatch):
    render = pipeline.render_path

    def spoiled(*args, first_time=0, **kwargs):
        frames = render(*args, first_time=first_time, **kwargs)
        return frames * jnp.nan if first_time == 8 else frames  # block 2 of the tour

    monkeypatch.setattr(pipeline, "render_path", spoiled)
    code, _, err = run("--codec", "bf16")
    assert code == 2
    line = error_line(err)
    assert "bf16: K or V of block 2 is not finite" in line and "accepted: finite" in line
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
    assert err == f"qvg: interrupted; {tmp_path}/out/video.mp4 has the 12 frames so far\n"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["video.mp4"]
    assert len(decoded(tmp_path / "out" / "video.mp4")) == 12
    assert signal.getsignal(signal.SIGINT) is handler


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


def test_progress_shows_speed_and_memory(run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    code, _, err = run("--codec", "bf16")
    assert code == 0
    last = err.replace("\n", "\r").split("\r")
    last = [part for part in last if f"{TOUR + FRAMES}/{TOUR + FRAMES}" in part][-1]
    assert "bf16 100%" in last and "frames/s, cache MB: bf16 " in last


def test_the_command_as_a_process(tmp_path):
    argv = [sys.executable, "-m", "qvg_jax.cli", "generate", "--codec", "zip"]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert "codec='zip' is not known" in error_line(done.stderr)
