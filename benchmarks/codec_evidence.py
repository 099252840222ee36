"""Codecs on three kinds of evidence: `python -m benchmarks.codec_evidence --data real.npz --loop`.

(a) made-up tensors with what breaks codecs (`qvg_jax.study.stress`), (b) captured K, V and Q, such as
`qvg capture` writes, and (c) pocket world in its own loop, with its weights as they are and with outlier
channels folded into them, which changes no frame of the exact run. Minutes on a CPU; the loop needs half
a minute for each recipe.

Of (a) and (b) the table has the error of attention's output, relative L2, in the median layer and the worst
one, and per query, over the head's root mean square output: mean, and what one in a thousand
exceeds. A span is all tokens of a layer, with as many of them per centroid as 256 centroids have in a span
of 29,000. Of (c): dB to the frames of the exact run; only of recipes, not of codecs written as calls.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvg_jax.codecs import presets
from qvg_jax.codecs.accounting import pair_bits
from qvg_jax.codecs.base import Codec
from qvg_jax.codecs.recipes import is_recipe, parse_recipe, written
from qvg_jax.study.capture import Captured, load_captured, rotated
from qvg_jax.study.stress import stress
from qvg_jax.study.tune import restored

RECIPES = (
    "qvg",
    "qvg-asym",
    "kivi",
    "quarot",
    "pca",
    "klt",
    "trellis",
    "midrise",
    "midrise:key_gain=0.5",
    "midrise-k1v3",
    "kmeans-e8",
    "dither",
    "dither-asym",
)
TOKENS_PER_CENTROID = 114
LONG_SPAN = (1, 12, 37_440, 128)


def fitting(recipe: str, shape: tuple[int, ...]) -> tuple[Codec, Codec]:
    """The codecs of a recipe with a group that divides the head dim, and centroids that fit the span.

    Raises:
        ValueError: what the recipe does not allow on such spans.
    """
    if not is_recipe(recipe):
        return presets.parse_pair(recipe)
    name, settings = parse_recipe(recipe)
    clusters: dict[str, Any] = dict(num_centroids=max(1, shape[2] // TOKENS_PER_CENTROID))
    if name in ("trellis", "klt"):  # a budget decides
        clusters = {}
    narrow = dict(group=shape[3]) if shape[3] < 128 and name != "qvg" else {}
    why: ValueError | None = None
    for more in (clusters | narrow, clusters, narrow, {}):
        try:
            pair = presets.parse_pair(written(name, more | settings))
            pair_bits(pair, shape)
            return pair
        except ValueError as error:
            why = why or error
    raise ValueError(f"{recipe}: {why}")


@jax.jit
def attention(q_BHQD, k_BHTD, v_BHTD):
    """softmax(q k / sqrt(D)) v; several query heads may share a head of K and V."""
    b, h, _, d = k_BHTD.shape
    q_BHQD = q_BHQD.reshape(b, h, -1, d)
    logits = jnp.einsum("bhqd,bhtd->bhqt", q_BHQD, k_BHTD) / np.sqrt(d)
    return jnp.einsum("bhqt,bhtd->bhqd", jax.nn.softmax(logits, -1), v_BHTD)


def errors(captured: Captured, recipe: str) -> dict[str, float]:
    """Bits, and the errors of K, V and attention's output that the module names."""
    layers, batch, heads, tokens, dim = captured.k_LBHTD.shape
    pair = fitting(recipe, (batch, heads, tokens, dim))
    exact = [np.asarray(x, np.float32) for x in (captured.k_LBHTD, captured.v_LBHTD)]
    k, v = (restored(c, x, tokens) for c, x in zip(pair, exact, strict=True))
    whole, each = [], []
    for layer in range(layers):
        turn = [jnp.asarray(t, jnp.float32) for t in (captured.turn_q, captured.turn_k)]
        q = rotated(jnp.asarray(captured.q_LBHQD[layer], jnp.float32), turn[0], captured.pairing)
        outs = []
        for keys, values in ((exact[0], exact[1]), (k, v)):
            keys = rotated(jnp.asarray(keys[layer], jnp.float32), turn[1], captured.pairing)
            outs.append(np.asarray(attention(q, keys, jnp.asarray(values[layer], jnp.float32))))
        out, wrong = outs[0], outs[1] - outs[0]
        whole.append(np.linalg.norm(wrong) / np.linalg.norm(out))
        size_BH1 = np.sqrt(np.mean(np.sum(out**2, -1), -1, keepdims=True))
        each.append((np.linalg.norm(wrong, axis=-1) / size_BH1).ravel())
    share = [
        float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))
        for a, b in zip((k, v), exact, strict=True)
    ]
    each = np.concatenate(each)
    return dict(
        bits=pair_bits(pair, (batch, heads, tokens, dim)),
        K=share[0],
        V=share[1],
        median=float(np.median(whole)),
        worst_layer=float(np.max(whole)),
        mean=float(each.mean()),
        worst_queries=float(np.quantile(each, 0.999)),
    )


