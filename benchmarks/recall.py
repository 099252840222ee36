"""What a few recalled spans are worth: the oldest places of a long tour, read in several ways.

    uv run python -m benchmarks.recall --json recall.json        # tours of 4,000 frames in two worlds

All spans of a tour of real frames are kept packed in host memory, with the nearest few in sight. Then the
oldest frames are rendered once more from the same memory: with every span in sight, with the nearest few, the
newest few and the few whose mean keys fit the block's mean query, rotated or before RoPE, and with frame numbers
as they are or counted back from each block. The queries are those of one more pass over the block's noise, with
the spans of the block before in sight. `--filled-by everything` reads every span during the tour too, which takes
long.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.pocket_world import camera, pipeline, route
from models.pocket_world.config import ENDLESS
from models.pocket_world.evaluate import FIRST_WORLD
from models.pocket_world.modeling import PocketWorld
from models.pocket_world.params import load_weights
from models.pocket_world.pipeline import BlockInput, WorldState
from models.pocket_world.recalling import Recaller
from models.pocket_world.sampling import Sampler
from models.pocket_world.trial import psnr
from qvg_jax.app.job import Block
from qvg_jax.app.metrics import to_uint8
from qvg_jax.attention.api import attend
from qvg_jax.cache.mean_keys import MeanKeys
from qvg_jax.cache.recall import recall
from qvg_jax.loop import stream
from qvg_jax.study.capture import Recorder

FILLERS = ("everything", "nearest", "newest")
MEAN_KEYS = ("mean keys", "mean keys before RoPE")
WAYS = (*FILLERS, *MEAN_KEYS)


class Asker:
    """Queries of a block before it is made: those of one pass over its noise."""

    def __init__(self, model: PocketWorld, steps: int):
        """Prepares the pass; `steps` is that of the sampler, whose first noise level it has."""
        cfg, graph = model.cfg, nnx.graphdef(model)
        self._recorder, self._weights, rope = Recorder(), nnx.state(model), cfg.rope()
        level = Sampler(steps).levels()[0]

        @jax.jit
        def ask(weights, state, x):
            positions = self.positions(x)
            view = state.cache.view(positions, rope, relative=ENDLESS)
            features = jax.vmap(camera.frame_features, (0, 0, None))(x.pose, x.before, x.time)
            shape = (len(x.pose), cfg.block_tokens, cfg.token_channels)
            noise = jax.random.normal(jax.random.fold_in(state.key, x.number), shape)
            heard = self._recorder.listening(lambda i, q, k, v: attend(q, view, k, v, layer=i))
            levels = jnp.full((len(x.pose), cfg.block_frames), level)
            return nnx.merge(graph, weights)(noise, levels, features, heard, jnp.arange(cfg.layers))

        self._cfg, self._ask = cfg, ask

    def positions(self, x: BlockInput) -> jax.Array:
        """Positions [B, T, 4] of the block's tokens."""
        return jax.vmap(camera.token_positions, (0, None, None))(x.pose, x.time, self._cfg.patch)

    def queries(self, state: WorldState, x: BlockInput) -> np.ndarray:
        """Queries [L, B, T, H, D] of the block, before RoPE."""
        jax.block_until_ready(self._ask(self._weights, state, jax.tree.map(jnp.asarray, x)))
        found = self._recorder.queries()
        return np.stack([found[i] for i in range(self._cfg.layers)])


def by_mean_keys(
    recaller: Recaller, asker: Asker, means: MeanKeys
) -> Callable[[WorldState, BlockInput], WorldState]:
    """`before` of a stream that brings the spans into sight whose mean keys fit the block's mean query."""

    def before(state: WorldState, x: BlockInput) -> WorldState:
        nonlocal means
        store = recaller.store = recaller.store.keep(state.cache)
        means = means.keep(store)
        positions = np.asarray(asker.positions(jax.tree.map(jnp.asarray, x)))
        ids = means.nearest(asker.queries(state, x), positions, count=recaller.sight)
        cache, recaller.store = recall(state.cache, store, ids)
        return WorldState(cache, state.key)

    return before


def reader(recaller: Recaller, way: str) -> Callable[[WorldState, BlockInput], WorldState]:
    """`before` of a stream that brings the spans of a way into sight; the recaller is used up."""
    if way == "nearest":
        return recaller

    def before(state: WorldState, x: BlockInput) -> WorldState:
        store = recaller.store = recaller.store.keep(state.cache)
        ids = sorted(store.kept)
        ids = ids if way == "everything" else ids[-recaller.sight :]
        cache, recaller.store = recall(state.cache, store, ids)
        return WorldState(cache, state.key)

    return before


