"""`qvg generate longcat` and its plan, end to end on a tiny model."""

import json
import signal
import sys

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from benchmarks import longcat as benchmark
from benchmarks.model_tables import longcat_table
from models.longcat import job
from models.longcat.condition import build_condition
from models.longcat.entry import Options, PlanOptions
from models.longcat.params import random_dit
from models.longcat.pipeline import LongCat
from models.longcat.schedule import continuation
from models.longcat.segments import Segments, long_video, to_frames
from models.longcat.settings import condition_bytes, settle
from models.umt5 import Tokenizer
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from qvg_jax.app import cli
from qvg_jax.app.video import Mp4
from qvg_jax.cache.health import cache_bytes
from tests.support import tiny_longcat as tiny
from tests.support.outputs import beside_progress
from tests.support.tiny_self_forcing import letters
from tests.support.tiny_world import as_in_its_own_process

LATENTS = 34  # a clip and two segments
FRAMES = 93 + 2 * 20


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with (
        as_in_its_own_process(tmp_path_factory.getbasetemp()),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(job, "released_sizes", tiny.sizes)
        patch.setattr(Tokenizer, "from_file", lambda path, length: letters(length))
        yield


def command(*argv, out, frames=LATENTS, weights="random"):
    common = ["generate", "longcat", "--codec", tiny.CODEC, "--seed", "3"]
    common += ["--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH), "--steps", "2"]
    common += ["--weights", str(weights), "--frames", str(frames), "--out", str(out)]
    return cli.main([*common, "--prompt", "a red fox", *argv])


@pytest.fixture
def run(tmp_path, capsys):
    """run("--codec", "qvg") -> exit code, stdout, stderr; files go to tmp_path / "out"."""

    def run(*argv, **options):
        code = command(*argv, **({"out": tmp_path / "out"} | options))
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two arms that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert command("--compare", "bf16", out=out) == 0
    return out


def decoded(path):
    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


def clips(folder, arm):
    file = next(f for f in (folder / "latents").glob("*.bin") if f.name.startswith(arm))
    return np.fromfile(file, np.float32).reshape(-1, 24, 16, tiny.HEIGHT // 8, tiny.WIDTH // 8)


def error_line(stderr):
    line = stderr.splitlines()[-1]
    assert line.startswith("qvg: error: ") and "Traceback" not in stderr
    return line


def test_two_arms_share_their_first_clip_and_all_noise(whole):
    report = json.loads((whole / "report.json").read_text())
    assert list(report["arms"]) == ["bf16", tiny.CODEC]
    assert report["block_end_frames"] == [93, 113, 133]
    assert len(decoded(whole / "video.mp4")) == FRAMES
    qvg, bf16 = report["arms"][tiny.CODEC], report["arms"]["bf16"]
    score = qvg["frames"]["psnr_vs_bf16"]
    assert score[:93] == [100.0] * 93 and 30 < np.mean(score[93:]) < 99
    sizes = qvg["bytes"]["in_use_after_block"]
    assert sizes[0] == 0 < sizes[1] == sizes[2] < bf16["bytes"]["in_use_after_block"][1] / 4
    assert qvg["bytes"]["tokens"] == 19 * 2
    settings = report["config"]
    assert settings["sampler"] == {
        "first_clip_evaluations": 2, "segment_evaluations": 11, "guidance": 4.0,
    }  # fmt: skip
    assert settings["devices"] == 1  # eight do not divide two heads
    one, other = clips(whole, "bf16"), clips(whole, "qvg")
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1, :19], other[1, :19])
    for new, also in zip(one[1:, 19:], other[1:, 19:], strict=True):  # other noise: about 1.4
        assert 1e-6 < np.linalg.norm(new - also) / np.linalg.norm(new) < 0.2
    assert np.abs(one[1, 19:] - one[2, 19:]).max() > 1  # each segment has its own


def test_clips_are_those_of_long_video(whole):
    """The job adds files and frames, not numbers."""
    sizes = tiny.sizes()
    vae = VAE_WEIGHTS.random(sizes.vae)
    options = Options(codec="bf16", prompt="a red fox", weights="random", seed=3, steps=2,
                      height=tiny.HEIGHT, width=tiny.WIDTH, frames=LATENTS)  # fmt: skip
    settings = settle(options, sizes)
    prompt = job._LongCat().encode_prompt(options, settings, None)
    first = job.first_clip(LongCat(random_dit(sizes.dit)), prompt, settings, jax.random.key(3))
    np.testing.assert_allclose(first[0], clips(whole, "bf16")[0], rtol=0, atol=1e-5)
    frames = decoded(whole / "video.mp4")
    assert frames.shape[0] == FRAMES
    new = long_video(
        LongCat(random_dit(sizes.dit)), vae, prompt, to_frames(vae, first), count=2,
        key=jax.random.key(3), segments=Segments(), schedule=continuation(2),
    )  # fmt: skip
    stored = [to_frames(vae, c[None])[:, 73:] for c in clips(whole, "bf16")[1:]]
    for ours, theirs in zip(new, stored, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_bytes_of_a_condition_cache_from_its_shapes():
    settings = settle(
        Options(codec=tiny.CODEC, compare=("bf16",), height=16, width=32), tiny.sizes()
    )
    given = jnp.zeros((1, 19, 16, 2, 4)).at[..., 0].set(1.0)
    for name, (key_codec, value_codec) in settings.codecs.items():
        codecs = dict(key_codec=key_codec, value_codec=value_codec)
        cache = build_condition(random_dit(tiny.sizes().dit), given, **codecs)
        assert condition_bytes(settings.cache(name)) == cache_bytes(cache)


def test_an_interrupted_run_goes_on_bit_for_bit(run, whole, tmp_path, monkeypatch):
    add = Mp4.add

    def press(self, frame):
        add(self, frame)
        if self.frames == 93 + 15:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Mp4, "add", press)
        code, _, err = run("--compare", "bf16")
    assert code == 130 and "has the 113 frames so far" in err
    assert run("--compare", "bf16", "--resume")[0] == 0
    for file in (whole / "latents").glob("*.bin"):
        assert (tmp_path / "out" / "latents" / file.name).read_bytes() == file.read_bytes()
    frames = decoded(tmp_path / "out" / "video.mp4")
    np.testing.assert_array_equal(frames, decoded(whole / "video.mp4"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["timings"]["arms"]["bf16"]["kept_blocks"] >= 2
    with monkeypatch.context() as patch:  # a finished run is left alone, and nothing is loaded
        patch.setattr(job, "prepare", lambda _: pytest.fail("prepared"))
        code, out, _ = run("--compare", "bf16", "--resume")
    assert code == 0 and "is finished" in out


def test_an_image_is_the_first_frame_and_a_video_can_be_made_longer(run, tmp_path):
    picture = tmp_path / "fox.png"
    Image.fromarray(np.full((40, 100, 3), 200, np.uint8)).save(picture)
    code, out, err = run("--image", str(picture), frames=24)
    assert code == 0 and "93 frames" in out and "nothing is remembered" in err
    (first,) = clips(tmp_path / "out", "qvg")
    code, _, _ = run("--image", str(picture), "--resume", frames=29)
    assert code == 0 and len(decoded(tmp_path / "out" / "video.mp4")) == 113
    again = clips(tmp_path / "out", "qvg")
    assert len(again) == 2
    np.testing.assert_array_equal(again[0], first)
    code, _, err = run("--resume", "--prompt", "a blue fox", "--image", str(picture), frames=29)
    assert code == 2 and "'a blue fox'" in error_line(err)


def test_a_video_goes_on_if_it_is_long_enough(run, tmp_path):
    for name, count in (("short", 72), ("long", 75)):
        with Mp4(tmp_path / f"{name}.mp4", 16) as video:
            for i in range(count):
                video.add(np.full((40, 100, 3), 3 * i, np.uint8))
    code, _, err = run("--video", str(tmp_path / "short.mp4"), frames=24)
    assert code == 2 and "has 72 frames" in error_line(err)
    assert "num_cond_frames=73" in err and not (tmp_path / "out").exists()
    code, out, _ = run("--video", str(tmp_path / "long.mp4"), frames=24)
    assert code == 0 and "73 real frames, then 20 generated" in out
    frames = decoded(tmp_path / "out" / "video.mp4")
    assert len(frames) == 93 and frames[0].mean() < 20 < 190 < frames[72].mean()
    assert len(clips(tmp_path / "out", "qvg")) == 1


def test_fewer_given_frames_make_longer_segments():
    options = Options(codec="bf16", cond_frames=13, frames=24 + 20, height=16, width=32)
    settings = settle(options, tiny.sizes())
    assert (settings.count, settings.segments.given_latents) == (1, 4)
    assert settings.cache("bf16").layout.span_tokens == 4 * 2


def test_a_folder_like_the_release_with_a_lora(run, tmp_path):
    folder = tiny.weights_folder(tmp_path / "weights")
    save_file(tiny.lora(), tmp_path / "step.safetensors")
    save_file(tiny.lora(rank=4), tmp_path / "narrow.safetensors")
    lora = ("--lora", str(tmp_path / "step.safetensors"))
    code, _, _ = run(*lora, weights=folder, frames=24)
    assert code == 0
    config = json.loads((tmp_path / "out" / "report.json").read_text())["config"]
    assert config["sampler"]["guidance"] == 1.0 and "step.safetensors" in config["lora"]
    assert config["model"]["layers"] == 2 and config["prompt_embedding"] == "umT5"
    code, _, err = run("--lora", str(tmp_path / "narrow.safetensors"), weights=folder, frames=24)
    assert code == 2 and "rank 4, asked for is 128" in error_line(err)
    shard = folder / "dit" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.unlink()
    code, _, err = run(weights=folder, frames=24)
    assert code == 2 and "1 shards are missing" in error_line(err) and shard.name in err


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--frames", "30"], ["frames=30", "each segment adds 5", "29 and 34"]),
        (["--frames", "19"], ["frames=19", "24 and 29"]),
        (["--cond-frames", "72"], ["num_cond_frames=72", "1 + 4 k"]),
        (["--cond-frames", "93"], ["num_cond_frames=93", "less than frames=93"]),
        (["--height", "40"], ["height=40", "multiple of 16"]),
        (["--codec", "qvg:num_centroids=900"], ["num_centroids=900", "38 tokens"]),
        (["--window", "5"], ["--window", "Models that have it: self-forcing"]),
        (["--lora", "nowhere.safetensors"], ["nowhere.safetensors", "no such file"]),
        (["--lora", "x", "--steps", "51"], ["steps=51", "1 to 50"]),
        (["--weights", "nowhere"], ["is not a folder"]),
    ],
)
def test_bad_input(argv, parts, run, tmp_path):
    code, out, err = run(*argv)
    assert code == 2 and beside_progress(out) == ""
    assert all(part in error_line(err) for part in parts), err
    assert not (tmp_path / "out").exists()


def test_pocket_world_has_no_segments(capsys):
    assert cli.main(["generate", "--cond-frames", "13"]) == 2
    assert "--cond-frames. Models that have it: longcat" in capsys.readouterr().err


def test_what_fits(capsys):
    argv = ["plan", "longcat", "--height", "16", "--width", "32"]
    argv += ["--codec", f"bf16,{tiny.CODEC}"]
    assert cli.main([*argv, "--memory", "1GB"]) == 0
    out = capsys.readouterr().out
    assert "73 given frames of 16 x 32" in out and "any number" in out
    assert "building the cache" in out and f"Fits: bf16; {tiny.CODEC}." in out
    plan = job.plan(PlanOptions(memory=10**9, codec=("bf16",), height=16, width=32, devices=2))
    alone, two = plan.needs
    assert (two.name, two.longest) == ("bf16, heads over 2", None)
    for part in ("transformer", "cache"):
        assert 0.5 * alone.held[part] <= two.held[part] < 0.9 * alone.held[part]
    assert two.held["VAE"] == alone.held["VAE"]
    assert cli.main([*argv, "--memory", "1GB", "--devices", "3"]) == 2
    assert "3 devices do not divide heads=2" in capsys.readouterr().err
    assert cli.main([*argv, "--memory", "10KB"]) == 1
    assert "Nothing fits: text encoder alone, without any cache" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_runs_and_its_arms_agree(tmp_path, monkeypatch):
    argv = ["--out", str(tmp_path), "--tiny", "--layers", "1", "--height", "16", "--width", "32"]
    argv += ["--arms", "bf16", "--repeats", "1", "--opponents", "merge"]
    monkeypatch.setattr(sys, "argv", ["longcat", *argv, "--child", "segment"])
    assert benchmark.main() == 0
    result = json.loads((tmp_path / "segment.json").read_text())
    assert set(result["arms"]) == {"bf16", "merge"}
    for arm in result["arms"].values():
        assert arm["relative_l2_to_opponent"] < 2e-2 and arm["milliseconds"] > 0
    assert "1.000x of the fastest opponent" in longcat_table(result, benchmark.OPPONENTS)
