"""Trains pocket world: `python -m models.pocket_world.train --out DIR` (on a GPU), `--smoke` on anything.

What is minimised is in `objective.py`. The optimiser is Muon for the matrices of the layers and Adam for the rest
(optax); orbax keeps parameters, their moving average, optimiser state, step and time spent, so the same command
resumes a run that stopped.
A run is bounded by `--steps` (deterministic) or by `--minutes` (the schedule then follows the clock, for a
machine lent by the hour). `--continue-from` starts from finished weights instead of from nothing and trains
on the model's own frames in the context, which is what keeps long walks through unseen places from fading.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx

from models.pocket_world import data, objective
from models.pocket_world.config import PocketWorldConfig
from models.pocket_world.modeling import PocketWorld
from models.pocket_world.params import load_weights, save_weights
from qvg_jax.files import replacing


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        until: share of the whole run at which it ends.
        own_share: share of steps with the model's own frames in the context.
    """

    until: float
    batch: int
    shape: data.SequenceShape
    own_share: float = 0.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run but its length.

    Attributes:
        peak_lr: learning rate after warm-up; RMS of the update of every matrix is 0.2 times it.
        decay: the share of the run, at the end, over which the rate falls to zero.
        chunk: steps in one compiled scan, and the granularity of logs and of the schedule.
    """

    model: PocketWorldConfig = PocketWorldConfig()
    stages: tuple[Stage, ...] = (
        Stage(0.82, 16, data.SequenceShape()),
        Stage(1.0, 8, data.SequenceShape(distractors=36)),
    )
    peak_lr: float = 2e-3
    warmup: int = 200
    decay: float = 0.45
    ema: float = 0.999
    chunk: int = 100
    seed: int = 0

    @classmethod
    def continued(cls) -> "TrainConfig":
        """From finished weights, with the model's own frames in the context of half the steps."""
        stages = (Stage(1.0, 12, data.SequenceShape(distractors=12), own_share=0.5),)
        return cls(stages=stages, peak_lr=1e-3, decay=1.0, seed=1)

    @classmethod
    def smoke(cls) -> "TrainConfig":
        """Two short stages of a tiny model, for tests."""
        short = data.SequenceShape(near=1, distractors=1, recent=1, run=1, walk_frames=64)
        longer = dataclasses.replace(short, distractors=2)
        return cls(
            model=PocketWorldConfig.smoke(),
            stages=(Stage(0.6, 2, short), Stage(1.0, 1, longer, own_share=0.5)),
            warmup=2,
            chunk=2,
        )


def make_optimizer(cfg: TrainConfig, progress):
    """Muon on the layers' matrices, Adam elsewhere; warm-up, plateau, linear decay.

    Args:
        progress: share of the run that is over, a traced scalar in [0, 1].
    """

    def schedule(step):
        warm = jnp.minimum(1.0, (step + 1) / cfg.warmup)
        return cfg.peak_lr * warm * jnp.clip((1.0 - progress) / cfg.decay, 0.0, 1.0)

    def dimensions(params):
        """All kernels of the stacked layers [L, in, out] are L matrices to Muon."""
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: (
                matrix if path[0].key == "blocks" and path[-1].key == "kernel" else None
            ),
            params,
        )

    muon = optax.contrib.muon(
        schedule,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
        weight_decay=0.01,
        adam_learning_rate=schedule,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def init_state(cfg: TrainConfig, dtype, weights: pathlib.Path | None = None):
    """(model graph, {params, ema, opt, step, minutes}) at step 0, from `weights` where given."""
    model = PocketWorld(cfg.model, dtype=dtype, rngs=nnx.Rngs(cfg.seed))
    if weights is not None:
        model = load_weights(weights, dtype=dtype)
        if model.cfg != cfg.model:
            raise ValueError(f"weights {str(weights)!r} are of {model.cfg}, not of {cfg.model}")
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    opt = make_optimizer(cfg, 0.0).init(params)
    ema = jax.tree.map(jnp.copy, params)
    return graph, dict(params=params, ema=ema, opt=opt, step=jnp.int32(0), minutes=jnp.float32(0))


def sample_batch(key, cfg: TrainConfig, shape: data.SequenceShape, size: int):
    """`size` sequences with a leading batch axis."""
    sample = functools.partial(data.sample_sequence, cfg=cfg.model, shape=shape)
    return jax.vmap(sample)(jax.random.split(key, size))


@functools.partial(
    jax.jit, static_argnames=("cfg", "graph", "stage", "attention"), donate_argnames="state"
)
def train_chunk(cfg: TrainConfig, graph, stage: Stage, state, progress, attention=None):
    """`cfg.chunk` optimiser steps; returns the state and their mean loss."""
    optimizer = make_optimizer(cfg, progress)

    def step(state, _):
        key = jax.random.fold_in(jax.random.key(cfg.seed + 1), state["step"])
        k_data, k_noise = jax.random.split(key)
        batch = sample_batch(k_data, cfg, stage.shape, stage.batch)
        loss, grads = jax.value_and_grad(
            lambda p: objective.loss_fn(
                nnx.merge(graph, p), k_noise, batch, stage.shape, stage.own_share, attention
            )
        )(state["params"])
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        rate = jnp.minimum(cfg.ema, (state["step"] + 1) / (state["step"] + 10))
        ema = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, state["ema"], params)
        return dict(state, params=params, ema=ema, opt=opt, step=state["step"] + 1), loss

    state, losses = jax.lax.scan(step, state, None, length=cfg.chunk)
    return state, losses.mean()


