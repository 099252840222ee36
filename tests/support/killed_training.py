"""Training that a process is killed in: the real loop and checkpoints around a step that only counts."""

import os
import signal
import sys
from pathlib import Path

import jax.numpy as jnp

from models.pocket_world import train

CHUNK = 2  # steps between checkpoints


def counting(monkeypatch) -> None:
    """Makes training count its steps in its parameters and learn nothing."""

    def init_state(cfg, dtype, weights=None):
        w = {"w": jnp.zeros((3,))}
        return None, dict(params=w, ema=w, opt=w, step=jnp.int32(0), minutes=jnp.float32(0))

    def train_chunk(cfg, graph, stage, state, progress, attention=None):
        step = state["step"] + CHUNK
        w = {"w": jnp.full((3,), step, jnp.float32)}
        return dict(state, params=w, ema=w, step=step), jnp.float32(1)

    monkeypatch.setattr(train, "init_state", init_state)
    monkeypatch.setattr(train, "train_chunk", train_chunk)
    monkeypatch.setattr(train, "one_step_psnr", lambda *_, **__: jnp.float32(1))


def run(out: Path, steps: int) -> dict:
    """The state after so many steps, with a checkpoint at every other one."""
    config = train.TrainConfig.smoke()
    return train.train(config, out, steps=steps, save_every=0.0, log=lambda _: None)[1]


class _Setting:
    """`monkeypatch` of a process that ends anyway."""

    setattr = staticmethod(setattr)


def killed_in(out: Path, steps: int, number: int) -> None:
    """Trains, and ends the process without a word at its n-th change of a name below `out`."""
    seen = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal seen
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree") and str(
            args[0]
        ).startswith(str(out)):
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    counting(_Setting)
    sys.addaudithook(watch)
    run(out, steps)
