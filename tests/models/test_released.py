"""A stranger's path: fetch the release from a hub, then generate without naming any weights."""

import dataclasses
import json

import pytest

from models.self_forcing import entry, job
from models.self_forcing.releases import Release
from models.umt5 import Tokenizer
from qvg_jax.app import cli
from qvg_jax.app.hub import Download
from tests.support import tiny_self_forcing as tiny
from tests.support.loopback_hub import Repository, served
from tests.support.tiny_world import as_in_its_own_process

# As the release, but safetensors where the release has pickled files: those need PyTorch.
NEEDS = (
    Download(
        what="the transformer",
        repo="gdhe17/Self-Forcing",
        subfolder="checkpoints",
        files=("self_forcing_dmd.safetensors",),
        licence="apache-2.0",
    ),
    Download(
        what="the video VAE, the text encoder and its tokenizer",
        repo="Wan-AI/Wan2.1-T2V-1.3B",
        files=("Wan2.1_VAE.safetensors", "models_t5_umt5-xxl-enc-bf16.safetensors",
               "google/umt5-xxl/*", "config.json"),
        licence="apache-2.0",
    ),
)  # fmt: skip
SIZE = ["--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH), "--frames", "3"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "release"
    folder.mkdir()
    tiny.weights_folder(folder)
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    transformer = files.pop("self_forcing_dmd.safetensors")
    repositories = {
        "gdhe17/Self-Forcing": Repository(
            {"checkpoints/self_forcing_dmd.safetensors": transformer}
        ),
        "Wan-AI/Wan2.1-T2V-1.3B": Repository(files),
        "someone/finetuned": Repository({"model.safetensors": transformer}),
    }
    monkeypatch.setattr(job, "released_sizes", tiny.sizes)
    monkeypatch.setattr(Release, "needs", NEEDS)
    changed = dataclasses.replace(entry.ENTRY, needs=NEEDS)
    monkeypatch.setitem(entry.ENTRIES, "self-forcing", changed)
    monkeypatch.setattr(Tokenizer, "from_file", lambda path, length: tiny.letters(length))
    with as_in_its_own_process(tmp_path), served(tmp_path / "hub", repositories) as hub:
        yield hub


def generate(out, *argv):
    options = ["--codec", "bf16", "--prompt", "a red fox", "--out", str(out), *SIZE]
    return cli.main(["generate", "self-forcing", *options, *argv])


def weights_of(out):
    return json.loads((out / "report.json").read_text())["config"]["weights"]


def test_fetch_then_generate(hub, tmp_path, capsys):
    assert generate(tmp_path / "out") == 2
    assert "weights is missing" in (err := capsys.readouterr().err) and "qvg fetch" in err
    assert cli.main(["fetch", "self-forcing"]) == 2  # nobody answers
    err = capsys.readouterr().err
    assert "the transformer: gdhe17/Self-Forcing" in err and "licence: apache-2.0" in err
    assert "were not accepted; nothing was downloaded" in err and hub.sent == 0
    assert cli.main(["fetch", "self-forcing", "--yes"]) == 0
    assert "`qvg generate self-forcing` reads them" in capsys.readouterr().out
    assert generate(tmp_path / "out") == 0
    assert set(weights_of(tmp_path / "out")) == set(tiny.FILES.values())
    # Another transformer by its address; its licence must be accepted, the others were.
    assert generate(tmp_path / "other", "--weights", "hf:someone/finetuned") == 2
    assert "someone/finetuned were not accepted" in capsys.readouterr().err
