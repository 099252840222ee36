"""The `qvg` command, end to end on a tiny pocket world with random weights."""

import json
import sys

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from models.pocket_world import camera, pipeline, route, world
from qvg_jax.app import cli
from qvg_jax.app.film import REAL_SHOWN
from qvg_jax.app.jax_setup import set_up_jax
from qvg_jax.app.panels import Sheet
from qvg_jax.codecs.presets import PAIRS, PRESETS
from tests.support.tiny_world import FRAMES, TOUR, as_in_its_own_process, random_weights


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


def test_the_four_files_are_there_and_nothing_else(done):
    for out in done:
        left = {p.name for p in out.iterdir()}
        assert left == {".lock", "video.mp4", "report.json", "report.png", "report.html"}


def test_the_video_has_every_frame_of_every_arm(done):
    frames = decoded(done[0] / "video.mp4")
    sheet = Sheet(8, world.HEIGHT, world.WIDTH, tour=TOUR, frames=FRAMES)  # differences below
    assert frames.shape == (REAL_SHOWN + FRAMES, sheet.height, sheet.width, 3)

    def panel(frame, i):
        left, top, right, bottom = sheet.box(i)
        half = sheet.scale // 2
        return frame[top + half : bottom : sheet.scale, left + half : right : sheet.scale]

    key = jax.random.fold_in(jax.random.key(5), 0)
    tour = camera.wander(key, jnp.zeros(3), TOUR, route.HALF_WIDTH)
    first = TOUR - REAL_SHOWN  # of the tour the video has the end
    part = tour[None, first : first + 4]
    real = np.asarray(pipeline.render_path(jnp.array([5]), part, first_time=first))[0]
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
    assert list(report["arms"]) == ["bf16", "midrise-k2v4", "rtn"]
    for name, arm in report["arms"].items():
        assert all(len(values) == FRAMES for values in arm["frames"].values())
        bits = arm["bits_per_element"]
        assert bits["from_formats"] == pytest.approx(bits["from_buffers"], abs=1e-12)
        assert (name == "bf16") == (bits["from_buffers"] == 16)
    assert report["seen_in_tour"] == [1.0] * FRAMES  # back over the tour
    # Same noise, and only the cache differs: far closer to bf16 than two noises would be.
    assert report["arms"]["midrise-k2v4"]["means"]["psnr_vs_bf16"] > 30
    assert report["arms"]["midrise-k2v4"]["means"]["psnr_vs_truth"] < 20
    assert Image.open(done[0] / "report.png").size[0] == 1650


def test_actions_set_the_path_and_the_length(run, tmp_path):
    code, out, _ = run("--actions", "d-3,up-2", "--codec", "bf16", "--fps", "5", frames=None)
    assert code == 0 and f"{TOUR} real frames, then 8 generated, for each of bf16" in out
    assert "PSNR truth" in out and "video.mp4" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["config"]["actions"] == "d-3,up-2" and list(report["arms"]) == ["bf16"]
    with av.open(str(tmp_path / "out" / "video.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.frames, stream.average_rate) == (REAL_SHOWN + 8, 5)


def test_progress_shows_speed_and_memory(run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    code, _, err = run("--codec", "bf16")
    assert code == 0
    last = err.replace("\n", "\r").split("\r")
    last = [part for part in last if f"{TOUR + FRAMES}/{TOUR + FRAMES}" in part][-1]
    assert "bf16 100%" in last and "frames/s, cache MB: bf16 " in last


def test_the_list_of_codecs(capsys):
    assert cli.main(["codecs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [*PRESETS, *PAIRS]
    assert lines[2].split()[:4] == ["qvg", "2", "2.2969", "6.97x"]  # as published
    assert cli.main(["codecs", "--shape", "1,8,37440,64"]) == 0  # groups of 128 are clamped
    assert "qvg-asym" in capsys.readouterr().out
    assert cli.main(["codecs", "--shape", "1,24,29640,128"]) == 0
    assert "6.88x" in capsys.readouterr().out


def test_the_folder_of_compiled_programs_is_named_and_bounded(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "qvg_jax" / "programs"
    folder.mkdir(parents=True)
    (folder / "jit_step-cache").write_bytes(bytes(2_500_000))
    assert cli.main(["--version", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert f"  jax {jax.__version__}" in out
    assert f"compiled programs: {folder}, 2.5 MB, of at most 4 GB" in out
    # What `set_up_jax` tells JAX, without telling this process.
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__, raising=False)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)
    set_up_jax()
    assert told == {
        "jax_enable_x64": False,
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": 4 * 10**9,
    }


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qvg ")
