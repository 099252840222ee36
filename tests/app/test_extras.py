"""A missing optional package is one line with the command that installs it, for every extra."""

import importlib.metadata
import importlib.util
import sys
import tomllib

import pytest

from models.umt5 import Tokenizer, clean_prompt
from pallas_kernels.gpu.triton_launch import missing
from qvg_jax.app import cli
from qvg_jax.app.perceptual import load_lpips
from qvg_jax.errors import MissingExtraError, UserError
from tests.support.pages import ROOT

EXTRAS = {"text", "convert", "hub", "play", "lpips", "gpu", "gpu-cuda12"}


def installs(line, extra):
    return f"pip install 'qvg-jax[{extra}]'" in line and "\n" not in line


@pytest.fixture
def without(monkeypatch):
    """without("name") makes importing a package fail as if it was not installed."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


def test_the_extras_are_those_that_are_tested_here():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*project["optional-dependencies"]} == EXTRAS


@pytest.mark.parametrize(
    ("package", "words", "extra"),
    [
        ("huggingface_hub", ["fetch", "self-forcing", "--yes"], "hub"),
        ("torch", ["convert", "{file}", "{file}.safetensors"], "convert"),
        ("nicegui", ["play", "--port", "0", "--no-browser"], "play"),
    ],
)
def test_a_command(package, words, extra, without, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "qvg_jax.app.play.server", raising=False)
    monkeypatch.delattr("qvg_jax.app.play.server", raising=False)
    monkeypatch.delitem(sys.modules, "qvg_jax.app.play.page", raising=False)
    without(package)
    file = tmp_path / "w.pt"
    file.write_bytes(b"x")
    assert cli.main([word.format(file=file) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qvg: error: ") and installs(line, extra)


def test_a_prompt_that_must_be_repaired(without):
    without("ftfy")
    with pytest.raises(MissingExtraError) as error:
        clean_prompt("a fox & a hen")
    assert installs(str(error.value), "text")


@pytest.mark.parametrize(
    ("package", "file"), [("tokenizers", "tokenizer.json"), ("sentencepiece", "spiece.model")]
)
def test_a_tokenizer(package, file, without, tmp_path):
    (tmp_path / file).write_text("{}")
    without(package)
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(tmp_path / file)
    assert package in str(error.value) and installs(str(error.value), "text")


def test_triton_kernels(without):
    without("triton")
    without("jax_triton")
    line = missing.__wrapped__()
    assert "triton and jax_triton" in line and installs(line, "gpu")


@pytest.mark.parametrize(
    ("found", "enough"), [("3.6.0", False), ("2.11", False), ("3.7.0", True), ("4.0.0+git1", True)]
)
def test_a_triton_that_is_too_old(found, enough, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    line = missing.__wrapped__()
    assert line is None if enough else line.startswith(f"triton is {found}; jax_triton needs 3.7")


def test_a_perceptual_distance(without):
    without("lpips")
    with pytest.raises(MissingExtraError) as caught:
        load_lpips()
    assert installs(str(caught.value), "lpips")