def copied(recaller: Recaller, state: WorldState) -> tuple[Recaller, WorldState]:
    """A recaller and a state of their own, for another way to go on."""
    again = object.__new__(Recaller)
    again.__dict__ |= recaller.__dict__
    return again, jax.tree.map(lambda x: x.copy(), state)


def tour_and_back(args: argparse.Namespace, seed: int) -> Iterator[dict]:
    """Yields a row for each way to read the oldest places of one tour."""
    model = load_weights()
    cfg, n = model.cfg, model.cfg.block_frames
    tour = args.tour + -args.tour % n
    key = jax.random.key(seed)
    walked = np.asarray(camera.wander(key, np.zeros(3, np.float32), tour, args.half_width))
    path_F3 = np.concatenate([walked, walked[: args.frames]])
    blocks = route.path_blocks(FIRST_WORLD + seed, path_F3, tour, n)
    codec = pipeline.world_recipe(args.codec)
    cache = pipeline.make_cache(cfg, codec, len(path_F3), overflow="drop")
    recaller = Recaller(cfg, cache, sight=args.sight, spans=cache.layout.max_spans)
    steps = {
        name: pipeline.make_step(model, Sampler(args.steps), relative)
        for name, relative in (("as they are", None), ("counted back", ENDLESS))
    }
    filling = stream(
        steps["counted back"],
        WorldState(cache, key),
        (next(blocks).x for _ in range(tour // n)),
        before=reader(recaller, args.filled_by),
    )
    begin = time.process_time()
    for _ in filling:
        pass
    print(
        f"world {seed}: {tour} frames in {time.process_time() - begin:.0f} processor seconds",
        flush=True,
    )
    rest: list[Block] = list(blocks)
    truth = np.concatenate([block.truth_FHW3 for block in rest])
    asker = Asker(model, args.steps)
    for way in args.ways:
        for name in args.times:
            own, state = copied(recaller, filling.state)
            if way in MEAN_KEYS:
                before = by_mean_keys(
                    own, asker, MeanKeys(cfg.rope() if way == MEAN_KEYS[0] else None)
                )
            else:
                before = reader(own, way)
            replay = stream(steps[name], state, (block.x for block in rest), before=before)
            frames, seconds, clocks = [], [], []
            for _ in rest:
                clock, processor = time.perf_counter(), time.process_time()
                frames.append(to_uint8(next(replay)[0]))
                clocks.append(time.perf_counter() - clock)
                seconds.append(time.process_time() - processor)
            cache = replay.state.cache
            yield dict(
                world=seed,
                way=way,
                times=name,
                psnr=float(psnr(np.concatenate(frames)[None], truth[None]).mean()),
                spans=int(cache.num_spans),
                kept=len(own.store.kept),
                store_bytes=own.store.nbytes,
                clock=statistics.median(clocks),
                processor=statistics.median(seconds),
            )


def line_of(row: dict) -> str:
    """A row of the table."""
    return (
        f"| {row['world']} | {row['way']} | {row['spans']} of {row['kept']} | {row['times']} | "
        f"{row['psnr']:.2f} | {row['clock']:.2f} | {row['processor']:.2f} |"
    )


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tour", type=int, default=4000, help="real frames (4000)")
    parser.add_argument("--frames", type=int, default=64, help="oldest frames to render again (64)")
    parser.add_argument("--worlds", type=int, default=2, help="worlds, and a tour of each (2)")
    parser.add_argument("--sight", type=int, default=8, help="spans in sight (8)")
    parser.add_argument("--codec", default="midrise-k2v4", help="(midrise-k2v4)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a block (4)")
    parser.add_argument("--half-width", type=float, default=400.0, help="of the tours, world units")
    parser.add_argument("--filled-by", choices=FILLERS, default="nearest", help="(nearest)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--times", nargs="+", default=("as they are", "counted back"))
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    args = parser.parse_args()
    print(
        f"{len(os.sched_getaffinity(0))} processors, load {os.getloadavg()[0]:.1f}, jax {jax.__version__}, "
        f"{args.codec}, {args.steps} steps, tour of {args.tour} frames, filled by {args.filled_by}"
    )
    print("| world | reads | spans | frame numbers | dB to the world | s a block | processor s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for seed in range(args.worlds):
        for row in tour_and_back(args, seed):
            rows.append(row)
            print(line_of(row), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
