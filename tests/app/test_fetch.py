"""Weights from a hub on the loopback address: laid out, resumed, asked for, refused."""

import dataclasses
import json
import types

import numpy as np
import pytest
from huggingface_hub import constants, file_download
from safetensors.numpy import load_file, save

from qvg_jax.app import fetch as fetching
from qvg_jax.app.fetch import fetch, fetch_address
from qvg_jax.app.hub import Address, Download, offers
from qvg_jax.errors import UserError
from tests.support.loopback_hub import Repository, served

BIG = 3_000_000


def tensors(seed: int, size: int = 64) -> bytes:
    rng = np.random.default_rng(seed)
    return save({"w": rng.standard_normal(size).astype(np.float32)})


@pytest.fixture
def hub(tmp_path):
    """A hub with a release in two repositories, and a client whose cache is the test's own."""
    transformer = Repository({"checkpoints/tiny_dmd.safetensors": tensors(0, BIG // 4)})
    parts = Repository(
        {
            "Tiny_VAE.safetensors": tensors(1),
            "models_t5.safetensors": tensors(2),
            "google/umt5-xxl/tokenizer.json": b"{}",
            "README.md": b"not wanted",
        },
        licence="mit",
    )
    with served(tmp_path / "hub", {"lab/tiny": transformer, "lab/parts": parts}) as hub:
        yield hub


NEEDED = (
    Download(
        what="the transformer",
        repo="lab/tiny",
        subfolder="checkpoints",
        files=("tiny_dmd.safetensors",),
        name="self_forcing_tiny",
        licence="apache-2.0",
    ),
    Download(
        what="the VAE, the text encoder and its tokenizer",
        repo="lab/parts",
        files=("*_VAE.safetensors", "models_t5.safetensors", "google/umt5-xxl/*"),
        licence="mit",
    ),
)


def agree(_) -> bool:
    return True


def test_a_release_in_two_repositories_becomes_one_folder(hub, tmp_path):
    asked = []
    folder = fetch(NEEDED, accept=lambda o: asked.append(o) or True, cache=tmp_path / "own")
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert found == [
        "Tiny_VAE.safetensors",
        "google/umt5-xxl/tokenizer.json",
        "models_t5.safetensors",
        "self_forcing_tiny.safetensors",
        "sources.json",
    ]
    np.testing.assert_array_equal(
        load_file(folder / "Tiny_VAE.safetensors")["w"],
        np.random.default_rng(1).standard_normal(64).astype(np.float32),
    )
    assert [offer.licence for offer in asked[0]] == ["apache-2.0", "mit"]
    sources = json.loads((folder / "sources.json").read_text())
    assert sources[0]["commit"] == hub.repositories["lab/tiny"].commit


def test_a_second_call_asks_and_downloads_nothing(hub, tmp_path):
    first = fetch(NEEDED, accept=agree, cache=tmp_path / "own")
    sent = hub.sent
    assert sent > BIG

    def never(_):
        raise AssertionError("asked again")

    assert fetch(NEEDED, accept=never, cache=tmp_path / "own") == first
    assert hub.sent == sent


def test_another_commit_is_another_folder(hub, tmp_path):
    first = fetch(NEEDED, accept=agree, cache=tmp_path / "own")
    hub.repositories["lab/parts"].files["Tiny_VAE.safetensors"] = tensors(9)
    second = fetch(NEEDED, accept=agree, cache=tmp_path / "own")
    assert second != first
    kept, new = (load_file(f / "Tiny_VAE.safetensors")["w"] for f in (first, second))
    assert not np.array_equal(kept, new)


def test_an_offer_states_bytes_and_commit_before_anything_is_downloaded(hub):
    offer, parts = offers(NEEDED)
    assert offer.bytes_missing == len(
        hub.repositories["lab/tiny"].files["checkpoints/tiny_dmd.safetensors"]
    )
    assert [name for name, _, _ in parts.files] == [
        "Tiny_VAE.safetensors",
        "google/umt5-xxl/tokenizer.json",
        "models_t5.safetensors",
    ]
    assert hub.sent == 0


def test_an_interrupted_download_goes_on_where_it_ended(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    at_once = types.SimpleNamespace(sleep=lambda _: None)  # the client waits between its attempts
    monkeypatch.setattr(file_download, "time", at_once)
    hub.break_after = BIG // 2
    with pytest.raises(UserError, match="lab/tiny at revision main"):
        fetch(NEEDED, accept=agree, cache=tmp_path / "own")
    hub.break_after = None
    folder = fetch(NEEDED, accept=agree, cache=tmp_path / "own")
    whole = np.random.default_rng(0).standard_normal(BIG // 4).astype(np.float32)
    np.testing.assert_array_equal(load_file(folder / "self_forcing_tiny.safetensors")["w"], whole)
    assert any(int(r.removeprefix("bytes=").split("-")[0]) > 0 for r in hub.ranges)


def test_a_licence_that_is_not_accepted_downloads_nothing(hub, tmp_path):
    with pytest.raises(UserError, match="licences of lab/parts, lab/tiny were not accepted"):
        fetch(NEEDED, accept=lambda _: False, cache=tmp_path / "own")
    assert hub.sent == 0


def test_no_room_is_said_before_the_download(hub, tmp_path, monkeypatch):
    usage = fetching.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="GB are missing and .* has 0.00 GB free"):
        fetch(NEEDED, accept=agree, cache=tmp_path / "own")
    assert hub.sent == 0


def test_an_address_replaces_the_transformer_only(hub, tmp_path):
    hub.repositories["someone/finetuned"] = Repository({"model.safetensors": tensors(5)})
    folder = fetch_address("hf:someone/finetuned", NEEDED, accept=agree, cache=tmp_path / "own")
    np.testing.assert_array_equal(
        load_file(folder / "self_forcing_tiny.safetensors")["w"],
        np.random.default_rng(5).standard_normal(64).astype(np.float32),
    )
    assert (folder / "Tiny_VAE.safetensors").is_file()


def test_shards_of_another_transformer_keep_their_numbers(hub, tmp_path):
    shards = {f"model-0000{i}-of-00002.safetensors": tensors(i) for i in (1, 2)}
    hub.repositories["someone/large"] = Repository(shards)
    folder = fetch_address("hf:someone/large", NEEDED, accept=agree, cache=tmp_path / "own")
    found = sorted(p.name for p in folder.glob("self_forcing*"))
    assert found == [f"self_forcing_tiny-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_several_checkpoints_in_one_place_are_an_error(hub, tmp_path):
    files = {f"{name}.safetensors": tensors(1) for name in ("ema", "raw")}
    hub.repositories["someone/both"] = Repository(files)
    with pytest.raises(UserError, match="several checkpoints .ema.safetensors, raw.safetensors."):
        fetch_address("hf:someone/both", NEEDED, accept=agree, cache=tmp_path / "own")


def test_an_address_in_a_subfolder_at_a_revision(hub, tmp_path):
    commit = hub.repositories["lab/tiny"].commit
    text = f"hf:lab/tiny@{commit}:checkpoints"
    assert Address.parse(text) == Address("lab/tiny", commit, "checkpoints")
    folder = fetch_address(text, NEEDED, accept=agree, cache=tmp_path / "own")
    assert (folder / "self_forcing_tiny.safetensors").is_file()


@pytest.mark.parametrize(
    "text", ["hf:", "hf:alone", "hf:a/b/c", "hf:a/b:../up", "hf:a/b@", "lab/tiny", "hf:a b/c"]
)
def test_what_is_no_address(text):
    with pytest.raises(UserError, match="accepted: hf:ORGANISATION/NAME"):
        Address.parse(text)


def refused(hub, change):
    download = NEEDED[0]
    if change == "repository":
        return [dataclasses.replace(download, repo="lab/absent")], "lab/absent .* was not found"
    if change == "revision":
        return [dataclasses.replace(download, revision="v9")], "no such branch, tag or commit"
    if change == "file":
        return [dataclasses.replace(download, files=("other.pt",))], "has no checkpoints/other.pt"
    hub.repositories["lab/tiny"].gated = True
    return [download], "wants its conditions accepted"


@pytest.mark.parametrize("change", ["repository", "revision", "file", "gated"])
def test_what_the_hub_refuses_is_said_in_a_sentence(hub, change):
    downloads, sentence = refused(hub, change)
    with pytest.raises(UserError, match=sentence):
        offers(downloads)


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no connection to the hub"):
        offers(NEEDED)
