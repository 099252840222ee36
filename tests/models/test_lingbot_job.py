"""`qvg generate lingbot` and `qvg plan lingbot`, end to end on a tiny model."""

import json
import signal

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from models.common.weights import Weights
from models.lingbot import job
from models.lingbot.entry import NEEDS, Options, PlanOptions
from models.runs.checkpoint_folder import find_parts
from models.umt5 import Tokenizer
from qvg_jax.app import cli
from qvg_jax.app.memory_plan import shape_bytes
from qvg_jax.app.video import Mp4
from tests.support import tiny_lingbot as tiny
from tests.support import tiny_self_forcing
from tests.support.tiny_world import as_in_its_own_process
from tests.support.tiny_worldplay import drawn

WALK, LATENTS = "w-8,right-8,s-7", 24  # six blocks; 6 frames of sink
SIZE = dict(height=tiny.HEIGHT, width=tiny.WIDTH)


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with (
        as_in_its_own_process(tmp_path_factory.getbasetemp()),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(job, "released_sizes", tiny.sizes)
        patch.setattr(Weights, "random", drawn)
        patch.setattr(
            Tokenizer, "from_file", lambda path, length: tiny_self_forcing.letters(length)
        )
        yield


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "room.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def command(*argv, out, picture=None, weights="random", walk=("--actions", WALK), codec=tiny.CODEC):
    common = ["generate", "lingbot", "--codec", codec, "--seed", "3", *walk]
    common += ["--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH)]
    common += ["--weights", str(weights), "--out", str(out), "--prompt", "a room"]
    return cli.main([*common, *(["--image", str(picture)] if picture else []), *argv])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, picture):
    """A run of two arms that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert command("--compare", "bf16", out=out, picture=picture) == 0
    return out


def latents(folder, arm):
    file = next(f for f in (folder / "latents").glob("*.bin") if f.name.startswith(arm))
    return np.fromfile(file, np.float32).reshape(-1, 16, 4, 6)


def frames_of(path):
    with av.open(str(path)) as file:
        return sum(1 for _ in file.decode(video=0))


def test_a_picture_and_a_walk_become_a_video_for_each_memory(whole):
    assert frames_of(whole / "video.mp4") == 1 + 4 * (LATENTS - 1)
    report = json.loads((whole / "report.json").read_text())
    assert list(report["arms"]) == ["bf16", tiny.CODEC]
    assert report["config"]["actions"] == WALK and report["config"]["image"]
    ours = report["config"]["caches"][tiny.CODEC]
    assert ours["spans"] > 0 and (ours["sink_frames"], ours["span_frames"]) == (6, 4)
    plain, compressed = latents(whole, "bf16"), latents(whole, "qvg")
    assert len(plain) == len(compressed) == LATENTS and np.isfinite(plain).all()
    # The first three blocks read sink and window only.
    np.testing.assert_allclose(compressed[:12], plain[:12], rtol=0, atol=1e-3)
    assert np.abs(compressed - plain).max() > 1e-4


def test_an_interrupted_walk_goes_on_bit_for_bit(whole, picture, tmp_path, monkeypatch):
    add = Mp4.add

    def press(self, frame):
        add(self, frame)
        if self.frames == 13 + 16 * 2 - 2:
            signal.raise_signal(signal.SIGINT)

    both = ("--compare", "bf16")
    with monkeypatch.context() as patch:
        patch.setattr(Mp4, "add", press)
        assert command(*both, out=tmp_path, picture=picture) == 130
    assert command(*both, "--resume", out=tmp_path, picture=picture) == 0
    for arm in ("bf16", "qvg"):
        np.testing.assert_array_equal(latents(tmp_path, arm), latents(whole, arm))
    with monkeypatch.context() as patch:  # a finished walk is left alone, and nothing is loaded
        patch.setattr(job, "prepare", lambda _: pytest.fail("prepared"))
        assert command(*both, "--resume", out=tmp_path, picture=picture) == 0


def test_a_walk_of_poses_from_a_checkpoint_folder(tmp_path, picture):
    sizes, draw = tiny.sizes(), np.random.default_rng(0)
    folder = tiny_self_forcing.weights_folder(tmp_path)
    (folder / "self_forcing_dmd.safetensors").unlink()
    (folder / "config.json").unlink()
    arrays = {
        f"model.{name}": (draw.normal(size=shape) / 4).astype(np.float32)
        for name, shape in tiny.shapes(sizes.dit).items()
    }
    (folder / "transformers").mkdir()
    save_file(arrays, folder / "transformers" / "diffusion_pytorch_model.safetensors")
    parts = find_parts(folder, job._LingBot.dit_names)
    loaded = job.WEIGHTS.load(parts.dit, sizes.dit)
    np.testing.assert_array_equal(  # a Linear's matrix, the other way round
        loaded.blocks.camera_shift.kernel[...][1],
        arrays["model.blocks.1.cam_shift_layer.weight"].T,
    )
    poses = np.tile(np.eye(4), (15, 1, 1))  # 4 latent frames, which are one block
    poses[:, 2, 3] = np.arange(15.0) ** 2
    np.save(tmp_path / "poses.npy", poses)
    out, walk = tmp_path / "out", ("--poses", str(tmp_path / "poses.npy"))
    assert command(out=out, weights=folder, codec="bf16", picture=picture, walk=walk) == 0
    assert frames_of(out / "video.mp4") == 13
    assert command(out=out, weights=folder, codec="bf16", walk=walk) == 2  # no picture


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--actions", "jump-2"], ["unknown action 'jump-2'"]),
        (["--actions", "w-7", "--poses", "none.npy"], ["either --actions", "or --poses"]),
        (["--poses", "none.npy"], ["none.npy", "not readable as a NumPy file"]),
        (["--poses", "FLAT"], ["(frames, 4, 4)", "got shape (3, 4)"]),
        (["--actions", WALK, "--frames", "5"], ["frames=5", "4 and 8"]),
        (["--actions", WALK, "--frames", "28"], ["frames=28"]),
        (["--actions", WALK, "--height", "40"], ["height=40", "multiple of 16"]),
        (["--actions", WALK, "--image", "none.png"], ["none.png"]),
        ([], ["either --actions"]),
    ],
)
def test_bad_input(argv, parts, tmp_path, capsys):
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    argv = [str(tmp_path / "flat.npy") if a == "FLAT" else a for a in argv]
    assert command(*argv, out=tmp_path / "out", walk=()) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("qvg: error: ") and all(part in line for part in parts), line


def test_plan_says_what_fits(capsys):
    plan = job.plan(PlanOptions(memory=10**9, codec=("bf16", tiny.CODEC), frames=LATENTS, **SIZE))
    bf16, ours = plan.needs
    assert bf16.held["cache"] > 1.2 * ours.held["cache"]
    settings = job.settle(Options(codec="bf16", frames=LATENTS, **SIZE), tiny.sizes())
    assert bf16.held["cache"] == shape_bytes(settings.cache("bf16"))
    assert bf16.longest == 24  # the rows of the RoPE table
    small = ["plan", "lingbot", "--height", "32", "--width", "48", "--frames", "8"]
    assert cli.main([*small, "--codec", "bf16", "--memory", "10KB"]) == 1
    assert "Nothing fits: text encoder alone, without any cache" in capsys.readouterr().out


def test_the_download_goes_where_a_run_looks():
    assert NEEDS[0].place == job._LingBot.dit_names[0]
