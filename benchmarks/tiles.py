"""Attention that reads a share of the history's tiles: `python -m benchmarks.tiles --data real.npz`.

What pocket world loses, on blocks that ask after a tour, at three noise levels and once as the next block of the
walk; and what a captured file loses, which does not say how its tokens lie in frames. Printed is the relative L2
error of the attention output by the share of key tiles that is read (means of squares over the captures, the worst
layer in brackets), and the softmax mass on what is read, for `qvg_jax.study.tiles.CHOICES`. Once with the history
as it is, once after a codec. Of pocket world also how much the prediction of the network changes where all layers
read no more than that. Minutes on a CPU.
"""

import argparse
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.pocket_world.capture import asked, capture
from models.pocket_world.heads import CAPTURES
from models.pocket_world.modeling import PocketWorld
from models.pocket_world.params import DEFAULT_WEIGHTS, load_weights
from models.pocket_world.world import HEIGHT, WIDTH
from qvg_jax.attention.tiles import tile_means, to_tiles
from qvg_jax.study.capture import Captured, load_captured
from qvg_jax.study.tiles import CHOICES, SHARES, TileGrids, TileLoss, measure_tiles

type Cases = list[tuple[Captured, TileGrids]]


def grids_of(model: PocketWorld, frames: int, tile: tuple[int, int, int]) -> TileGrids:
    """Tiles of frames, rows and columns in a block and in a history of so many frames."""
    side = HEIGHT // model.cfg.patch, WIDTH // model.cfg.patch
    block = (model.cfg.block_frames, *side)
    return TileGrids(queries=block, keys=(frames, *side), query_tile=tile, key_tile=tile)


def of_pocket_world(model: PocketWorld, frames: int, grids: TileGrids) -> Cases:
    """Captures of all layers after tours of so many frames."""
    cfg = model.cfg
    layers = tuple(range(cfg.layers))
    return [
        (capture(model, layers, frames, seed=seed, noise=noise, back=back), grids)
        for seed, noise, back in CAPTURES
    ]


def prediction_errors(model: PocketWorld, frames: int, grids: TileGrids) -> list[dict]:
    """How much the network's prediction changes if all layers read a share of the tiles, relative L2 over the captures.

    One evaluation for each share, so errors of a layer go through the layers behind it. The history is bf16.
    """
    cfg, rope = model.cfg, model.cfg.rope()
    graph, params = nnx.split(model)
    of_q, of_k = (
        _numbers(grid, tile)
        for grid, tile in ((grids.queries, grids.query_tile), (grids.keys, grids.key_tile))
    )
    N, M = of_q.max() + 1, of_k.max() + 1
    in_q, in_k = (jnp.asarray(x[:, None] == np.arange(n)) for x, n in ((of_q, N), (of_k, M)))
    counts = jnp.asarray([math.ceil(share * M) for share in SHARES])

    @functools.partial(jax.jit, static_argnames="choice")
    def changes(params, asking, noise, choice):
        tables = rope.table(asking.cache.dense_pos), rope.table(asking.positions)

        def predicted(count):
            def attend_some(layer, q, k, v):
                q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
                stored = asking.cache.dense_k, asking.cache.dense_v
                k_old, v_old = (x[layer].astype(q.dtype) for x in stored)
                q, k_old = rope.rotate(q, tables[1]), rope.rotate(k_old, tables[0])
                keys = jnp.concatenate([k_old, rope.rotate(k, tables[1])], 2)
                s = jnp.einsum("bhqd,bhtd->bhqt", q, keys) / cfg.head_dim**0.5
                if choice == "means":
                    boxes = (
                        (q, grids.queries, grids.query_tile),
                        (k_old, grids.keys, grids.key_tile),
                    )
                    q_mean, k_mean = (
                        tile_means(to_tiles(jnp.swapaxes(x, 1, 2), *box)) for x, *box in boxes
                    )
                    score = jnp.einsum("bhnd,bhmd->bhnm", q_mean, k_mean)
                else:
                    p = jax.nn.softmax(s, -1)[..., : len(of_k)]
                    score = jnp.einsum("bhqt,qn,tm->bhnm", p, in_q * 1.0, in_k * 1.0)
                read = jnp.argsort(jnp.argsort(-score, -1), -1) < count
                past = read[:, :, of_q][..., of_k]
                seen = jnp.concatenate([past, jnp.ones((*past.shape[:3], k.shape[2]), bool)], -1)
                p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), -1)
                return jnp.swapaxes(p @ jnp.concatenate([v_old, v], 2), 1, 2)

            level, layers = jnp.full((1, cfg.block_frames), noise), jnp.arange(cfg.layers)
            network = nnx.merge(graph, params)
            return network(asking.tokens, level, asking.features, attend_some, layers)[0]

        exact = predicted(M)
        return jax.lax.map(
            lambda n: jnp.sum((predicted(n) - exact) ** 2) / jnp.sum(exact**2), counts
        )

    found = []
    for choice in ("means", "exact mass"):
        each = [
            changes(
                params,
                asked(model, frames, seed=seed, noise=noise, back=back),
                noise,
                choice=choice,
            )
            for seed, noise, back in CAPTURES
        ]
        errors = np.sqrt(np.mean(each, 0))
        found += [
            dict(choice=choice, share=share, error=float(error), worst=float(np.sqrt(worst)))
            for share, error, worst in zip(SHARES, errors, np.max(each, 0), strict=True)
        ]
    return found


def _numbers(grid, tile) -> np.ndarray:
    """The number of the tile of each token."""
    at = np.indices(grid).reshape(3, -1).T // np.asarray(tile)
    return np.ravel_multi_index(at.T, np.asarray(grid) // np.asarray(tile))


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
    found: dict[str, Any] = {}
    if args.frames:
        model = load_weights(args.weights)
        grids = grids_of(model, args.frames, tuple(args.tile))
        kinds["pocket world"] = of_pocket_world(model, args.frames, grids)
        found["prediction"] = prediction_errors(model, args.frames, grids)
        print("| chosen by | read | change of the prediction | worst capture |\n|---|---|---|---|")
        for row in found["prediction"]:
            numbers = f"{row['error']:.4f} | {row['worst']:.4f}"
            print(f"| {row['choice']} | {row['share']:g} | {numbers} |", flush=True)
    if args.data:
        captured = load_captured(args.data)
        grids = TileGrids.runs(captured, 64, 64)
        if args.data_keys and args.data_queries:
            boxes = (args.data_queries, args.data_keys, args.data_query_tile, args.data_key_tile)
            names = ("queries", "keys", "query_tile", "key_tile")
            grids = TileGrids(**dict(zip(names, map(tuple, boxes), strict=True)))
        kinds["captured"] = [(captured, grids)]
    print(f"| tensors | history | read | {' | '.join(CHOICES)} |\n|{'---|' * (3 + len(CHOICES))}")
    for name, cases in kinds.items():
        for recipe in (None, args.recipe):
            found[f"{name}, {recipe}"] = table(name, cases, recipe, args.span_tokens)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
