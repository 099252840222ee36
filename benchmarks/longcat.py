"""LongCat-Video at its true size with random weights: a compressed condition cache against bf16.

    python -m benchmarks.longcat --out DIR                          # all 48 layers, one 80 GB GPU
    python -m benchmarks.longcat --out DIR --devices 2              # heads over two GPUs
    python -m benchmarks.longcat --out DIR --limit 40e9 --opponents ""   # whole model in 40 GB

One segment of 480 x 832: 73 given frames (29,640 tokens) and 20 new ones (7,800), both branches of
guidance. Each arm builds its cache from the same given latents and makes the same denoising
evaluation of the same noise. Prints a table and writes DIR/longcat.json; DIR/log.txt says what is
going on.

Arms are codecs, read by `attend` in each of --implementation. Opponents are what a user of JAX
would write for bf16: K rotated once, `jax.nn.dot_product_attention` on cuDNN, either over the cache
with the new tokens behind it (concat), or over both apart, joined by their log-sum-exp (merge). All
run in one process, arms before opponents: the peak so far is then an arm's own.

Most of a first run is compilation; DIR/compiled keeps it for the next one.
"""

import argparse
import dataclasses
import functools
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    a_codec,
    an_implementation,
    device,
    names,
    peak,
    seconds,
    several,
    several_of,
    spawn,
)
from benchmarks.model_tables import longcat_table

OPPONENTS = ("concat", "merge")
log = logging.getLogger("benchmark")


def main() -> int:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child:
        _child(args)
        return 0
    begin = time.perf_counter()
    results = {"command": sys.argv[1:]} | spawn(
        "benchmarks.longcat", args.out, ("segment",), args.limit
    )
    results["seconds"] = round(time.perf_counter() - begin, 1)
    file = args.out / "longcat.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(longcat_table(results["segment"], OPPONENTS))
    print(f"{results['seconds']:.0f} s; wrote {file}")
    return 1 if "error" in results["segment"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--arms", type=several(a_codec), default=("midrise",), help="codecs, smallest cache first")
    add(
        "--implementation",
        type=several(an_implementation),
        default=("",),
        help="of attend: xla,mosaic,mosaic_fp8,triton",
    )
    add("--opponents", type=lambda t: several_of(OPPONENTS)(t) if t else (), default=OPPONENTS)
    add("--layers", type=int, help="(all 48)")
    add("--devices", type=int, default=1, help="GPUs to spread the heads over")
    add("--repeats", type=int, default=3, help="denoising evaluations that are timed")
    add("--limit", type=float, help="bytes of device memory that may be taken")
    add("--cond-frames", type=int, default=73, help="given video frames")
    add("--height", type=int, default=480)
    add("--width", type=int, default=832)
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help="hardly any width: to test this script")
    add("--child", type=names, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- in a process of its own ----------------------------------------------------------------


def _child(args: argparse.Namespace) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)
    result: dict[str, Any] = {"device": device() | {"count": args.devices}}
    try:
        segment(Setup(args), result)
    finally:  # what was measured before an error is kept
        (args.out / "segment.json").write_text(json.dumps(result))


