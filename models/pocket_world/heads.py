"""Local heads in the loop: `python -m models.pocket_world.heads --out DIR` (on two CPU cores: an hour).

Measures by how much the network's prediction changes if a head has no history, makes heads local from the
least change on, and replays places of the same tours with each table. Beside them are heads chosen by their
attention alone (`qvg_jax.study.heads`), and other ways to save bytes: a smaller codec for all heads, and a
shorter history for all. Each arm is compared with the world, and with the same codec where all heads have a
history. Arms write DIR/<number>.npz as soon as they are done, and are not run again; the table is made of
all that is there.

Replay is the hardest case for a local head, for what is shown again lies in the history and nowhere else.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Float

from models.pocket_world import trial
from models.pocket_world.capture import asked, capture
from models.pocket_world.modeling import PocketWorld
from models.pocket_world.params import DEFAULT_WEIGHTS, load_weights
from qvg_jax.app.report import aligned
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.codecs.recommended import recommended
from qvg_jax.files import replacing
from qvg_jax.reading.head_lists import rows_of
from qvg_jax.study.heads import HeadRegions, HeadScores, classes, measure_heads

# Seed, noise level and whether places of the tour come again: blocks that ask, from first to last steps.
CAPTURES = ((1, 0.95, True), (2, 0.8, True), (3, 0.5, True), (4, 0.8, False))


def measured(model, frames: int, local_blocks: int) -> HeadScores:
    """The measurements of all heads after tours of `frames` frames."""
    cfg = model.cfg
    layers = tuple(range(cfg.layers))
    regions = HeadRegions(block_tokens=cfg.block_tokens, local_blocks=local_blocks)
    found = (
        capture(model, layers, frames, seed=seed, noise=noise, back=back)
        for seed, noise, back in CAPTURES
    )
    return measure_heads(found, regions)


def drop_errors(model: PocketWorld, frames: int, local_blocks: int) -> Float[np.ndarray, "L H"]:
    """How much the prediction of the network changes if one head has no history, relative L2, for each head.

    One evaluation for each head and capture, so the layers behind the head say what they make of it.
    """
    cfg = model.cfg
    graph, params = nnx.split(model)
    regions = HeadRegions(block_tokens=cfg.block_tokens, local_blocks=local_blocks)
    tokens = frames // cfg.block_frames * cfg.block_tokens
    gone_T = jnp.asarray(regions.of_tokens(tokens, cfg.block_tokens) == 3)
    every = np.eye(cfg.layers * cfg.heads, dtype=bool).reshape(-1, cfg.layers, cfg.heads)
    rope = cfg.rope()

    @jax.jit
    def changes(params, asking, noise):
        tables = rope.table(asking.cache.dense_pos), rope.table(asking.positions)

        def predicted(local_LH):
            def attend_all(extra, q, k, v):
                layer, local_H = extra
                q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
                stored = asking.cache.dense_k, asking.cache.dense_v
                k_old, v_old = (x[layer].astype(q.dtype) for x in stored)
                keys = [rope.rotate(k_old, tables[0]), rope.rotate(k, tables[1])]
                s = jnp.einsum(
                    "bhqd,bhtd->bhqt", rope.rotate(q, tables[1]), jnp.concatenate(keys, 2)
                )
                hidden = local_H[None, :, None, None] & gone_T[None, None, None]
                p = jax.nn.softmax(jnp.where(hidden, -jnp.inf, s / cfg.head_dim**0.5), -1)
                return jnp.swapaxes(p @ jnp.concatenate([v_old, v], 2), 1, 2)

            level = jnp.full((1, cfg.block_frames), noise)
            extra = jnp.arange(cfg.layers), local_LH
            return nnx.merge(graph, params)(asking.tokens, level, asking.features, attend_all, extra)[0]  # fmt: skip

        exact = predicted(jnp.zeros(every.shape[1:], bool))
        change = lax.map(lambda t: jnp.sum((predicted(t) - exact) ** 2), jnp.asarray(every))
        return change / jnp.sum(exact**2)

    found = [
        changes(params, asked(model, frames, seed=seed, noise=noise, back=back), noise)
        for seed, noise, back in CAPTURES
    ]
    return np.sqrt(np.mean(found, 0)).reshape(cfg.layers, cfg.heads)


def tables(
    measures: dict[str, Float[np.ndarray, "L H"]], by: str, local: list[int], also: int
) -> dict[str, np.ndarray]:
    """Class tables by the names of their arms.

    Args:
        measures: of all heads, by name; those with the least become local.
        by: the measure of the curve.
        local: numbers of local heads on it.
        also: local heads by each of the other measures.
    """
    size = measures[by].size
    found = {f"local {n} by {by}": classes(measures[by], n / size) for n in local}
    others = (name for name in measures if name != by)
    return found | {
        f"local {also} by {name}": classes(measures[name], also / size) for name in others
    }


def summary(out: pathlib.Path, order: list[str]) -> str:
    """A line for each arm that is there; and heads.json with the numbers."""
    arms = {}
    for path in out.glob("*.npz"):
        arm = dict(np.load(path))
        arms[str(arm["arm"])] = arm
    rows = [("arm", "span MB", "dB to the world", "lost to all heads", "worst tour", "seconds")]
    found = {}
    for name in (n for n in order if n in arms):
        arm = arms[name]
        world = trial.psnr(arm["frames"], arm["truth"]).mean(1)
        base = arms.get(str(arm["base"]), arm)
        lost = trial.psnr(base["frames"], base["truth"]).mean(1) - world
        found[name] = dict(
            span_bytes=int(arm["span_bytes"]),
            world=float(world.mean()),
            lost=float(lost.mean()),
            lost_by_tour=lost.tolist(),
            seconds=float(arm["seconds"]),
        )
        numbers = (f"{arm['span_bytes'] / 1e6:.2f}", f"{world.mean():.2f}", f"{lost.mean():.3f}")
        rows.append((name, *numbers, f"{lost.max():.3f}", f"{arm['seconds']:.0f}"))
    with replacing(out / "heads.json") as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n")
    return aligned(rows)


def main(argv=None):
    """Runs the arms from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--weights", type=pathlib.Path, default=DEFAULT_WEIGHTS)
    parser.add_argument("--codec", default=recommended("pocket-world"))
    parser.add_argument("--smaller", default="midrise,midrise-k1v3", help="codecs of all heads")
    parser.add_argument("--local", default="1,2,4,6,9,12,18", help="numbers of local heads")
    parser.add_argument(
        "--by",
        choices=("prediction", "layer", "own", "mass"),
        default="prediction",
        help="what says which heads become local first: the change of the network's prediction, of the "
        "layer's heads or of the head's own output without the history, or the mass on it",
    )
    parser.add_argument("--also", type=int, default=6, help="local heads chosen in other ways")
    parser.add_argument("--local-blocks", type=int, default=2)
    parser.add_argument("--worlds", type=int, default=16)
    parser.add_argument("--tour", type=int, default=512)
    parser.add_argument("--frames", type=int, default=64, help="replayed frames")
    parser.add_argument("--half-width", type=float, default=300.0, help="extent of the tours")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--key", type=int, default=0)
    args = parser.parse_args(argv)
    args.seeds, args.span_blocks = 1, 8
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_weights(args.weights)
    scores = measured(model, args.tour, args.local_blocks)
    measures = dict(
        prediction=drop_errors(model, args.tour, args.local_blocks),
        layer=scores.layer_error,
        own=scores.error,
        mass=scores.shares[3],
    )
    numbers = {name: x.tolist() for name, x in measures.items()}
    (args.out / "measures.json").write_text(json.dumps(numbers, indent=1) + "\n")
    found = tables(measures, args.by, [int(n) for n in args.local.split(",")], args.also)
    arms = {name: (name, {}, name) for name in ("bf16", args.codec)}
    for name, table in found.items():
        print(f"{name}\n{chr(10).join(rows_of(table))}", flush=True)
        changes = dict(history=HeadHistory(table, args.local_blocks))
        arms[name] = (args.codec, changes, args.codec)
    # A shorter history of the bytes that a third of the heads take.
    cfg = model.cfg
    blocks = (args.tour + args.frames) // cfg.block_frames
    spans = max(1, (blocks - 3) // args.span_blocks * 2 // 3)
    arms[f"newest {spans} spans"] = (
        args.codec,
        dict(max_spans=spans, overflow="drop"),
        args.codec,
    )
    arms |= {name: (name, {}, args.codec) for name in args.smaller.split(",") if name}
    for number, (name, (recipe, changes, base)) in enumerate(arms.items()):
        path = args.out / f"{number:02d}.npz"
        if path.exists():
            continue
        arm = trial.run(model, recipe, args, **changes)
        np.savez(path, arm=name, base=base, **arm)
        print(f"{name}: {arm['seconds']:.0f} s", flush=True)
    print(summary(args.out, list(arms)))


if __name__ == "__main__":
    main()
