"""`qvg generate self-forcing`, end to end on a tiny model."""

import json
import signal

import av
import jax
import numpy as np
import pytest
from PIL import Image

from models.runs import decode as player
from models.runs.pictures import as_video, pictures
from models.runs.prompts import stand_in_embedding
from models.runs.saved_latents import SavedLatents
from models.self_forcing import initial, job
from models.self_forcing.entry import Options
from models.umt5 import pipeline as text_pipeline
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from qvg_jax.app.panels import Sheet
from qvg_jax.app.video import Mp4
from qvg_jax.errors import UserError
from tests.support import tiny_self_forcing as tiny
from tests.support.self_forcing_command import LATENTS, command, error_line, runner, tiny_process

FRAMES = 1 + 4 * (LATENTS - 1)
STAND_IN = dict(slots=7, width=12, dtype=np.float32)


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with tiny_process(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture
def run(tmp_path, capsys):
    return runner(tmp_path, capsys)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two arms that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert command("--compare", "bf16", out=out) == 0
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.weights_folder(tmp_path_factory.mktemp("weights"))


def decoded(path):
    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


def test_two_arms_share_their_noise_and_stand_side_by_side(whole):
    assert {p.name for p in whole.iterdir()} == {
        ".lock",
        "video.mp4", "report.json", "report.png", "report.html", "latents",
    }  # fmt: skip
    with av.open(str(whole / "video.mp4")) as file:
        stream = file.streams.video[0]
        sheet = Sheet(3, tiny.HEIGHT, tiny.WIDTH, tour=0, frames=FRAMES)
        assert (stream.frames, stream.average_rate) == (FRAMES, 16)
        assert (stream.height, stream.width) == (sheet.height, sheet.width)
    report = json.loads((whole / "report.json").read_text())
    assert list(report["arms"]) == ["bf16", tiny.CODEC]
    assert report["block_end_frames"] == [9 + 12 * i for i in range(10)]
    bf16, qvg = report["arms"]["bf16"], report["arms"][tiny.CODEC]
    score = qvg["frames"]["psnr_vs_bf16"]
    assert len(score) == FRAMES and bf16["frames"] == {}
    # Nothing is compressed before the ninth block: until then only two programs' rounding differs.
    assert min(score[: 9 + 12 * 7]) > 75 and 20 < np.mean(score[9 + 12 * 7 :]) < 99
    assert qvg["bits_per_element"]["from_buffers"] < 4 < bf16["bits_per_element"]["from_buffers"]
    assert bf16["bytes"]["tokens"] == qvg["bytes"]["tokens"] == LATENTS * 6
    timing = report["timings"]["arms"][tiny.CODEC]
    assert len(timing["block_generate_seconds"]) == len(timing["block_decode_seconds"]) == 10
    assert timing["generated_frames_per_second"] > 0 and "kept_blocks" not in timing
    assert report["config"]["prompt"] == "a red fox" and report["config"]["weights"] == "random"
    assert report["config"]["caches"][tiny.CODEC]["spans"] == 1
    assert Image.open(whole / "report.png").size[0] == 1650


def test_short_spans_and_frames_that_stay_as_they_are(run, tmp_path):
    """Spans of two blocks, the newest block never in them: by block 4 there is one."""
    code, _, err = run("--span", "6", "--recent", "3", "--compare", "bf16", frames=15)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    cache, arm = report["config"]["caches"][tiny.CODEC], report["arms"][tiny.CODEC]
    assert (cache["span_frames"], cache["spans"], cache["window_frames"]) == (6, 1, 11)
    score = arm["frames"]["psnr_vs_bf16"]
    assert min(score[:33]) > 75 and 20 < np.mean(score[33:]) < 99
    code, _, err = run("--resume", "--span", "9", "--recent", "3", "--compare", "bf16", frames=15)
    assert code == 2 and "span" in error_line(err)


def test_latents_are_those_of_the_pipeline(whole):
    """The job adds files and frames, not numbers."""
    options = Options(
        frames=LATENTS, height=tiny.HEIGHT, width=tiny.WIDTH, seed=3, weights="random",
        codec="bf16", prompt="a red fox",
    )  # fmt: skip
    settings = job.settle(options, tiny.sizes())
    pipeline = job.SelfForcing(job.WEIGHTS.random(settings.sizes.dit))
    words = stand_in_embedding("a red fox", **STAND_IN)
    wanted = pipeline.generate(
        job.Generation(
            text_BUE=words.text_BUE,
            frames=LATENTS,
            latent_height=4,
            latent_width=6,
            noise=jax.random.fold_in(jax.random.key(3), 1),
        )
    )
    stored = np.fromfile(whole / "latents" / "bf16.bin", np.float32)
    stored = stored.reshape(LATENTS, 16, 4, 6)
    np.testing.assert_allclose(stored, wanted[0], rtol=0, atol=2e-4)


def test_one_arm_is_a_plain_video_that_can_be_watched_while_it_grows(run, tmp_path, monkeypatch):
    seen, add = [], Mp4.add

    def look(self, frame):
        add(self, frame)
        if self.frames in (20, 33):  # the file as another process would find it
            copy = tmp_path / "copy.mp4"
            copy.write_bytes(self.path.read_bytes())
            seen.append(len(decoded(copy)))

    with monkeypatch.context() as patch:
        patch.setattr(Mp4, "add", look)
        code, out, err = run("--stream", frames=9)
    assert code == 0 and "self-forcing: 33 frames, for each of qvg" in out
    assert "too few to compress any" in err
    # The muxer holds a frame back until it knows how long it lasts.
    assert seen[0] >= 18 and seen[1] >= 31
    frames = decoded(tmp_path / "out" / "video.mp4")
    assert frames.shape == (33, tiny.HEIGHT, tiny.WIDTH, 3)
    run("--out", str(tmp_path / "plain"), frames=9)
    plain = decoded(tmp_path / "plain" / "video.mp4")
    assert np.abs(frames.astype(int) - plain).mean() < 15  # noise, and other settings


def interrupted(run, monkeypatch, blocks, *argv):
    """The command, with Ctrl-C while the last of so many blocks is written."""
    add = Mp4.add

    def press(self, frame):
        add(self, frame)
        if self.frames == 9 + 12 * (blocks - 1) - 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Mp4, "add", press)
        return run(*argv)