def averaged(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every column; of the worst ones the largest."""
    worst = {k: max(r[k] for r in rows) for k in rows[0] if k.startswith("worst")}
    return {k: float(np.mean([r[k] for r in rows])) for k in rows[0]} | worst


def loops(recipes: list[str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """dB to the exact frames, with the weights as they are and with outlier channels."""
    from models.pocket_world.outliers import with_outliers
    from models.pocket_world.params import load_weights
    from models.pocket_world.trial import psnr, run

    trial = argparse.Namespace(
        worlds=args.worlds,
        seeds=1,
        tour=args.tour,
        frames=args.frames,
        half_width=300.0,
        span_blocks=8,
        steps=4,
        key=11,
    )
    plain = load_weights()
    arms = dict(plain=plain, folded=with_outliers(plain, args.factor))
    exact = {name: run(model, "bf16", trial)["frames"] for name, model in arms.items()}
    print(f"exact runs are equal: {np.array_equal(exact['plain'], exact['folded'])}", flush=True)
    found = {}
    for recipe in recipes:
        row = found[recipe] = {}
        for name, model in arms.items():
            ran = run(model, recipe, trial)
            row |= {name: float(psnr(ran["frames"], exact[name]).mean()), "bits": ran["bits"]}
        print(f"{recipe:26s} {row['plain']:6.2f} dB, folded {row['folded']:6.2f} dB", flush=True)
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for every recipe and kind of evidence."""
    lines = [
        "| recipe | bits, long span | evidence | bits | K | V | layer: median (worst) "
        "| query: mean (worst 0.1 %) | loop: plain, folded |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, kinds in found.items():
        name, loop = recipe, kinds.get("loop")
        for kind in ("stress", "data"):
            row = kinds.get(kind)
            if not isinstance(row, dict):
                lines.append(f"| {name} | | {kind} | {row or '-'} | | | | | |")
                continue
            dB = f"{loop['plain']:.1f}, {loop['folded']:.1f}" if loop else "-"
            lines.append(
                f"| {name} | {kinds['bits']:.2f} | {kind} | {row['bits']:.2f} | {row['K']:.3f} "
                f"| {row['V']:.3f} | {row['median']:.4f} ({row['worst_layer']:.4f}) "
                f"| {row['mean']:.4f} ({row['worst_queries']:.3f}) | {dB} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measures recipes from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--recipes", nargs="+", default=RECIPES, help="or codecs: 'SMOOTHING(...) > ...'")
    add("--seeds", type=int, default=3, help="made-up clips")
    add("--data", type=pathlib.Path, help="captured K, V and Q")
    add("--loop", action="store_true", help="pocket world too")
    add("--worlds", type=int, default=2)
    add("--tour", type=int, default=96, help="frames of history")
    add("--frames", type=int, default=16, help="replayed frames")
    add("--factor", type=float, default=8.0, help="of the outlier channels")
    add("--out", type=pathlib.Path, help="a JSON file with all numbers")
    args = parser.parse_args(argv)
    evidence: dict[str, list[Captured]] = {"stress": [stress(s) for s in range(args.seeds)]}
    if args.data is not None:
        evidence["data"] = [load_captured(args.data)]
    found: dict[str, dict[str, Any]] = {}
    for recipe in args.recipes:
        row = found[recipe] = {"bits": pair_bits(presets.parse_pair(recipe), LONG_SPAN)}
        for kind, tensors in evidence.items():
            try:
                row[kind] = averaged([errors(t, recipe) for t in tensors])
            except ValueError as error:
                row[kind] = f"not possible: {error}"
        print(recipe, row, flush=True)
    if args.loop:
        for recipe, row in loops([r for r in args.recipes if is_recipe(r)], args).items():
            found[recipe]["loop"] = row
    print(table(found))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
