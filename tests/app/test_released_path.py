"""The page docs/released-weights.md: fetch, generate and verify, from a hub on the loopback address."""

import dataclasses
import json

import pytest

from models.self_forcing import entry, job
from models.umt5 import Tokenizer
from qvg_jax.app import cli
from tests.support import tiny_self_forcing as tiny
from tests.support.loopback_hub import Repository, served
from tests.support.pages import ROOT, commands
from tests.support.tiny_world import as_in_its_own_process

SIZE = ["--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH)]


@pytest.fixture
def hub(tmp_path):
    """The release on a hub, at a tiny size. Its pickled files are safetensors already."""
    (tmp_path / "made").mkdir()
    made = tiny.weights_folder(tmp_path / "made")
    (made / "config.json").unlink()
    files = {str(f.relative_to(made)): f.read_bytes() for f in made.rglob("*") if f.is_file()}
    transformer = files.pop("self_forcing_dmd.safetensors")
    repositories = {
        "gdhe17/Self-Forcing": Repository(
            {"checkpoints/self_forcing_dmd.safetensors": transformer}
        ),
        "Wan-AI/Wan2.1-T2V-1.3B": Repository(files),
    }
    as_tensors = [
        dataclasses.replace(
            download,
            files=tuple(
                f"{f.rpartition('.')[0]}.safetensors" if f.endswith((".pt", ".pth")) else f
                for f in download.files
            ),
        )
        for download in entry.ENTRY.needs
    ]
    changed = dataclasses.replace(entry.ENTRY, needs=tuple(as_tensors))
    with (
        as_in_its_own_process(tmp_path),
        pytest.MonkeyPatch.context() as patch,
        served(tmp_path / "hub", repositories) as hub,
    ):
        patch.setitem(entry.ENTRIES, "self-forcing", changed)
        patch.setattr(job, "released_sizes", tiny.sizes)
        patch.setattr(Tokenizer, "from_file", lambda path, length: tiny.letters(length))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield hub


@pytest.mark.slow
def test_the_way_from_a_hub_to_numbers(hub, tmp_path, capsys):
    asked = [
        words for words in commands(ROOT / "docs" / "released-weights.md") if words[0] == "qvg"
    ]
    kinds = [words[1] for words in asked]
    assert [k for k in kinds if k in ("fetch", "generate", "verify")][:3] == [
        "fetch", "generate", "verify",
    ]  # fmt: skip
    assert cli.main(["generate", "self-forcing", "--prompt", "a fox"]) == 2
    assert "`qvg fetch self-forcing` before" in capsys.readouterr().err
    assert cli.main(["fetch", "self-forcing"]) == 2  # nobody at the keyboard accepts the licences
    assert "were not accepted" in capsys.readouterr().err
    assert cli.main(["fetch", "self-forcing", "--yes"]) == 0
    sent = hub.sent
    out = tmp_path / "out"
    fox = ["--prompt", "a fox", "--frames", "6", "--codec", tiny.CODEC, "--compare", "bf16"]
    assert cli.main(["generate", "self-forcing", *fox, *SIZE, "--out", str(out)]) == 0
    assert (out / "video.mp4").stat().st_size > 1000
    verified = tmp_path / "verified"
    fewer = ["--videos", "1", "--frames", "27", "--codec", tiny.CODEC]
    assert cli.main(["verify", "self-forcing", *fewer, *SIZE, "--out", str(verified)]) == 0
    result = json.loads((verified / "verify.json").read_text())
    assert "self_forcing_dmd.safetensors" in result["weights"]
    # These are not random weights, as far as the command knows; no arm of a band is there.
    assert {band["because"] for band in result["bands"]} == {"no such arm, or too few frames"}
    assert hub.sent == sent  # nothing is downloaded twice
