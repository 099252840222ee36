"""Codecs in the loop: `python -m models.pocket_world.trial --out DIR --codecs bf16,qvg,...` (on a GPU; minutes).

Every codec replays the oldest places of the same tours with the same noise: `--worlds` unseen worlds, `--seeds`
tours of each, all in one batch. Each arm is compared with the world itself and with the bf16 arm, frame by
frame, and with `--against` by paired sign tests over the tours. Arms write DIR/<n>.npz and may run as
separate processes; `--table` only makes the table, trial.json and trial.png, of what is there.

A codec is NAME or NAME:SETTING=VALUE:..., as for the command; KEYS/VALUES takes one for each, and
CODEC@FACTOR@OFFSET adds the `key_bias` of that factor and offset to the logits of compressed keys.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import binomtest

from models.pocket_world import pipeline
from models.pocket_world.evaluate import FIRST_WORLD, run_arm, tours
from models.pocket_world.params import DEFAULT_WEIGHTS, load_weights
from models.pocket_world.sampling import Sampler
from qvg_jax.app.metrics import PSNR_CAP, ssim, to_uint8
from qvg_jax.cache.health import cache_bytes
from qvg_jax.cache.key_bias import KeyBias
from qvg_jax.errors import UserError
from qvg_jax.files import replacing

EARLY = 8  # frames of the early window: before the arm's own frames have become its history


def run(model, recipe: str, args, **changes) -> dict:
    """The replayed frames of one codec, uint8 [worlds * seeds, F, 64, 96, 3], and what they cost.

    Args:
        model: the network.
        recipe: the codec, see the module.
        args: sizes, see `main`.
        **changes: more settings of `make_cache`.
    """
    count, total = args.worlds * args.seeds, args.tour + args.frames
    walk = tours(jax.random.key(args.key), count, args.tour, args.half_width)
    path = jnp.concatenate([walk, walk[:, : args.frames]], 1)
    worlds = FIRST_WORLD + 5000 + jnp.tile(jnp.arange(args.worlds), args.seeds)
    codec, *bias = recipe.split("@")
    cache = pipeline.make_cache(
        model.cfg,
        pipeline.world_recipe(codec),
        total,
        batch=count,
        span_blocks=args.span_blocks,
        key_bias=KeyBias(*map(float, bias)) if bias else None,
        **changes,
    )
    xs = pipeline.block_inputs(model.cfg, worlds, path, args.tour)
    start = time.monotonic()
    frames, _, state = run_arm(model, cache, xs, args.key, Sampler(args.steps))
    seconds = time.monotonic() - start
    spans = int(state.cache.num_spans)
    truth = pipeline.render_path(worlds, path[:, args.tour :], first_time=args.tour)
    return dict(
        recipe=recipe,
        frames=to_uint8(frames[:, args.tour :]),
        truth=to_uint8(truth),
        bits=cache.layout.span_bits,
        span_tokens=cache.layout.span_tokens,
        spans=spans,
        seconds=seconds,
        span_bytes=cache_bytes(state.cache).in_use.spans,
    )


def psnr(a, b):
    """dB per frame of uint8 frames [N, F, H, W, 3]; equal frames get `PSNR_CAP`."""
    square = [
        np.mean((x.astype(np.float32) - y) ** 2, axis=(1, 2, 3)) for x, y in zip(a, b, strict=True)
    ]
    return np.minimum(PSNR_CAP, 10 * np.log10(255.0**2 / np.maximum(np.stack(square), 1e-9)))


def loop(model, recipes: list[str], span_tokens: int) -> dict[str, float]:
    """Mean dB to the bf16 run for each recipe: two short tours of one world, in seconds each.

    Raises:
        UserError: spans that are not whole blocks.
    """
    cfg = model.cfg
    span_blocks, rest = divmod(span_tokens, cfg.block_tokens)
    if rest:
        raise UserError(
            f"span_tokens={span_tokens} is not accepted: give a multiple of {cfg.block_tokens}, "
            "the tokens of a block"
        )
    tour = cfg.block_frames * (2 * span_blocks + 8)
    args = argparse.Namespace(worlds=1, seeds=2, tour=tour, frames=16, half_width=300.0)
    args.span_blocks, args.steps, args.key = span_blocks, 4, 11
    exact = run(model, "bf16", args)["frames"]
    return {r: float(psnr(run(model, r, args)["frames"], exact).mean()) for r in recipes}


def columns(arm: dict, exact: np.ndarray | None) -> dict[str, np.ndarray]:
    """What is compared, one number per tour: dB to the world, and to the bf16 arm."""
    to_world = psnr(arm["frames"], arm["truth"])
    out = dict(world=to_world.mean(1))
    if exact is not None:
        to_exact = psnr(arm["frames"], exact)
        out |= dict(early=to_exact[:, :EARLY].mean(1), bf16=to_exact.mean(1))
        strips = zip(arm["frames"][:, ::8], exact[:, ::8], strict=True)
        out["ssim"] = np.array(
            [np.mean([ssim(x, y) for x, y in zip(a, b, strict=True)]) for a, b in strips]
        )
    return out


def sign_test(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int, float]:
    """Tours where ours is better, where it is worse, and the two-sided p of a fair coin."""
    wins, losses = int((ours > theirs).sum()), int((ours < theirs).sum())
    p = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return wins, losses, p


def table(out: pathlib.Path, against: list[str]) -> str:
    """A line per arm, and `out`/trial.json with means, sign tests and the curve over blocks."""
    arms = {}
    for path in sorted(out.glob("*.npz")):
        arm = dict(np.load(path))
        arms[str(arm["recipe"])] = arm
    exact = arms["bf16"]["frames"] if "bf16" in arms else None
    found = {name: columns(arm, None if name == "bf16" else exact) for name, arm in arms.items()}
    rows, lines = {}, []
    for name, arm in sorted(arms.items(), key=lambda x: -np.mean(found[x[0]].get("bf16", np.inf))):
        scores = found[name]
        row = {k: float(v.mean()) for k, v in scores.items()}
        row |= {k: float(arm[k]) for k in ("bits", "span_tokens", "spans", "seconds")}
        line = f"{name:44s} {row['bits']:6.3f} bits  world {row['world']:6.2f} dB"
        if name != "bf16" and exact is not None:
            lost = found["bf16"]["world"] - scores["world"]
            row["lost"] = float(lost.mean())
            row["lost_error"] = float(lost.std(ddof=1) / np.sqrt(len(lost)))
            curve = psnr(arm["frames"], exact).mean(0).reshape(-1, 4).mean(1)
            row["curve"] = curve.round(3).tolist()
            line += f" (-{row['lost']:.2f} +- {row['lost_error']:.2f})  bf16 {row['bf16']:6.2f} dB"
            line += f", early {row['early']:6.2f}, SSIM {row['ssim']:.4f}"
        for other in against:
            if other in found and other != name and "bf16" in scores and "bf16" in found[other]:
                tests = {k: sign_test(scores[k], found[other][k]) for k in scores}
                row[f"against {other}"] = {k: list(v) for k, v in tests.items()}
                wins = ", ".join(f"{k} {w}:{l} p={p:.1g}" for k, (w, l, p) in tests.items())
                line += f"  | {other}: {wins}"
        rows[name] = row
        lines.append(line)
    (out / "trial.json").write_text(json.dumps(rows, indent=1))
    draw(out / "trial.png", arms, tour=0)
    return "\n".join(lines)


def draw(path: pathlib.Path, arms: dict[str, dict], tour: int, frames: int = 7) -> None:
    """A picture of tour number `tour`: the world, bf16, then the other arms, oldest frame left."""
    order = sorted(arms, key=lambda name: (name != "bf16", float(arms[name]["bits"])))
    rows = [("the world", arms[order[0]]["truth"][tour])]
    for name in order:
        label = f"{name.split(':')[0]}\n{float(arms[name]['bits']):.3g} bits"
        rows.append((label, arms[name]["frames"][tour]))
    figure = Figure((14, 1.42 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), frames)
    for line, (label, shown) in zip(grid, rows, strict=True):
        for axes, i in zip(line, np.linspace(0, len(shown) - 1, frames).astype(int), strict=True):
            axes.imshow(shown[i], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


def main(argv=None):
    """Runs a trial of recipes from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True)
    add("--weights", type=pathlib.Path, default=DEFAULT_WEIGHTS)
    add("--codecs", default="bf16,qvg", help="comma-separated")
    add("--against", default="qvg,kivi,qvg-pro", help="arms for the sign tests")
    add("--worlds", type=int, default=16)
    add("--seeds", type=int, default=3, help="tours of each world")
    add("--tour", type=int, default=512, help="frames of history")
    add("--frames", type=int, default=64, help="replayed frames")
    add("--half-width", type=float, default=400.0, help="extent of the tours, world units")
    add("--span-blocks", type=int, default=16, help="blocks of 96 tokens in a compressed span")
    add("--steps", type=int, default=4)
    add("--key", type=int, default=11)
    add("--table", action="store_true", help="no new arms, only the table")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        on_gpu = jax.default_backend() == "gpu"
        model = load_weights(args.weights, dtype=jnp.bfloat16 if on_gpu else jnp.float32)
        for recipe in args.codecs.split(","):
            result = run(model, recipe, args)
            name = recipe.replace("/", "_with_").replace(":", "+").replace("=", "_")
            np.savez(args.out / f"{name}.npz", **result)
            print(f"{recipe}: {result['seconds']:.1f} s, {result['spans']} spans", flush=True)
    print(table(args.out, args.against.split(",")))


if __name__ == "__main__":
    main()
