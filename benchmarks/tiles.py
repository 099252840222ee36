"""Attention that reads a share of the history's tiles: `python -m benchmarks.tiles --data real.npz`.

What pocket world loses, on blocks that ask after a tour, at three noise levels and once as the next block of the
walk; and what a captured file loses, which does not say how its tokens lie in frames. Printed is the relative L2
error of the attention output by the share of key tiles that is read (means of squares over the captures, the worst
layer in brackets), and the softmax mass on what is read, for `qvg_jax.study.tiles.CHOICES`. Once with the history
as it is, once after a codec. Minutes on a CPU.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from models.pocket_world.capture import capture
from models.pocket_world.heads import CAPTURES
from models.pocket_world.params import DEFAULT_WEIGHTS, load_weights
from models.pocket_world.world import HEIGHT, WIDTH
from qvg_jax.study.capture import Captured, load_captured
from qvg_jax.study.tiles import CHOICES, TileGrids, TileLoss, measure_tiles

type Cases = list[tuple[Captured, TileGrids]]


def of_pocket_world(weights: pathlib.Path, frames: int, tile: tuple[int, int, int]) -> Cases:
    """Captures of all layers after tours of so many frames, with tiles of frames, rows and columns."""
    model = load_weights(weights)
    cfg = model.cfg
    side = HEIGHT // cfg.patch, WIDTH // cfg.patch
    grids = TileGrids(
        queries=(cfg.block_frames, *side), keys=(frames, *side), query_tile=tile, key_tile=tile
    )
    layers = tuple(range(cfg.layers))
    return [
        (capture(model, layers, frames, seed=seed, noise=noise, back=back), grids)
        for seed, noise, back in CAPTURES
    ]


def mean(losses: list[TileLoss]) -> dict[str, Any]:
    """One choice and share over several captures."""
    first = losses[0]
    return dict(
        choice=first.choice,
        share=first.share,
        tiles=first.tiles,
        mass=float(np.mean([x.mass for x in losses])),
        error=float(np.sqrt(np.mean([x.error**2 for x in losses]))),
        worst_layer=max(x.worst_layer for x in losses),
    )


def table(name: str, cases: Cases, recipe: str | None, span_tokens: int | None) -> list[dict]:
    """Measures all choices and shares, prints a line for each share, and returns the numbers."""
    options = dict(recipe=recipe, span_tokens=span_tokens)
    found = [measure_tiles(captured, grids, **options) for captured, grids in cases]
    rows = [mean(list(losses)) for losses in zip(*found, strict=True)]
    for share in dict.fromkeys(row["share"] for row in rows):
        chosen = [next(r for r in rows if (r["choice"], r["share"]) == (c, share)) for c in CHOICES]
        cells = [f"{r['error']:.3f} ({r['worst_layer']:.3f}), {r['mass']:.2f}" for r in chosen]
        front = f"{name} | {recipe or 'as captured'} | {share:g}, {chosen[0]['tiles']} tiles"
        print(f"| {front} | {' | '.join(cells)} |", flush=True)
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures from the command line, prints a table, and returns and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", type=pathlib.Path, default=DEFAULT_WEIGHTS)
    add("--frames", type=int, default=256, help="of the tours; 0 leaves pocket world out")
    add("--tile", nargs=3, type=int, default=(4, 2, 3), metavar=("F", "Y", "X"))
    add("--data", type=pathlib.Path, help="captured K, V and Q")
    box = dict(nargs=3, type=int, metavar=("F", "Y", "X"))
    add("--data-keys", **box, help="frames, rows and columns of its tokens; else runs of 64 tokens")
    add("--data-queries", **box, help="the same of its queries")
    add("--data-key-tile", **box, default=(4, 4, 4))
    add("--data-query-tile", **box, default=(1, 4, 4))
    add("--recipe", default="midrise-k2v4", help="codec of the history")
    add("--span-tokens", type=int, default=768)
    add("--out", type=pathlib.Path, help="a JSON file with all numbers")
    args = parser.parse_args(argv)
    kinds: dict[str, Cases] = {}
    if args.frames:
        kinds["pocket world"] = of_pocket_world(args.weights, args.frames, tuple(args.tile))
    if args.data:
        captured = load_captured(args.data)
        grids = TileGrids.runs(captured, 64, 64)
        if args.data_keys and args.data_queries:
            boxes = (args.data_queries, args.data_keys, args.data_query_tile, args.data_key_tile)
            names = ("queries", "keys", "query_tile", "key_tile")
            grids = TileGrids(**dict(zip(names, map(tuple, boxes), strict=True)))
        kinds["captured"] = [(captured, grids)]
    print(f"| tensors | history | read | {' | '.join(CHOICES)} |\n|{'---|' * (3 + len(CHOICES))}")
    found: dict[str, Any] = {}
    for name, cases in kinds.items():
        for recipe in (None, args.recipe):
            found[f"{name}, {recipe}"] = table(name, cases, recipe, args.span_tokens)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
