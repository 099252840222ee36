"""Fewer tokens and fewer iterations for k-means: `python -m benchmarks.subsample --data real.npz`.

What it costs to learn centroids from one token in n, and from a previous span's centroids in one iteration
instead of two. Three kinds of tensors: a made-up clip at the size of a large model's span
(`qvg_jax.study.stress`), captured K, V and Q, and, with `--keys-and-values`, arrays `k` and `v`, (H, T, D),
without queries. Each is cut into two spans: the first starts cold, the second warm, with as many tokens per
centroid as 256 centroids have in a span of 29,000.

Printed are the energy that k-means leaves of K and V and the error of attention to the span, relative L2, both
over those of the first row, which learns from all tokens: 5 iterations cold and 2 warm, as recipes do. Minutes on
a CPU.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.codec_evidence import TOKENS_PER_CENTROID, attention
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import Codec
from qvg_jax.study.capture import Captured, load_captured
from qvg_jax.study.stress import stress

RECIPES = ("qvg", "midrise", "dither")
SAMPLES = (1, 2, 4, 8)
ITERATIONS = ("5:2", "2:1")  # cold and warm

type Tensors = list[
    tuple[np.ndarray, np.ndarray, np.ndarray | None]
]  # K, V and rotated Q, (H, T, D)


def of_captured(captured: Captured) -> Tensors:
    """K, V and Q of every layer of the first batch row; only tensors that are not rotated."""
    if captured.turn_k.shape[-1]:
        raise ValueError("K and Q are rotated; accepted: a capture without RoPE")
    return [
        tuple(np.asarray(x[0], np.float32) for x in layer)
        for layer in zip(captured.k_LBHTD, captured.v_LBHTD, captured.q_LBHQD, strict=True)
    ]


def spans(codec: Codec, x_HTD: np.ndarray) -> list[tuple[jax.Array, float]]:
    """Each half decoded, and the share of its energy that k-means left, over the channels' own."""
    x_BHTD = jnp.asarray(x_HTD, jnp.bfloat16)[None]
    half, out = x_BHTD.shape[2] // 2, []
    state = codec.init((*x_BHTD.shape[:2], half, x_BHTD.shape[3]), x_BHTD.dtype)
    smoothing, equal = codec.spec["codec"].spec["transforms"][0], "dither" in codec.name
    for start in (0, half):
        x = x_BHTD[:, :, start : start + half]
        packed, state = _encode(codec, x, state)
        exact = x.astype(jnp.float32)
        left = exact - smoothing.decode(packed[0], jnp.zeros_like(exact))
        away = exact - exact.mean(2, keepdims=True)
        size = jnp.abs(away).mean(2, keepdims=True) if equal else 1.0
        share = jnp.sum(jnp.square(left / size)) / jnp.sum(jnp.square(away / size))
        out.append((codec.decode(packed, jnp.float32)[0], float(share)))
    return out


_encode = jax.jit(lambda codec, x, state: codec.encode(x, state), static_argnums=0)


def measured(tensors: Tensors, recipe: str, settings: dict[str, int]) -> dict[str, float]:
    """Means over the tensors: energy left of K and V, and attention's error, of a cold and a warm span."""
    rows = []
    for k, v, q in tensors:
        half = k.shape[1] // 2
        clusters = min(256, max(1, half // TOKENS_PER_CENTROID))
        pair = presets.pair(recipe, num_centroids=clusters, **settings)
        kept = [spans(c, x) for c, x in zip(pair, (k, v), strict=True)]
        row = {}
        for i, name in enumerate(("cold", "warm")):
            row |= {f"{name} {what}": kept[j][i][1] for j, what in enumerate("KV")}
            if q is not None:
                exact = [x[:, i * half : (i + 1) * half] for x in (k, v)]
                out, ours = (
                    attention(q[None], *(jnp.asarray(x)[None] for x in pair))
                    for pair in (exact, [y[i][0] for y in kept])
                )
                row[f"{name} attention"] = float(jnp.linalg.norm(ours - out) / jnp.linalg.norm(out))
        rows.append(row)
    return {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures from the command line, prints a table, and returns and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=pathlib.Path, help="captured K, V and Q")
    add("--keys-and-values", type=pathlib.Path, help="an npz file with k and v, (H, T, D)")
    add("--recipes", nargs="+", default=RECIPES)
    add("--samples", nargs="+", type=int, default=SAMPLES)
    add("--iterations", nargs="+", default=ITERATIONS, metavar="COLD:WARM")
    add("--clip", nargs=4, type=int, default=(48, 30, 40, 2), metavar=("F", "Y", "X", "H"))
    add("--out", type=pathlib.Path, help="a JSON file with all numbers")
    args = parser.parse_args(argv)
    frames, height, width, heads = args.clip
    queries = min(128, height * width)
    sizes = dict(frames=frames, height=height, width=width, heads=heads, queries=queries)
    kinds = {"made up": of_captured(stress(0, **sizes))}
    if args.data:
        kinds["captured"] = of_captured(load_captured(args.data))
    if args.keys_and_values:
        arrays = np.load(args.keys_and_values)
        kinds["pocket world"] = [(*(arrays[x].astype(np.float32) for x in "kv"), None)]
    found: dict[str, Any] = {}
    print("| recipe, tensors | iterations | n | cold: K, V, attention | warm: K, V, attention |")
    print("|---|---|---|---|---|")
    for recipe in args.recipes:
        for kind, tensors in kinds.items():
            base: dict[str, float] = {}
            for text in args.iterations:
                cold, warm = (int(n) for n in text.split(":"))
                for sample in args.samples:
                    settings = dict(cold_iters=cold, iters=warm, subsample=sample)
                    row = measured(tensors, recipe, settings)
                    base = base or row
                    found[f"{recipe}, {kind}, {cold} {warm}, {sample}"] = row
                    cells = [
                        ", ".join(
                            f"{row[c] / base[c]:.3f}" if (c := f"{name} {what}") in row else "-"
                            for what in ("K", "V", "attention")
                        )
                        for name in ("cold", "warm")
                    ]
                    line = f"{recipe}, {kind} | {cold} cold, {warm} warm | {sample} | "
                    print(f"| {line}{' | '.join(cells)} |", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
