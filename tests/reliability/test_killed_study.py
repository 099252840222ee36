"""Tuning, capturing and training that are killed leave the older file or the new one, and go on."""

import contextlib
import json
import types

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from models.pocket_world import params
from models.pocket_world.config import PocketWorldConfig
from qvg_jax.app import tune_command
from qvg_jax.study.capture import Captured, save_captured
from qvg_jax.study.tune import Score
from tests.support import killed_training
from tests.support.faulty_disk import FaultyDisk, Killed
from tests.support.tiny_runs import CONTEXT


def tuned(folder, number):
    """`qvg tune` with results that depend on a number, without the measuring."""
    scores = [
        Score("rtn", 2.5, 0.1 * number, 0.2, 0.3),
        Score("qvg", 2 + 0.1 * number, 0.1, 0.2, 0.2),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tune_command,
            "load_captured",
            lambda _: types.SimpleNamespace(k_LBHTD=np.zeros((1,) * 5)),
        )
        patch.setattr(tune_command, "tune", lambda *_, **__: scores)
        tune_command.run_tune(
            "", folder, span_tokens=64, budget=None, recipes=["rtn", "qvg"], loop=None
        )


def weights(folder, number):
    arrays = {"w": np.full((4, 4), number)}
    params.save_weights(folder / "w.safetensors", PocketWorldConfig.smoke(), arrays)


def captured(folder, number):
    x, turn = np.full((1, 1, 1, 2, 4), number, np.float32), np.zeros((2, 1, 2, 2), np.float32)
    save_captured(folder / "captured.npz", Captured(x, x, x, turn, turn, np.arange(1)))


def contents(folder):
    """What is in the files; the header of weights is written in any order."""
    arrays = {p.name: load_file(p)["w"].tobytes() for p in folder.glob("*.safetensors")}
    files = (p for p in folder.iterdir() if p.suffix not in (".partial", ".safetensors"))
    return arrays | {p.name: p.read_bytes() for p in files}


@pytest.mark.parametrize("fault", ["kill", "power cut"])
@pytest.mark.parametrize("write", [tuned, weights, captured])
def test_a_file_is_the_older_one_or_the_new_one(write, fault, tmp_path):
    """Killed at every operation on the disk, and then run again."""
    known = []
    for number in (1, 2):
        (folder := tmp_path / str(number)).mkdir()
        write(folder, number)
        known.append(contents(folder))
    old, new = known
    assert old.keys() == new.keys() and not [name for name in old if old[name] == new[name]]
    for at in range(100):
        (folder := tmp_path / f"at {at}").mkdir()
        write(folder, 1)
        with FaultyDisk(folder, fails_at=at, fault=fault) as disk, contextlib.suppress(Killed):
            write(folder, 2)
        left = contents(folder)
        assert left.keys() == old.keys(), (at, disk.operations)
        assert not [name for name in left if left[name] not in (old[name], new[name])], at
        write(folder, 2)
        assert contents(folder) == new and len([*folder.iterdir()]) == len(new)
        if not disk.failed:
            break
    assert at >= 2 * len(new) and not disk.failed


@pytest.mark.slow
def test_killed_training_goes_on_from_a_whole_checkpoint(tmp_path, monkeypatch):
    """Killed at changes of names: while a checkpoint appears, and while the one before is removed."""
    killed_training.counting(monkeypatch)
    for at in range(0, 1000, 7):
        out = tmp_path / str(at)
        killed_training.run(out, 2)
        process = CONTEXT.Process(target=killed_training.killed_in, args=(out, 8, at))
        process.start()
        process.join(120)
        with ocp.CheckpointManager(out / "checkpoints") as manager:
            assert (step := manager.latest_step()) in (2, 4, 6, 8), at
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4, 6, 8][: len(rows)] and len(rows) >= step // 2
        state = killed_training.run(out, step)  # nothing is left to do: what was restored
        np.testing.assert_array_equal(state["params"]["w"], np.full(3, step))
        state = killed_training.run(out, 10)
        np.testing.assert_array_equal(state["params"]["w"], np.full(3, 10))
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and at > 5
