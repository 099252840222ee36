"""`qvg generate self-forcing` on a tiny model, within the process of a test."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.self_forcing import job
from models.umt5 import Tokenizer
from qvg_jax.app import cli
from tests.support import tiny_self_forcing as tiny
from tests.support.tiny_world import as_in_its_own_process

LATENTS = 30  # ten blocks: one span of 24 is compressed before the ninth


@contextlib.contextmanager
def tiny_process(session: Path) -> Iterator[None]:
    """The model is tiny inside, and the command sets up JAX as in a process of its own."""
    with as_in_its_own_process(session), pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "released_sizes", tiny.sizes)
        patch.setattr(Tokenizer, "from_file", lambda path, length: tiny.letters(length))
        yield


def command(*argv, frames=LATENTS, out, weights="random"):
    common = ["generate", "self-forcing", "--codec", tiny.CODEC, "--seed", "3"]
    common += ["--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH)]
    common += ["--weights", str(weights), "--frames", str(frames), "--out", str(out)]
    return cli.main([*common, "--prompt", "a red fox", *argv])


def runner(tmp_path, capsys):
    """run("--codec", "qvg") -> exit code, stdout, stderr; files go to tmp_path / "out"."""

    def run(*argv, frames=LATENTS, out=tmp_path / "out", weights="random"):
        code = command(*argv, frames=frames, out=out, weights=weights)
        return code, *capsys.readouterr()

    return run


def error_line(stderr):
    line = stderr.splitlines()[-1]
    assert line.startswith("qvg: error: ") and "Traceback" not in stderr
    return line