@pytest.mark.parametrize("blocks", [2, 9])
def test_an_interrupted_run_goes_on_bit_for_bit(run, whole, tmp_path, monkeypatch, blocks):
    both = ("--compare", "bf16")
    code, _, err = interrupted(run, monkeypatch, blocks, *both)
    kept = 9 + 12 * (blocks - 1)
    assert code == 130 and f"has the {kept} frames so far" in err
    assert len(decoded(tmp_path / "out" / "video.mp4")) == kept
    code, _, _ = run(*both, "--resume")
    assert code == 0
    for file in (whole / "latents").glob("*.bin"):
        again = tmp_path / "out" / "latents" / file.name
        assert again.read_bytes() == file.read_bytes(), file.name
    frames = decoded(tmp_path / "out" / "video.mp4")
    np.testing.assert_array_equal(frames, decoded(whole / "video.mp4"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["timings"]["arms"]["bf16"]["kept_blocks"] in (blocks, blocks + 1)


def test_a_finished_video_can_be_made_longer(run, tmp_path):
    assert run(frames=6)[0] == 0
    file = next((tmp_path / "out" / "latents").glob("*.bin"))
    before = file.read_bytes()
    assert run("--resume", frames=9)[0] == 0
    assert file.read_bytes()[: len(before)] == before and len(file.read_bytes()) > len(before)
    assert len(decoded(tmp_path / "out" / "video.mp4")) == 33
    files = [p for p in (tmp_path / "out").rglob("*.*") if p.is_file() and p.name != ".lock"]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
    with pytest.MonkeyPatch.context() as patch:  # it is told before a network is loaded
        patch.setattr(job, "prepare", lambda *_, **__: pytest.fail("prepared"))
        code, out, _ = run("--resume", frames=9)
    assert code == 0 and "is finished, and all its files stay" in out
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files} == before


def test_a_run_goes_on_only_from_its_own_latents(run, tmp_path):
    code, _, err = run("--resume", frames=6)
    assert code == 0 and "go on from; from the beginning" in err
    code, _, err = run("--resume", "--prompt", "a blue fox", frames=6)
    assert code == 2
    assert "prompt='a red fox'" in error_line(err) and "'a blue fox'" in error_line(err)
    assert run("--prompt", "a blue fox", frames=6)[0] == 0  # anew


def test_a_block_that_was_cut_off_is_made_again(tmp_path):
    kept = SavedLatents(tmp_path, {"seed": 1}, (1, 3, 2, 4, 4), np.float32, resume=False)
    assert kept.read("a:b=1").shape == (1, 0, 2, 4, 4)
    blocks = np.random.default_rng(0).normal(size=(3, 1, 3, 2, 4, 4)).astype(np.float32)
    for i, block in enumerate(blocks):
        kept.add("a:b=1", i, block)
    file = next((tmp_path / "latents").glob("*.bin"))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match="first 2 blocks of this run, interrupted.*--resume"):
        SavedLatents(tmp_path, {"seed": 1}, (1, 3, 2, 4, 4), np.float32)
    again = SavedLatents(tmp_path, {"seed": 1}, (1, 3, 2, 4, 4), np.float32, resume=True)
    np.testing.assert_array_equal(again.read("a:b=1"), np.concatenate(blocks[:2], axis=1))
    again.add("a:b=1", 2, blocks[2])
    np.testing.assert_array_equal(again.read("a:b=1"), np.concatenate(blocks, axis=1))


