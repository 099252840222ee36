"""What `qvg play` says when it cannot start."""

import socket
import sys

import pytest

from qvg_jax.app import cli
from tests.support.tiny_world import as_in_its_own_process, random_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(random_weights(tmp_path_factory.mktemp("weights")))


@pytest.fixture
def command(capsys, tmp_path_factory, weights):
    """command("--port", "1") -> (exit code, the one line on stderr)."""

    def command(*argv):
        with as_in_its_own_process(tmp_path_factory.getbasetemp()):
            code = cli.main(["play", "--weights", weights, "--no-browser", *argv])
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("qvg: error: "), (out, err)
        return code, err

    return command


def test_a_port_in_use_is_one_line(command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, line = command("--port", port)
    assert code == 2 and port in line and "in use" in line and "0 for any" in line


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--port", "70000"], ["--port", "'70000'", "a port from 0 on, at most 65535"]),
        (["--host", "203.0.113.7", "--port", "0"], ["203.0.113.7", "address of this machine"]),
        (["--host", ""], ["--host ''", "127.0.0.1 for this machine alone"]),
        (["--codec", "zip"], ["'zip'", "accepted: qvg"]),
        (["--model", "wan"], ["'wan' is not known", "accepted: pocket-world"]),
        (["--model", "self-forcing"], ["cannot be used with `qvg play`", "accepted: pocket-world"]),
        (["--weights", "nowhere.safetensors"], ["'nowhere.safetensors'", "missing or corrupt"]),
        (["--seed", str(2**31)], [f"seed={2**31}"]),
        (["--memory", "0"], ["--memory", "'0'"]),
    ],
)
def test_bad_arguments(command, argv, parts):
    code, line = command(*argv)
    assert code == 2 and all(part in line for part in parts), line


def test_without_the_extra_it_says_what_to_install(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "qvg_jax.app.play.server", None)
    monkeypatch.delattr("qvg_jax.app.play.server", raising=False)
    code, line = command()
    assert code == 2 and "NiceGUI" in line and "qvg-jax[play]" in line
