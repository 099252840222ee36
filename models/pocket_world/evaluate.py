"""Tour, then replay: `python -m models.pocket_world.evaluate --out DIR` (on a GPU; minutes).

Real frames of a tour fill the cache, then the model renders its oldest places again, so every generated
frame has a ground truth however long the history. Beside it, free running through places never
seen, where the frames' mean, standard deviation and seams are compared with those of the world.

Each arm writes DIR/<arm>.npz as soon as it is done; the table is made of all that is there, so arms can run as
separate processes. Arms: any codec preset; `window`, a bf16 sliding window that holds as many bytes as the
whole compressed cache of the `qvg` arm has allocated; `free:<codec>`, the free run.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from models.pocket_world import camera, pipeline
from models.pocket_world.modeling import PocketWorld
from models.pocket_world.params import DEFAULT_WEIGHTS, load_weights
from models.pocket_world.pipeline import WorldState
from models.pocket_world.sampling import FREE_SHARPNESS, Sampler
from qvg_jax.app.metrics import to_uint8
from qvg_jax.cache.health import cache_bytes
from qvg_jax.loop import rollout

FIRST_WORLD = 5_000_000  # training draws seeds at random; these are only ever evaluated on


def tours(key, worlds: int, frames: int, half_width: float):
    """Random walks [W, F, 3] from (0, 0, 0)."""
    return jax.vmap(lambda k: camera.wander(k, jnp.zeros(3), frames, half_width))(
        jax.random.split(key, worlds)
    )


def psnr(a, b):
    """dB per frame of [W, F, ...] frames in [-1, 1]."""
    mse = np.mean((np.asarray(a, np.float32) - np.asarray(b, np.float32)) ** 2, axis=(2, 3, 4)) / 4
    return -10 * np.log10(np.maximum(mse, 1e-10))


def seams(frames, patch: int) -> float:
    """How visible the borders of patches are: the mean step between pixels across them, over that inside.

    Near 1 for frames that were not made in patches.
    """
    steps = {True: [], False: []}
    for axis in (-3, -2):
        step = np.moveaxis(np.abs(np.diff(np.asarray(frames, np.float32), axis=axis)), axis, 0)
        border = np.arange(len(step)) % patch == patch - 1
        steps[True].append(step[border].mean())
        steps[False].append(step[~border].mean())
    return float(np.mean(steps[True]) / np.mean(steps[False]))


def window_frames(model: PocketWorld, codec, frames: int) -> int:
    """Frames of bf16 history that fit the bytes allocated for `frames` frames with `codec`."""
    full = cache_bytes(pipeline.make_cache(model.cfg, codec, frames)).allocated.total
    one = cache_bytes(pipeline.make_window(model.cfg, model.cfg.block_frames)).allocated.total
    return max(1, full // one) * model.cfg.block_frames


def run_arm(
    model, cache, xs, seed, sampler, precision: str | None = None
) -> tuple[np.ndarray, float, object]:
    """All frames [W, F, 64, 96, 3] of one arm, seconds, and the last state."""
    state = WorldState(cache, jax.random.key(seed))
    step = pipeline.make_step(model, sampler, precision=precision)
    start = time.monotonic()
    state, frames = rollout(step, state, xs)
    seconds = time.monotonic() - start
    blocks, worlds, n = frames.shape[:3]
    return np.moveaxis(frames, 0, 1).reshape(worlds, blocks * n, *frames.shape[3:]), seconds, state


def replay(model, arm: str, args) -> dict:
    """Replays the oldest `args.frames` frames of the tours."""
    total = args.tour + args.frames
    walk = tours(jax.random.key(args.seed), args.worlds, args.tour, args.half_width)
    path = jnp.concatenate([walk, walk[:, : args.frames]], 1)
    worlds = FIRST_WORLD + jnp.arange(args.worlds)
    if arm == "window":
        frames = window_frames(model, pipeline.world_codec("qvg"), total)
        cache = pipeline.make_window(model.cfg, frames, batch=args.worlds)
    else:
        cache = pipeline.make_cache(model.cfg, pipeline.world_codec(arm), total, batch=args.worlds)
    xs = pipeline.block_inputs(model.cfg, worlds, path, args.tour)
    sampler = Sampler(args.steps, args.shift, overlap=args.overlap)
    frames, seconds, state = run_arm(model, cache, xs, args.seed, sampler, args.precision)
    truth = pipeline.render_path(worlds, path[:, args.tour :], first_time=args.tour)
    out, size = frames[:, args.tour :], cache_bytes(state.cache)
    return dict(
        frames=to_uint8(out),
        truth=to_uint8(truth),
        psnr=psnr(out, truth),
        seconds=seconds,
        allocated=size.allocated.total,
        in_use=size.in_use.total,
        bf16=size.bf16,
    )


def free_run(model, codec: str, args) -> dict:
    """Walks `args.free` frames through a wide world after a short tour; mean and deviation per frame."""
    total = args.free_tour + args.free
    path = tours(jax.random.key(args.seed + 1), args.worlds, total, args.free_half_width)
    worlds = FIRST_WORLD + 1000 + jnp.arange(args.worlds)
    cache = pipeline.make_cache(model.cfg, pipeline.world_codec(codec), total, batch=args.worlds)
    xs = pipeline.block_inputs(model.cfg, worlds, path, args.free_tour)
    sampler = Sampler(
        args.free_steps, args.shift, sharpness=args.free_sharpness, overlap=args.overlap
    )
    frames, seconds, state = run_arm(model, cache, xs, args.seed, sampler, args.precision)
    out, size = frames[:, args.free_tour :], cache_bytes(state.cache)
    truth = np.asarray(
        pipeline.render_path(worlds, path[:, args.free_tour :], first_time=args.free_tour)
    )
    axes = (2, 3, 4)
    keep = slice(None, None, max(1, args.free // 64))
    return dict(
        frames=to_uint8(out[:4, keep]),
        truth=to_uint8(truth[:4, keep]),
        mean=out.mean(axes),
        std=out.std(axes),
        truth_mean=truth.mean(axes),
        truth_std=truth.std(axes),
        seams=seams(out, model.cfg.patch),
        truth_seams=seams(truth, model.cfg.patch),
        seconds=seconds,
        allocated=size.allocated.total,
        in_use=size.in_use.total,
        bf16=size.bf16,
    )


def summary(out: pathlib.Path) -> str:
    """A table of all arms found in `out`, and summary.json."""
    arms = {p.stem: dict(np.load(p)) for p in sorted(out.glob("*.npz"))}
    rows, lines = {}, []
    exact = arms.get("bf16", {}).get("frames")
    for name, a in arms.items():
        row = {k: float(a[k]) for k in ("seconds", "allocated", "in_use", "bf16")}
        if "psnr" in a:
            row |= dict(
                psnr=a["psnr"].mean(),
                worst_world=a["psnr"].mean(1).min(),
                best_world=a["psnr"].mean(1).max(),
            )
            if exact is not None and name != "bf16":
                row["psnr_to_bf16"] = psnr(a["frames"] / 127.5, exact / 127.5).mean()
            lines.append(
                f"{name:12s} replay {row['psnr']:6.2f} dB to truth"
                f" ({row['worst_world']:.1f} to {row['best_world']:.1f} by world)"
                f"  {row.get('psnr_to_bf16', float('nan')):6.2f} dB to bf16"
                f"  cache {row['in_use'] / 1e6:7.1f} MB (bf16 {row['bf16'] / 1e6:.1f})"
            )
        else:
            for key in ("mean", "std"):
                ours, truth = a[key], a[f"truth_{key}"]
                parts = np.array_split(np.arange(ours.shape[1]), 5)
                row[key] = [float(ours[:, i].mean()) for i in parts]
                row[f"truth_{key}"] = [float(truth[:, i].mean()) for i in parts]
                # Range over worlds and windows of 100 frames that the world itself shows.
                row[f"truth_{key}_range"] = _window_range(truth)
                row[f"{key}_range"] = _window_range(ours)
            row |= {key: float(a[key]) for key in ("seams", "truth_seams") if key in a}
            lines.append(
                f"{name}: "
                + json.dumps(
                    {
                        k: np.round(v, 3).tolist()
                        for k, v in row.items()
                        if "mean" in k or "std" in k or "seams" in k
                    }
                )
            )
        rows[name] = {k: v if isinstance(v, list) else float(v) for k, v in row.items()}
    (out / "summary.json").write_text(json.dumps(rows, indent=1))
    return "\n".join(lines)


def _window_range(x, width: int = 100):
    width = min(width, x.shape[1])
    means = np.stack([x[:, i : i + width].mean(1) for i in range(0, x.shape[1] - width + 1, width)])
    return [float(means.min()), float(means.max())]


def main(argv=None):
    """Runs the evaluation from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--weights", type=pathlib.Path, default=DEFAULT_WEIGHTS)
    parser.add_argument(
        "--arms", default="bf16,qvg,window,free:qvg", help="comma-separated, see above"
    )
    parser.add_argument("--worlds", type=int, default=16)
    parser.add_argument("--tour", type=int, default=512)
    parser.add_argument("--frames", type=int, default=64, help="replayed frames")
    parser.add_argument(
        "--half-width", type=float, default=400.0, help="extent of the tours, world units"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shift", type=float, default=8.0, help="spacing of the noise levels")
    parser.add_argument("--free", type=int, default=1000)
    parser.add_argument("--free-tour", type=int, default=32)
    parser.add_argument("--free-half-width", type=float, default=600.0)
    parser.add_argument("--free-steps", type=int, default=8)
    parser.add_argument("--free-sharpness", type=float, default=FREE_SHARPNESS)
    parser.add_argument("--overlap", type=float, default=0.0, help="see `Sampler`; qvg play: 0.7")
    parser.add_argument("--precision", choices=["bf16", "fp8"], help="of attention to the cache")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    on_gpu = jax.default_backend() == "gpu"
    model = load_weights(args.weights, dtype=jnp.bfloat16 if on_gpu else jnp.float32)
    for arm in filter(None, args.arms.split(",")):
        kind, _, codec = arm.rpartition(":")
        result = free_run(model, codec, args) if kind == "free" else replay(model, arm, args)
        np.savez(args.out / f"{arm.replace(':', '_')}.npz", **result)
        print(f"{arm}: {result['seconds']:.1f} s", flush=True)
    print(summary(args.out))


if __name__ == "__main__":
    main()