@functools.partial(jax.jit, static_argnames=("cfg", "graph", "shape", "worlds", "attention"))
def one_step_psnr(cfg: TrainConfig, graph, params, shape, worlds=16, attention=None):
    """`objective.one_step_psnr` on worlds not trained on."""
    batch = sample_batch(jax.random.key(987_654), cfg, shape, worlds)
    return objective.one_step_psnr(nnx.merge(graph, params), batch, shape, attention)


def train(
    cfg: TrainConfig,
    out: pathlib.Path,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    pause_after: float | None = None,
    save_every: float = 10.0,
    weights: pathlib.Path | None = None,
    dtype=jnp.bfloat16,
    attention: str | None = None,
    log=print,
):
    """Trains (or resumes) into `out`: checkpoints/, log.jsonl. Returns (graph, state).

    A run that was killed goes on from its last checkpoint, and what its log says of later steps is cut off.

    Args:
        steps, minutes: length of the whole run, by count or by clock (exactly one of them).
        pause_after: stop with a checkpoint after this many minutes of this call.
        save_every: minutes between checkpoints.
        weights: where to start from if `out` has no checkpoint; None is random.
        dtype: compute dtype of the matrix products; parameters stay float32.
        attention: `jax.nn.dot_product_attention` implementation.
    """
    if (steps is None) == (minutes is None):
        raise ValueError(f"give exactly one of steps and minutes, not {steps=} and {minutes=}")
    out.mkdir(parents=True, exist_ok=True)
    graph, state = init_state(cfg, dtype, weights)
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(out.absolute() / "checkpoints", options=options) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        _cut_log(out / "log.jsonl", int(state["step"]))
        before, start, chunks = float(state["minutes"]), time.monotonic(), 0
        saved = start

        def progress():
            spent = before + (time.monotonic() - start) / 60
            return int(state["step"]) / steps if steps else spent / minutes

        while (now := progress()) < 1.0 and (
            pause_after is None or time.monotonic() - start < 60 * pause_after
        ):
            stage = next(s for s in cfg.stages if now < s.until)
            state, loss = train_chunk(cfg, graph, stage, state, jnp.float32(now), attention)
            spent = before + (time.monotonic() - start) / 60
            # Placed as it was, or the next chunk would be compiled anew after a checkpoint was read.
            state["minutes"], chunks = jnp.full_like(state["minutes"], spent), chunks + 1
            row = dict(
                step=int(state["step"]),
                loss=float(loss),
                minutes=round(spent, 3),
                progress=round(now, 4),
            )
            if chunks % 5 == 0:
                shape = cfg.stages[0].shape
                row["psnr_one_step"] = float(
                    one_step_psnr(cfg, graph, state["ema"], shape, attention=attention)
                )
            with (out / "log.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")
            log(row)
            if time.monotonic() - saved >= 60 * save_every:
                manager.save(row["step"], args=ocp.args.StandardSave(state))
                saved = time.monotonic()
        if manager.latest_step() != int(state["step"]):
            manager.save(int(state["step"]), args=ocp.args.StandardSave(state))
    return graph, state


def _cut_log(path: pathlib.Path, step: int) -> None:
    """Removes the rows of a log that are of later steps, and one that is torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line)
    with replacing(path) as partial:
        partial.write_text("".join(kept))


def main(argv=None):
    """Trains from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        help="checkpoints and logs; resumes what is there",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="length of the whole run in optimiser steps")
    length.add_argument("--minutes", type=float, help="length of the whole run in minutes")
    parser.add_argument(
        "--pause-after", type=float, help="stop with a checkpoint after this many minutes"
    )
    parser.add_argument(
        "--continue-from",
        type=pathlib.Path,
        metavar="WEIGHTS",
        help="start from these weights, with the model's own frames in the context",
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model on short sequences")
    parser.add_argument("--attention", choices=["xla", "cudnn"], help="attention implementation")
    parser.add_argument(
        "--export", type=pathlib.Path, help="write the averaged weights as safetensors here"
    )
    args = parser.parse_args(argv)
    cfg = TrainConfig.continued() if args.continue_from else TrainConfig()
    cfg = TrainConfig.smoke() if args.smoke else cfg
    _, state = train(
        cfg,
        args.out,
        steps=args.steps,
        minutes=args.minutes,
        pause_after=args.pause_after,
        weights=args.continue_from,
        attention=args.attention,
        log=lambda row: print(row, flush=True),
    )
    if args.export:
        save_weights(args.export, cfg.model, state["ema"])


if __name__ == "__main__":
    main()
