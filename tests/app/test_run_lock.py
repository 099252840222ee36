"""Two processes never write into one folder."""

import os
import signal
import subprocess
import sys

import pytest

from qvg_jax.app.run_lock import alone_in, check_alone_in
from qvg_jax.errors import UserError

HOLD = """
import sys
from qvg_jax.app.run_lock import alone_in
with alone_in(sys.argv[1]):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the folder."""
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_another_process_is_named(tmp_path, other):
    for taken in (alone_in(tmp_path).__enter__, lambda: check_alone_in(tmp_path)):
        with pytest.raises(UserError, match=f"process {other.pid} is writing there; accepted: ano"):
            taken()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_died_has_nothing(tmp_path, other, how):
    os.kill(other.pid, how)
    other.wait()
    with alone_in(tmp_path), alone_in(tmp_path):  # the same process may take it twice
        check_alone_in(tmp_path)


def test_a_check_makes_no_file(tmp_path):
    check_alone_in(tmp_path)
    check_alone_in(tmp_path / "none")
    assert not list(tmp_path.iterdir())