def picture(path, size=(100, 40), shade=200):
    Image.fromarray(np.full((size[1], size[0], 3), shade, np.uint8)).save(path)
    return str(path)


def test_an_image_is_the_first_frame(run, tmp_path):
    code, out, _ = run("--image", picture(tmp_path / "fox.png"), frames=7)
    assert code == 0 and "self-forcing: 1 real frames, then 24 generated" in out
    assert len(decoded(tmp_path / "out" / "video.mp4")) == 25
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["block_end_frames"] == [1, 13, 25] and report["config"]["tour_frames"] == 1
    one = (tmp_path / "out" / "latents").glob("*.bin")
    one = next(one).read_bytes()
    run("--image", picture(tmp_path / "fox.png", shade=20), frames=7)
    assert next((tmp_path / "out" / "latents").glob("*.bin")).read_bytes() != one


def test_a_video_goes_on(run, tmp_path):
    with Mp4(tmp_path / "given.mp4", 16) as video:
        for i in range(24):  # 21 fill two blocks
            video.add(np.full((40, 100, 3), 10 * i, np.uint8))
    code, out, _ = run("--video", str(tmp_path / "given.mp4"), frames=12)
    assert code == 0 and "21 real frames, then 24 generated" in out
    assert len(decoded(tmp_path / "out" / "video.mp4")) == 45
    sizes = tiny.sizes()
    vae = VAE_WEIGHTS.random(sizes.vae)
    given = dict(image=False, frames=12, height=tiny.HEIGHT, width=tiny.WIDTH)
    pieces = initial.initial_latents(vae, sizes.dit, tmp_path / "given.mp4", **given)
    video = as_video(list(pictures(tmp_path / "given.mp4", 32, 48))[:21])
    np.testing.assert_allclose(pieces, vae.encode(video), rtol=0, atol=1e-4)


def test_a_folder_of_checkpoints(run, folder, tmp_path, monkeypatch):
    dropped, drop = [], text_pipeline.drop

    def look(model):
        drop(model)
        dropped.extend(x.is_deleted() for x in jax.tree.leaves(model))

    monkeypatch.setattr(text_pipeline, "drop", look)
    code, _, err = run("--prompt", "a very long prompt", frames=3, weights=folder)
    assert code == 0 and len(dropped) > 10 and all(dropped)
    warning = next(line for line in err.splitlines() if "cut off" in line)
    assert (
        "qvg: warning: prompt 0 has 19 tokens, at most 7 are used" in warning
        and "'12 letters'" in warning
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["config"]["weights"]) == set(tiny.FILES.values())
    assert report["config"]["model"]["layers"] == 2  # from config.json


def test_not_enough_memory_names_the_plan(run, monkeypatch):
    def refused(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n1")

    monkeypatch.setattr(player, "decode", refused)
    code, _, err = run(frames=6)
    line = error_line(err)
    assert code == 2 and "9 bytes" in line and "accepted: a smaller codec" in line
    assert "`qvg plan self-forcing --frames 6 --codec" in line


def test_the_stand_in_for_a_prompt():
    one, mask, said = stand_in_embedding("a red fox", **STAND_IN)
    other = stand_in_embedding("a blue fox", **STAND_IN).text_BUE
    assert one.shape == (1, 3, 12) and mask.shape == (1, 3) and mask.all() and said == []
    np.testing.assert_array_equal(one[:, 0], other[:, 0])
    assert (one[:, 1] != other[:, 1]).any()
    cut = stand_in_embedding("one two three four five six seven eight", **STAND_IN)
    assert cut.text_BUE.shape[1] == 7 and "cut off: 'eight'" in cut.said[0]
