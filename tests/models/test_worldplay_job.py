"""`qvg generate worldplay` and `qvg plan`, end to end on a tiny model."""

import dataclasses
import json
import signal

import av
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from models.common.weights import Weights
from models.runs import decode as player
from models.runs import latent_job
from models.runs.prompts import stand_in_embedding
from models.umt5 import Tokenizer
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from models.worldplay import job
from models.worldplay.entry import Options, PlanOptions
from qvg_jax.app import cli
from qvg_jax.app.memory_plan import shape_bytes
from qvg_jax.app.video import Mp4
from qvg_jax.cache.health import NonFiniteError
from qvg_jax.errors import UserError
from tests.support import tiny_self_forcing
from tests.support import tiny_worldplay as tiny
from tests.support.checkpoint_shapes import worldplay_shapes
from tests.support.tiny_world import as_in_its_own_process
from tests.support.wan_vae_22 import case, save_weights

WALK, LATENTS = "w-4,right-3,s-4", 12  # six blocks: spans of two before the third and the fifth
FRAMES = 1 + 4 * (LATENTS - 1)
CHANNELS = tiny.sizes().dit.latent_channels


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with (
        as_in_its_own_process(tmp_path_factory.getbasetemp()),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(job, "released_sizes", tiny.sizes)
        patch.setattr(Weights, "random", tiny.drawn)
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


def command(*argv, out, picture=None, weights="random", walk=WALK, codec=tiny.CODEC):
    common = ["generate", "worldplay", "--codec", codec, "--seed", "3"]
    common += ["--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH), "--actions", walk]
    common += ["--weights", str(weights), "--out", str(out), "--prompt", "a room"]
    return cli.main([*common, *(["--image", str(picture)] if picture else []), *argv])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, picture):
    """A run of two arms that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert command("--compare", "bf16", out=out, picture=picture) == 0
    return out


def decoded(path):
    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


def latents(folder, arm):
    file = next(f for f in (folder / "latents").glob("*.bin") if f.name.startswith(arm))
    return np.fromfile(file, np.float32).reshape(-1, CHANNELS, 4, 6)


def test_a_picture_and_a_walk_become_a_video_for_each_memory(whole):
    assert len(decoded(whole / "video.mp4")) == FRAMES
    report = json.loads((whole / "report.json").read_text())
    assert list(report["arms"]) == ["bf16", tiny.CODEC]
    caches = report["config"]["caches"]
    assert (caches["bf16"]["storage"], caches[tiny.CODEC]["storage"]) == ("packed", "single")
    assert caches[tiny.CODEC]["spans"] == 2 and caches["bf16"]["spans"] == 0
    assert report["config"]["actions"] == WALK
    plain, compressed = latents(whole, "bf16"), latents(whole, "qvg")
    assert len(plain) == len(compressed) == LATENTS
    # The picture is the first frame of both; blocks 0 and 1 read what was never compressed.
    np.testing.assert_array_equal(plain[0], compressed[0])
    np.testing.assert_allclose(compressed[:4], plain[:4], rtol=0, atol=1e-3)
    distance = np.linalg.norm(compressed - plain) / np.linalg.norm(plain)
    assert 1e-5 < distance < 0.5
    # One of 6 blocks is never in memory, and single bf16 blocks are half of packed ones.
    size = {name: arm["bytes"]["in_use"]["total"] for name, arm in report["arms"].items()}
    assert size["bf16"] > 3 * size[tiny.CODEC]


def test_latents_are_those_of_the_pipeline(whole, picture):
    """The job adds files and frames, not numbers."""
    asked = Options(
        actions=WALK, height=tiny.HEIGHT, width=tiny.WIDTH, seed=3, weights="random",
        codec="bf16", prompt="a room",
    )  # fmt: skip
    settings = job.settle(asked, tiny.sizes())
    vae = VAE_WEIGHTS.random(settings.sizes.vae)
    dit = settings.sizes.dit
    size = dict(slots=dit.text_slots, width=dit.text_width, dtype=dit.dtype)
    wanted = job.WorldPlay(job.WEIGHTS.random(dit)).generate(
        job.Walk(
            text_BUE=stand_in_embedding("a room", **size).text_BUE,
            path=settings.path,
            latent_height=4,
            latent_width=6,
            noise=jax.random.fold_in(jax.random.key(3), 1),
            image_BZYX=job.picture_latent(vae, picture, tiny.HEIGHT, tiny.WIDTH),
        )
    )
    np.testing.assert_allclose(latents(whole, "bf16"), wanted[0], rtol=0, atol=1e-3)


def test_an_interrupted_walk_goes_on_bit_for_bit(whole, picture, tmp_path, monkeypatch, capsys):
    add = Mp4.add

    def press(self, frame):
        add(self, frame)
        if self.frames == 5 + 8 * 2 - 2:
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
    code = command("--resume", "--prompt", "a hall", out=tmp_path, picture=picture)
    assert code == 2 and "'a hall'" in capsys.readouterr().err


def test_pictures_of_all_blocks_at_the_end_are_the_same(whole, picture, tmp_path, capsys):
    both = ("--compare", "bf16")
    assert command(*both, "--decode-last", out=tmp_path, picture=picture) == 0
    assert f"{tiny.CODEC}: latents of block 2 in" in capsys.readouterr().err
    shown = [decoded(folder / "video.mp4") for folder in (tmp_path, whole)]
    np.testing.assert_array_equal(*shown)
    for arm in ("bf16", "qvg"):
        np.testing.assert_array_equal(latents(tmp_path, arm), latents(whole, arm))
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path, whole)]
    ours, theirs = (report["arms"][tiny.CODEC]["bytes"] for report in reports)
    assert ours == theirs


def test_what_was_made_before_an_error_is_decoded(picture, tmp_path, monkeypatch, capsys):
    """With --decode-last too: NaN in the third block of a walk leaves the pictures of two."""
    made = player._made

    def torn(source, kept):
        for i, block in enumerate(made(source, kept)):
            if i == 2:
                raise NonFiniteError("K and V of block 2 are not finite")
            yield block

    monkeypatch.setattr(player, "_made", torn)
    assert command("--decode-last", out=tmp_path, picture=picture) == 2
    assert "K and V of block 2 are not finite" in capsys.readouterr().err
    assert len(decoded(tmp_path / "video.mp4")) == 5 + 8


def test_weights_from_a_folder(tmp_path, picture):
    c, draw = tiny.sizes(), np.random.default_rng(0)
    folder = tiny_self_forcing.weights_folder(tmp_path)
    for name in ("self_forcing_dmd", "Wan2.1_VAE"):
        (folder / f"{name}.safetensors").unlink()
    save_weights(case("wan_vae_22")["stored"], folder / "Wan2.2_VAE.safetensors")
    arrays = {
        f"model.{name}": (draw.normal(size=shape) / 4).astype(np.float32)
        for name, shape in worldplay_shapes(c.dit).items()
    }
    save_file(arrays, folder / "worldplay_distilled.safetensors")
    out = tmp_path / "out"
    assert command("--frames", "2", out=out, weights=folder, codec="bf16", picture=picture) == 0
    assert len(decoded(out / "video.mp4")) == 5
    report = json.loads((out / "report.json").read_text())
    assert "worldplay_distilled.safetensors" in report["config"]["weights"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--actions", "w-8,jump-2"], ["unknown action 'jump-2'", "accepted: NAME-FRAMES"]),
        (["--actions", "w-1.5"], ["duration '1.5'", "a whole number of latent frames"]),
        (["--actions", "w-23"], []),
        (["--actions", "w-25"], ["frames=26", "RoPE table of 24"]),
        (["--frames", "14"], ["frames=14", "12 cameras", "11 steps"]),
        (["--frames", "5"], ["frames=5", "4 and 6"]),
        (["--height", "40"], ["height=40", "multiple of 32"]),
        (["--image", "BROKEN"], ["not readable as an image"]),
        (["--image", "none.png"], ["none.png"]),
        (["--image", "TALL"], ["10 x 90", "would show", "accepted: a picture"]),
        (["--window", "8"], ["--window", "Models that have it: self-forcing"]),
        (["--codec", "qvg:storage=double"], ["storage='double'", "single"]),
        (["--codec", "zip"], ["'zip'"]),
        (["--layers", "2", "--weights", "nowhere"], ["--layers is for random"]),
        (["--weights", "nowhere"], ["not a folder"]),
        (["--steps", "0"], ["'0'"]),
        (["--actions", "w-25", "--recall", "1"], []),  # further than the RoPE table
        (["--recall", "0"], ["'0'"]),
        (["--recall", "1", "--compare", "bf16"], ["recall=1", "accepted: bf16:storage=single"]),
    ],
)
def test_bad_input(argv, parts, tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n and then nothing")
    Image.new("RGB", (10, 90)).save(tmp_path / "tall.png")
    places = {"BROKEN": tmp_path / "broken.png", "TALL": tmp_path / "tall.png"}
    argv = [str(places.get(a, a)) for a in argv]
    if not parts:  # accepted: what follows the checks is not wanted here
        monkeypatch.setattr(latent_job, "stand_in_embedding", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command(*argv, out=tmp_path / "out")
        return
    assert command(*argv, out=tmp_path / "out") == 2
    err = capsys.readouterr().err
    line = err.splitlines()[-1]
    assert line.startswith("qvg: error: ") and "Traceback" not in err
    assert all(part in line for part in parts), line


def test_a_walk_that_is_cut_is_said_and_one_that_nobody_gave_is_not(caplog):
    size = dict(height=tiny.HEIGHT, width=tiny.WIDTH, codec="bf16")
    with caplog.at_level("INFO"):
        job.settle(Options(**size, frames=8), tiny.sizes())
        assert not caplog.records
        job.settle(Options(**size, actions="w-8", frames=4), tiny.sizes())
        job.settle(Options(**size, actions="w-8"), tiny.sizes())
    cut, whole = caplog.records
    assert (cut.levelname, whole.levelname) == ("WARNING", "INFO")
    assert "last 5 cameras" in cut.message and "last 1 cameras" in whole.message


def test_other_steps_lie_on_the_released_curve():
    asked = Options(actions=WALK, height=tiny.HEIGHT, width=tiny.WIDTH, steps=4, codec="bf16")
    settings = job.settle(asked, tiny.sizes())
    released = job.settle(dataclasses.replace(asked, steps=None), tiny.sizes())
    np.testing.assert_allclose(settings.sampler.steps, released.sampler.steps, rtol=1e-6)


def test_plan_says_what_fits_and_how_far_a_walk_could_go(capsys):
    codecs = ("bf16", tiny.CODEC)
    size = dict(frames=LATENTS, height=tiny.HEIGHT, width=tiny.WIDTH)
    asked = PlanOptions(memory=10**9, codec=codecs, **size)
    plan = job.plan(asked)
    bf16, single = plan.needs
    assert bf16.held["cache"] > 2.9 * single.held["cache"]
    settings = job.settle(Options(codec="bf16", **size), tiny.sizes())
    assert bf16.held["cache"] == shape_bytes(settings.cache("bf16"))
    assert bf16.longest == single.longest == 24  # the RoPE table's rows
    common = ["plan", "worldplay", "--codec", tiny.CODEC]
    common += ["--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH), "--frames", "12"]
    assert cli.main([*common, "--memory", "10KB"]) == 1
    assert "Nothing fits: text encoder alone, without any cache" in capsys.readouterr().out


def test_a_walk_with_recall_needs_as_much_whatever_its_length(monkeypatch):
    traced = lambda program, *args: 0 * len(jax.tree.leaves(jax.eval_shape(program, *args)))  # noqa: E731
    monkeypatch.setattr("models.worldplay.plan.temporary_bytes", traced)
    monkeypatch.setattr("models.worldplay.plan.text_encoder_bytes", lambda *args: 0)
    size = dict(height=tiny.HEIGHT, width=tiny.WIDTH)
    asked = PlanOptions(codec=(tiny.CODEC,), memory=10**9, recall=1, frames=12, **size)
    short, long = (
        job.plan(dataclasses.replace(asked, frames=frames)).needs[0] for frames in (12, 100)
    )
    assert short == long and long.longest is None
    everything = job.settle(Options(frames=24, codec=tiny.CODEC, **size), tiny.sizes())
    assert long.held["cache"] < shape_bytes(everything.cache(tiny.CODEC))
    with pytest.raises(UserError, match="recall=1 and --devices 2"):
        job.plan(dataclasses.replace(asked, devices=2))


@pytest.mark.slow
def test_a_run_with_all_spans_recalled_makes_the_same_latents(whole, picture, tmp_path):
    out = tmp_path / "recalled"
    assert command("--recall", "2", out=out, picture=picture) == 0
    np.testing.assert_array_equal(latents(out, "qvg"), latents(whole, "qvg"))
    assert json.loads((out / "report.json").read_text())["config"]["recall"] == 2
