"""A run of two processes with two devices each, and processes that do not fit together."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from models.runs import devices
from models.runs.devices import join_processes
from models.self_forcing.entry import Options
from qvg_jax.app.lost_devices import told_of_lost_devices
from qvg_jax.errors import LostDeviceError, UserError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "two_processes.py"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def outputs(*versions, dying=()):
    """What each process printed, and its exit status."""
    port, count = free_port(), len(versions)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(port), str(count), str(i), version, *dying],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i, version in enumerate(versions)
    ]  # fmt: skip
    try:
        return [(*process.communicate(timeout=300), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_two_processes_make_what_one_makes():
    (one,), two = outputs("1"), outputs("1", "1")
    for out, err, status in (one, *two):
        assert status == 0, err
        assert out.splitlines()[-1].startswith("spans 3 out ")  # after what collectives say
    lines = [out.splitlines()[-1] for out, _, _ in (one, *two)]
    numbers = [np.array(line.split()[3:], float) for line in lines]
    np.testing.assert_array_equal(numbers[1], numbers[2])
    np.testing.assert_allclose(numbers[1], numbers[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_process_whose_peer_is_lost_ends_and_says_how_to_go_on():
    begin = time.monotonic()
    (_, err, status), (_, _, lost) = outputs("1", "1", dying=["1"])
    assert lost == 9 and status == 2, err
    assert "a device or a process of the run was lost (" in err and "--resume goes on" in err
    assert time.monotonic() - begin < 90  # and does not wait for it


def test_only_the_loss_of_a_device_is_told_as_one():
    gone = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer"
    several = Options(devices=2, out="there")
    for message, options, kind in (
        (gone, several, LostDeviceError),
        (gone, Options(), jax.errors.JaxRuntimeError),
        ("INTERNAL: a bug", several, jax.errors.JaxRuntimeError),
        ("RESOURCE_EXHAUSTED: NCCL", several, jax.errors.JaxRuntimeError),
    ):
        with pytest.raises(kind, match=message.partition(":")[2]), told_of_lost_devices(options):
            raise jax.errors.JaxRuntimeError(message)


def test_processes_that_are_asked_for_different_things_say_so(monkeypatch):
    from jax.experimental import multihost_utils

    others = [Options(process=0, out="a", frames=9), Options(process=1, out="b", frames=9)]
    told = []
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: told.append(x) or x)
    for options in (*others, Options(process=1, frames=12)):
        devices._check_options(options)
    same, again, other = told
    np.testing.assert_array_equal(same, again)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.stack([same, other]))
    with pytest.raises(
        UserError, match="options of process 1 differ .* the same command everywhere"
    ):
        devices._check_options(others[1])


@pytest.mark.slow
def test_processes_of_unequal_versions_end_and_say_so():
    for _, err, status in outputs("1", "2"):
        assert status != 0
        assert "UserError: versions of process 1 differ from those of process 0" in err


def test_numbers_of_processes_that_make_no_sense_are_refused():
    for wrong, message in (
        (dict(processes=2), "--processes and --process need --coordinator"),
        (dict(coordinator="here:1"), "give the number of processes"),
        (dict(coordinator="here:1", processes=2, process=2), "--processes 2 and --process 2"),
    ):
        with pytest.raises(UserError, match=message):
            join_processes(Options(**wrong))