class Setup:
    """The transformer with random weights, a prompt, given latents and noise."""

    def __init__(self, args: argparse.Namespace):
        import jax
        import numpy as np

        from models.longcat.config import LongCatConfig
        from models.longcat.params import random_dit
        from models.longcat.pipeline import LongCat, Prompt
        from models.longcat.schedule import standard
        from models.longcat.segments import Segments, segment_noise
        from models.longcat.sharding import heads_mesh, placement
        from models.runs.prompts import stand_in_embedding

        config = LongCatConfig.longcat_video()
        if args.tiny:
            sizes = dict(layers=2, width=64, heads=4, time_width=8, condition_width=16)
            config = LongCatConfig(**sizes, mlp_ratio=1, text_width=8)
        layers = config.layers if args.layers is None else args.layers
        self.args, self.config = args, dataclasses.replace(config, layers=layers)
        self.mesh = heads_mesh(self.config, jax.devices()[: args.devices])
        begin = time.perf_counter()
        self.model = random_dit(self.config, args.seed, device=placement(self.mesh))
        jax.block_until_ready(self.model)
        log.info("weights made in %.1f s", time.perf_counter() - begin)
        segments = Segments(num_cond_frames=args.cond_frames)
        shape = (1, segments.latent_frames, 16, args.height // 8, args.width // 8)
        noise = np.asarray(segment_noise(jax.random.key(args.seed), 1, shape))
        given = segments.given_latents
        self.noise, self.given = noise[:, given:], noise[:, :given]
        words = stand_in_embedding(
            "a red fox in the snow", slots=512, width=self.config.text_width, dtype="float32"
        )
        text = np.zeros((1, 512, self.config.text_width), np.float32)
        text[:, : words.mask_BU.shape[1]] = words.text_BUE
        mask = np.arange(512)[None] < words.mask_BU.shape[1]
        prompt = Prompt(text_BUE=text, mask_BU=mask, negative_BUE=-text, negative_mask_BU=mask)
        self.pipeline = LongCat(self.model, mesh=self.mesh)
        inputs = (prompt, self.given, self.noise, standard(), 4.0)
        with self.pipeline.on_devices():
            self.text_kv, self.guidance_B = self.pipeline._start(*inputs)


def segment(setup: Setup, result: dict[str, Any]) -> None:
    """A cache and a few denoising evaluations for each arm."""
    import jax
    import numpy as np

    args = setup.args
    result |= {"layers": setup.config.layers, "arms": {}}
    result["weights_bytes"] = sum(x.nbytes for x in jax.tree.leaves(setup.model))
    result["new_tokens"], result["given_tokens"] = (
        x.shape[1] * x.shape[3] * x.shape[4] // 4 for x in (setup.noise, setup.given)
    )
    outs: dict[str, np.ndarray] = {}
    with setup.pipeline.on_devices():
        for codec in args.arms:
            _codec_arm(setup, codec, result["arms"], outs)
        for name in args.opponents:
            try:
                _opponent_arm(setup, name, result["arms"], outs)
            except (NotImplementedError, ValueError) as error:
                result["arms"][name] = {"error": str(error)[:300]}
    reference = next((outs[n] for n in args.opponents if n in outs), None)
    for name, out in outs.items():
        if reference is not None:
            distance = np.linalg.norm(out - reference) / np.linalg.norm(reference)
            result["arms"][name]["relative_l2_to_opponent"] = float(distance)


def _codec_arm(setup: Setup, codec: str, arms: dict[str, Any], outs: dict[str, Any]) -> None:
    import jax
    import numpy as np

    from models.common.attention import with_attention
    from models.longcat.condition import build_condition
    from models.longcat.sampler import cached_step
    from models.runs.early_checks import codec_pair
    from qvg_jax.cache.health import cache_bytes, raise_if_bad

    key_codec, value_codec = codec_pair(codec)
    codecs = dict(key_codec=key_codec, value_codec=value_codec, key=jax.random.key(1))

    def build():
        return build_condition(setup.model, setup.given, **codecs)

    first = seconds(build)
    begin = time.perf_counter()
    cache = jax.block_until_ready(build())
    after = time.perf_counter() - begin
    raise_if_bad(cache)
    size = cache_bytes(cache)
    found = {
        "build_first_call_seconds": round(first, 2),
        "build_seconds": round(after, 3),
        "cache_bytes": size.in_use.total,
        "cache_bytes_allocated": size.allocated.total,
        "bf16_bytes": size.bf16,
        "times_smaller": round(size.bf16 / size.in_use.total, 3),
        "peak_bytes_after_build": peak(),
    }
    log.info("%s: %s", codec, found)
    for way in setup.args.implementation:
        model, name = with_attention(setup.model, way or None), f"{codec} {way}".strip()
        step = jax.jit(cached_step)
        arms[name] = dict(found)
        run = functools.partial(
            step, model, setup.text_kv, setup.guidance_B, cache, setup.noise, _levels()
        )
        outs[name] = np.asarray(_timed(run, setup.args.repeats, arms[name]), np.float32)
        log.info("%s: %s", name, arms[name])


def _opponent_arm(setup: Setup, name: str, arms: dict[str, Any], outs: dict[str, Any]) -> None:
    import jax
    import numpy as np

    build = functools.partial(_plain_build(setup), setup.model, setup.given)
    first = seconds(build)
    begin = time.perf_counter()
    kv = jax.block_until_ready(build())
    after = time.perf_counter() - begin
    arms[name] = {"build_first_call_seconds": round(first, 2), "build_seconds": round(after, 3)}
    arms[name] |= {"cache_bytes": sum(x.nbytes for x in kv)}
    arms[name] |= {"peak_bytes_after_build": peak()}
    run = functools.partial(
        _plain_step(setup, name), setup.model, setup.text_kv, setup.guidance_B, kv, setup.noise,
        _levels(),
    )  # fmt: skip
    outs[name] = np.asarray(_timed(run, setup.args.repeats, arms[name]), np.float32)
    del kv, run
    log.info("%s: %s", name, arms[name])


def _timed(run: Any, repeats: int, found: dict[str, Any]) -> Any:
    """Times evaluations; the latents that they lead to."""
    first = seconds(run)
    times = [1e3 * seconds(run) for _ in range(repeats)]
    found |= {
        "first_call_seconds": round(first, 2),
        "milliseconds": round(statistics.median(times), 1),
        "milliseconds_all": [round(t, 1) for t in times],
        "peak_bytes_so_far": peak(),
    }
    return run()[0]


def _levels() -> Any:
    import jax.numpy as jnp

    from models.longcat.sampler import StepInput

    return StepInput(*(jnp.float32(x) for x in (900.0, 0.9, 0.0)))


@functools.cache
def _plain_build(setup: Setup) -> Any:
    """build(model, given): K after RoPE and V of all layers, bf16 [L, B, T, H, D]."""
    import jax
    import jax.numpy as jnp

    from models.longcat.passes import clip_forward
    from models.longcat.rope import clip_positions, model_rope

    @jax.jit
    def build(model, given):
        rope = model_rope(setup.config)
        table = rope.table(clip_positions(setup.config, 0, given.shape))

        def keep(k_BTHD, v_BTHD, layer):
            k_BHTD = rope.rotate(jnp.swapaxes(k_BTHD, 1, 2), table)
            return jnp.swapaxes(k_BHTD, 1, 2), v_BTHD

        return clip_forward(model, given, jnp.zeros((1, 1)), None, keep=keep).kept

    return build


def _plain_step(setup: Setup, name: str) -> Any:
    """One evaluation with both branches, guidance and the Euler step, as `cached_step`."""
    import jax
    import jax.numpy as jnp

    from models.common.attention import cudnn_works
    from models.longcat.rope import clip_positions, model_rope
    from models.longcat.sampler import euler_step, guide
    from models.longcat.sharding import by_heads

    fast = cudnn_works(jnp.dtype(setup.config.dtype).name, setup.config.head_dim)
    average = functools.partial(
        jax.nn.dot_product_attention, implementation="cudnn" if fast else "xla"
    )

    def concat(q, k, v, k_old, v_old):
        def more(old, new):
            return jnp.concatenate([jnp.broadcast_to(old, (len(new), *old.shape[1:])), new], 1)

        return average(q, more(k_old, k), more(v_old, v))

    def merge(q, k, v, k_old, v_old):
        # Both branches ask the same cache: more queries of one video.
        B, T, H, D = q.shape
        old, old_lse = average(q.reshape(1, B * T, H, D), k_old, v_old, return_residual=True)
        new, new_lse = average(q, k, v, return_residual=True)
        old, old_lse = old.reshape(q.shape), old_lse.reshape(new_lse.shape)
        share = jax.nn.sigmoid(old_lse - new_lse)[..., None]
        return (share * old.astype(jnp.float32) + (1 - share) * new.astype(jnp.float32)).astype(
            q.dtype
        )

    @jax.jit
    def step(model, text_kv, guidance_B, kv, x, level):
        rope = model_rope(setup.config)
        first = setup.given.shape[1]
        table = rope.table(clip_positions(setup.config, first, x.shape))

        def rotated(x_BTHD):
            both = jax.tree.map(lambda t: jnp.concatenate([t] * x_BTHD.shape[0]), table)
            return jnp.swapaxes(rope.rotate(jnp.swapaxes(x_BTHD, 1, 2), both), 1, 2)

        def attention(q, k, v, layer):
            k_old, v_old = (jax.lax.dynamic_index_in_dim(a, layer, 0, False) for a in kv)
            way = dict(concat=concat, merge=merge)[name]
            return by_heads(way, rotated(q), rotated(k), v, k_old, v_old)

        doubled = jnp.concatenate([x, x])
        out = model(doubled, level.timestep[None, None], text_kv, attention).out_BFZYX
        out, _ = guide(out[:1], out[1:], guidance_B)
        return euler_step(x, out, level.sigma, level.next_sigma), None

    return step


if __name__ == "__main__":
    sys.exit(main())
