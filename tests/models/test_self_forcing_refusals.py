"""What `qvg generate self-forcing` refuses, and how it says so."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.runs import latent_job
from qvg_jax.app import cli
from qvg_jax.app.video import Mp4
from tests.support import tiny_self_forcing as tiny
from tests.support.outputs import beside_progress
from tests.support.self_forcing_command import error_line, runner, tiny_process


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with tiny_process(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture
def run(tmp_path, capsys):
    return runner(tmp_path, capsys)


@pytest.mark.parametrize("part", ["dit", "vae", "text"])
def test_a_partial_checkpoint_is_refused_before_anything_is_loaded(
    run, tmp_path, part, monkeypatch
):
    monkeypatch.setattr(latent_job, "embed_prompts", None)  # would fail if it were called
    folder = tiny.weights_folder(tmp_path)
    file = folder / tiny.FILES[part]
    arrays = load_file(file)
    gone = sorted(arrays)[-1]
    arrays["surplus"] = arrays.pop(gone)
    save_file(arrays, file)
    code, _, err = run(frames=3, weights=folder)
    line = error_line(err)
    assert code == 2 and file.name in line and "2 problems" in line
    assert "missing: " in line and "unused: surplus" in line
    file.write_bytes(file.read_bytes()[:1000])
    code, _, err = run(frames=3, weights=folder)
    assert code == 2 and "not a readable safetensors file" in error_line(err)


def test_a_folder_that_lacks_parts_says_which_and_how_to_get_them(run, tmp_path):
    (tmp_path / "self_forcing_dmd.pt").write_bytes(b"")
    code, _, err = run(weights=tmp_path)
    line = error_line(err)
    assert code == 2 and f"`qvg convert {tmp_path}/self_forcing_dmd.pt" in line
    assert "video VAE" in line and "text encoder" in line and "tokenizer.json" in line
    code, _, err = run(weights=tmp_path / "nowhere")
    assert code == 2 and "is not a folder" in error_line(err) and "'random'" in error_line(err)


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--frames", "7"], ["frames=7", "blocks are 3 frames", "nearest are 6 and 9"]),
        (["--frames", "66"], ["frames=66", "rope_frames=64", "RoPE table", "--endless"]),
        (["--horizon", "9"], ["horizon=9 needs --endless"]),
        (["--endless", "--horizon", "2"], ["horizon=2 is shorter than a block of 3"]),
        (["--endless", "--horizon", "62"], ["horizon=62", "64 rows", "at most 61"]),
        (["--height", "40"], ["height=40", "multiple of 16"]),
        (["--width", "8"], ["width=8", "multiple of 16"]),
        (["--codec", "zip"], ["'zip'", "accepted: qvg"]),
        (["--codec", "qvg:num_centroids=900"], ["num_centroids=900", "144 tokens"]),
        (["--window", "5", "--sink", "3"], ["window_frames=5", "at least 7"]),
        (["--span", "2"], ["span_frames=2", "at least 3"]),
        (["--tour", "8"], ["--tour", "Models that have it: pocket-world"]),
        (["--actions", "w-8"], ["--actions", "pocket-world, worldplay"]),
        (["--prompt", ""], ["prompt is missing"]),
        (["--seed", str(2**31)], [f"seed={2**31}"]),
        (["--steps", "1001"], ["steps="]),
        (["--image", "a.png", "--video", "b.mp4"], ["one of them"]),
        (["--image", "nowhere.png", "--frames", "7"], ["nowhere.png", "not readable"]),
        (["--image", "nowhere.png"], ["frames=30", "3 k + 1"]),
    ],
)
def test_bad_input(argv, parts, run, tmp_path):
    code, out, err = run(*argv)
    assert code == 2 and beside_progress(out) == ""
    assert all(part in error_line(err) for part in parts), err
    assert not (tmp_path / "out").exists()


def test_bad_given_frames(run, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    code, _, err = run("--image", str(tmp_path / "text.png"), frames=7)
    assert code == 2 and "not readable as an image" in error_line(err)
    with Mp4(tmp_path / "short.mp4", 16) as video:
        for _ in range(8):
            video.add(np.zeros((40, 100, 3), np.uint8))
    code, _, err = run("--video", str(tmp_path / "short.mp4"), frames=6)
    assert code == 2 and "has 8 frames" in error_line(err) and "at least 9" in error_line(err)
    with Mp4(tmp_path / "long.mp4", 16) as video:
        for _ in range(21):
            video.add(np.zeros((40, 100, 3), np.uint8))
    code, _, err = run("--video", str(tmp_path / "long.mp4"), frames=6)
    assert code == 2 and "more than the 3 latent frames" in error_line(err)


def test_pocket_world_does_not_know_prompts(capsys):
    assert cli.main(["generate", "--prompt", "a fox"]) == 2
    assert (
        "--prompt. Models that have it: self-forcing, worldplay, longcat" in capsys.readouterr().err
    )
