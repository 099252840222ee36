"""Walks without an end: seconds a block and memory of a long walk through pocket world.

    uv run python -m benchmarks.endless --json walk.json      # 10,000 frames: nine minutes of a processor

The walk is that of `qvg play pocket-world --endless`: bounded memory, whose oldest span makes room, and frame
numbers that count back from each block. Actions are drawn at random and turn home at the edge of a region.
Seconds of the processor stand beside those of the clock, as a shared machine's clock says little.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from models.pocket_world.entry import WalkOptions
from models.pocket_world.walk import walk as world_of
from qvg_jax.cache.health import cache_bytes
from qvg_jax.loop import stream

REGION = 400.0  # world units; further out the walk turns home
PAGE = resource.getpagesize()


class Wanderer:
    """Actions drawn at random, each for one to five blocks, that stay within a region."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.place = (0.0, 0.0)

    def __iter__(self) -> Iterator[str]:
        while True:
            x, y = self.place
            action = str(self.rng.choice(["w", "a", "s", "d"]))
            if abs(x) > REGION:
                action = "a" if x > 0 else "d"
            elif abs(y) > REGION:
                action = "w" if y > 0 else "s"
            for _ in range(self.rng.integers(1, 6)):
                yield action


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def walk(args: argparse.Namespace) -> list[dict]:
    """A row for each thousand frames of a long walk."""
    options = WalkOptions(
        codec=args.codec,
        seed=args.seed,
        steps=args.steps,
        memory=args.memory,
        tour=64,
        endless=True,
    )
    world, wanderer = world_of(options), Wanderer(args.seed)
    n, actions = world.block_frames, iter(wanderer)
    last = [None]

    def inputs():
        for x in world.inputs(args.seed, actions):
            last[0] = x
            yield x

    blocks = stream(world.step, world.begin(args.seed, world.codec(args.codec)), inputs())
    rows, part = [], []
    for number in range(args.frames // n):
        clock, processor = time.perf_counter(), time.process_time()
        frames = next(blocks)
        part.append(
            dict(
                clock=time.perf_counter() - clock,
                processor=time.process_time() - processor,
                mean=float(frames.mean()),
                deviation=float(frames.std()),
                resident=resident(),
            )
        )
        wanderer.place = world.place(last[0])
        done = (number + 1) * n
        if done % args.rows == 0:
            rows.append(row_of(part, done, world.cache(blocks.state)))
            part = []
            print(line_of(rows[-1]), flush=True)
    return rows


def row_of(part: list[dict], done: int, cache) -> dict:
    """What the blocks up to frame `done` cost: medians of seconds, means of the rest."""
    size = cache_bytes(cache)
    middle = lambda name: statistics.median(block[name] for block in part)  # noqa: E731
    mean = lambda name: statistics.fmean(block[name] for block in part)  # noqa: E731
    return dict(
        frames=done,
        clock=middle("clock"),
        processor=middle("processor"),
        resident=mean("resident"),
        cache=size.in_use.total,
        spans=int(cache.num_spans),
        dropped=int(cache.dropped_blocks),
        mean=mean("mean"),
        deviation=mean("deviation"),
    )


def line_of(row: dict) -> str:
    """A row of the table."""
    return (
        f"| {row['frames']:,} | {row['clock']:.3f} | {row['processor']:.3f} | {row['resident'] / 1e6:.0f} | "
        f"{row['cache'] / 1e6:.1f} | {row['mean']:+.3f} | {row['deviation']:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000, help="of the walk (10000)")
    parser.add_argument(
        "--rows", type=int, default=1000, help="frames of a row of the table (1000)"
    )
    parser.add_argument("--codec", default="midrise-k2v4", help="(midrise-k2v4)")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of a block (2)")
    parser.add_argument("--memory", type=int, default=64, help="frames in sight (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    args = parser.parse_args()
    print(
        f"{len(os.sched_getaffinity(0))} processors, load {os.getloadavg()[0]:.1f}, jax {jax.__version__}, "
        f"{args.codec}, {args.steps} steps, {args.memory} frames in sight"
    )
    print("| frames | s a block | processor s | resident MB | cache MB | mean | deviation |")
    print("|---|---|---|---|---|---|---|")
    rows = walk(args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
