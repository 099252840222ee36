"""HY-WorldPlay at its true size with random weights: bf16 against compressed memory, on one GPU.

    python -m benchmarks.worldplay --out DIR --parts blocks    # 44 latent frames of context
    python -m benchmarks.worldplay --out DIR --parts limit     # 48 latent frames in 24 GB

Prints a table and writes DIR/worldplay.json; DIR/log.txt says what is going on:

- blocks: seconds of the last two blocks of a walk of --frames (the published schedule compresses
  before every second one), and of their context passes alone; memory filled with noise, all arms
  the same noise for their blocks. Arms come in the order given: with the smallest memory first, the
  peak so far is the arm's own. They are
    single  one compressed k and v a head      packed  both encodings of each compressed, as published
    cudnn   both encodings in bf16, attended by cuDNN: no library of ours, what a JAX user would run
    bf16    the same through qvg_jax.attend
- limit: a whole walk with --limit bytes of device memory, in a process of its own; with --decode
  to pictures, by Wan2.2's VAE, when the cache is gone, as the command does with --decode-last.

Weights are bfloat16 in all of it. Most of a first run is compilation; DIR/compiled keeps it.
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    a_codec,
    an_implementation,
    device,
    one_of,
    peak,
    several,
    several_of,
    spawn,
    split_arm,
)
from benchmarks.model_tables import worldplay_table

PARTS, ARMS = ("blocks", "limit"), ("single", "packed", "cudnn", "bf16")
WALK = "w-8,s-8,a-8,d-8,up-8,down-8"
log = logging.getLogger("benchmark")


def main() -> int:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child:
        _child(args)
        return 0
    results: dict[str, Any] = {"command": sys.argv[1:]}
    file = args.out / "worldplay.json"
    begin = time.perf_counter()
    for part in args.parts:
        limit = args.limit if part == "limit" else None
        results |= spawn("benchmarks.worldplay", args.out, (part,), limit)
        results["seconds"] = round(time.perf_counter() - begin, 1)
        file.write_text(json.dumps(results, indent=1) + "\n")
    print(worldplay_table(results, PARTS))
    print(f"{results['seconds']:.0f} s; wrote {file}")
    return int(any("error" in results.get(part, {"error": ""}) for part in args.parts))


def _an_arm(text: str) -> str:
    """An argument that is one of `ARMS`, or ARM@IMPLEMENTATION."""
    arm, way = split_arm(text)
    one_of(ARMS)(arm)
    if way is not None:
        an_implementation(way)
    return text


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--parts", type=several_of(PARTS), default=PARTS, help=",".join(PARTS))
    add("--arms", type=several(_an_arm), default=ARMS[:3], help=",".join(ARMS))
    add("--codec", type=a_codec, default="qvg", help="of single and packed")
    add("--frames", type=int, default=48, help="latent frames of the walk")
    add("--repeats", type=int, default=1, help="pairs of blocks that are timed")
    add("--limit", type=float, default=24e9, help="bytes of device memory")
    add("--limit-arm", type=_an_arm, default="single")
    add("--decode", action="store_true", help="decode the latents of limit, too")
    add("--height", type=int, default=704)
    add("--width", type=int, default=1280)
    add("--layers", type=int, default=30)
    add("--tiny", action="store_true", help="a network of hardly any width, to try this on a CPU")
    add("--seed", type=int, default=0)
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- in the process of a part ---------------------------------------------------------------


def _child(args: argparse.Namespace) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)
    result: dict[str, Any] = {"device": device()}
    try:
        {"blocks": blocks, "limit": limited}[args.child](Setup(args), result)
    finally:  # what was measured before an error is kept
        (args.out / f"{args.child}.json").write_text(json.dumps(result))


class Setup:
    """The network with random weights, and a walk."""

    def __init__(self, args: argparse.Namespace):
        import jax
        import jax.numpy as jnp
        import numpy as np

        from models.worldplay.cameras import CameraPath
        from models.worldplay.config import WorldPlayConfig
        from models.worldplay.params import random_dit
        from models.worldplay.request import Walk

        config = WorldPlayConfig.wan_5b()
        if args.tiny:
            sizes = dict(width=64, heads=2, ffn_width=64, latent_channels=4, out_channels=4)
            config = dataclasses.replace(config, **sizes, text_width=16, text_slots=8)
        config = dataclasses.replace(config, layers=args.layers)
        self.args, self.config = args, config
        begin = time.perf_counter()
        self.model = jax.block_until_ready(random_dit(config, args.seed))
        log.info("weights made in %.1f s", time.perf_counter() - begin)
        rng = np.random.default_rng(args.seed)
        text = rng.normal(size=(1, 7, config.text_width))
        self.request = Walk(
            text_BUE=jnp.asarray(text, config.dtype),
            path=CameraPath.from_string(WALK),
            frames=args.frames,
            latent_height=args.height // 16,
            latent_width=args.width // 16,
            noise=jax.random.key(args.seed),
        )

    def reader(self, arm: str) -> Any:
        """The network with an arm's attention."""
        from models.common.attention import with_attention

        return with_attention(self.model, split_arm(arm)[1])

    def history(self, arm: str) -> Any:
        """What an arm STORAGE or STORAGE@IMPLEMENTATION remembers."""
        from models.worldplay.history import History
        from qvg_jax.codecs import presets
        from qvg_jax.codecs.recipes import parse_recipe

        arm, _ = split_arm(arm)
        if arm in ("bf16", "cudnn"):
            return History()
        name, settings = parse_recipe(self.args.codec)
        key_codec, value_codec = presets.pair(name, **settings)
        return History(key_codec=key_codec, value_codec=value_codec, storage=arm)


def blocks(setup: Setup, result: dict[str, Any]) -> None:
    """Seconds of the last two blocks, their context passes and passes of denoising, by arm."""
    import jax
    import numpy as np

    from models.worldplay.request import block_inputs
    from qvg_jax.cache.health import cache_bytes

    args, config = setup.args, setup.config
    n, arms = config.frames_per_block, result.setdefault("arms", {})
    result["context_frames"] = [args.frames - 2 * n, args.frames - n]
    for arm in args.arms:
        found = arms[arm] = {}
        history = setup.history(arm)
        xs = list(block_inputs(config, history, setup.request))[-2:]
        given = [x._replace(is_given_F=np.ones(n, bool)) for x in xs]  # nothing to denoise
        step, state = _arm(setup, arm, history)
        model = setup.reader(arm)
        place = _counters(state)
        times: dict[str, list[float]] = {"block": [], "context": []}
        for what, inputs in (("first", xs), *[("block", xs)] * args.repeats, ("context", given)):
            state = _at(state, place)
            for x in inputs:
                begin = time.perf_counter()
                state, latents = jax.block_until_ready(step(model, state, x))
                times.setdefault(what, []).append(time.perf_counter() - begin)
        log.info("%s: %s", arm, times)
        found |= {f"{what}_seconds": [round(t, 4) for t in ts] for what, ts in times.items()}
        found["finite"] = bool(np.isfinite(np.asarray(latents, np.float32)).all())
        frame = setup.request.latent_height * setup.request.latent_width // 4  # tokens
        plain = 2 * 2 * config.layers * frame * config.heads * 2 * config.head_dim
        stored = args.frames - n
        if arm == "cudnn":
            found |= {"cache_bytes": stored * plain, "spans_bytes": 0, "spans_bf16": 0}
            found["allocated"] = sum(x.nbytes for x in state.cache)
        else:
            size, spans = cache_bytes(state.cache), int(state.cache.num_spans)
            found |= {"cache_bytes": size.in_use.total, "spans_bytes": size.in_use.spans}
            found["allocated"] = size.allocated.total
            found["spans_bf16"] = spans * state.cache.layout.span_blocks * n * plain
        found |= {"bf16_bytes": stored * plain, "peak_bytes_so_far": peak()}
        for x in jax.tree.leaves(state):
            x.delete()
        del state, step


def _arm(setup: Setup, arm: str, history: Any) -> tuple[Any, Any]:
    """A step and a state before the last two blocks: memory and latents are noise."""
    import jax
    import jax.numpy as jnp

    from benchmarks.noise import filled, noise_of
    from models.worldplay.block import generate_block
    from models.worldplay.config import SamplerConfig
    from models.worldplay.pipeline import WorldPlay

    args, config, n = setup.args, setup.config, setup.config.frames_per_block
    sampler = SamplerConfig()
    request = setup.request if arm != "cudnn" else dataclasses.replace(setup.request, frames=n)
    state = WorldPlay(setup.model, history=history).start(request)
    done = args.frames // n - 2
    parts = (setup.request.path.w2c_F44, setup.request.path.intrinsics_F33)
    parts = (*parts, setup.request.path.actions_F)
    walked = [jnp.asarray(x[None, : args.frames], jnp.float32) for x in parts]
    size = (1, args.frames, config.latent_channels, *state.latents_BFZYX.shape[3:])
    state = dataclasses.replace(
        state,
        latents_BFZYX=jax.random.normal(jax.random.key(1), size, config.dtype),
        frames=type(state.frames)(*walked),
        blocks=jnp.asarray(done, jnp.int32),
    )
    if arm == "cudnn":
        tokens = args.frames * size[3] * size[4] // 4
        form = (config.layers, 1, tokens, 2 * config.heads, config.head_dim)
        cache = tuple(noise_of(jax.ShapeDtypeStruct(form, config.dtype), i) for i in range(2))
        step = jax.jit(_opponent(config, sampler), donate_argnums=1)
        return step, dataclasses.replace(state, cache=cache)

    def ours(model, state, x):
        return generate_block(model, state, x, sampler, history)[:2]

    cache = state.cache
    spans = (done - 1) // history.span_blocks if cache.layout.max_spans else 0
    cache = filled(cache, done - 1, spans)
    return jax.jit(ours, donate_argnums=1), dataclasses.replace(state, cache=cache)


def _counters(state: Any) -> dict[str, int]:
    names = ("dense_blocks", "num_spans", "first_span", "seen_blocks")
    cache = {n: int(getattr(state.cache, n)) for n in names if hasattr(state.cache, n)}
    return cache | {"blocks": int(state.blocks)}


def _at(state: Any, counters: dict[str, int]) -> Any:
    """The state before the last two blocks again; what they wrote stays and is written again."""
    import jax.numpy as jnp

    now = {name: jnp.asarray(n, jnp.int32) for name, n in counters.items()}
    state = dataclasses.replace(state, blocks=now.pop("blocks"))
    return (
        dataclasses.replace(state, cache=dataclasses.replace(state.cache, **now)) if now else state
    )


def _opponent(config: Any, sampler: Any) -> Any:
    """The same block with a bf16 cache [L, B, T, C, D] and cuDNN: the context pass is ours too."""
    import jax
    import jax.numpy as jnp

    from models.common.attention import fused_attention
    from models.worldplay.attention import decode_all, encode_all
    from models.worldplay.block import context_pass, denoise_or_take, with_block
    from models.worldplay.encoding import here, positions
    from models.worldplay.memory import encode_kv
    from models.worldplay.prope import camera_matrices

    n, put = config.frames_per_block, jax.lax.dynamic_update_slice_in_dim

    def step(model, state, x):
        frame = x.noise_BFZYX.shape[3] * x.noise_BFZYX.shape[4] // 4
        seen = (x.context_S >= 0).sum(dtype=jnp.int32)
        context = sampler.context_timestep
        kv, at_BTP = context_pass(model, state, x.context_S, context, last_only=True)
        k_LBHTD, v_LBHTD = (jnp.swapaxes(a, 2, 3) for a in kv)
        new = (jnp.swapaxes(a, 2, 3) for a in encode_kv(config, k_LBHTD, v_LBHTD, at_BTP))
        cache = tuple(
            put(a, b, (seen - n) * frame, 2) for a, b in zip(state.cache, new, strict=True)
        )
        camera = camera_matrices(x.frames.w2c_BF44, x.frames.intrinsics_BF33, config.dtype)
        at_BTP = positions(seen + jnp.arange(n), config.grid(*x.noise_BFZYX.shape[3:]), camera)
        at = here(config, at_BTP, camera)

        def attention(q_BTHD, k_BTHD, v_BTHD, layer):
            q, *new = encode_all(q_BTHD, k_BTHD, v_BTHD, at)
            k, v = (
                put(jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), b, seen * frame, 1)
                for a, b in zip(cache, new, strict=True)
            )
            valid = jnp.full((k.shape[0],), (seen + n) * frame, jnp.int32)
            return decode_all(fused_attention(q, k, v, valid_B=valid), at)

        latents, _ = denoise_or_take(model, state.text_kv, attention, x, sampler)
        return with_block(state, cache, latents, x.frames), latents

    return step


def limited(setup: Setup, result: dict[str, Any]) -> None:
    """A whole walk, block by block."""
    import jax
    import numpy as np

    from models.runs import decode as player
    from models.worldplay.pipeline import WorldPlay
    from qvg_jax.cache.health import cache_bytes

    args, arm = setup.args, setup.args.limit_arm
    result |= {"arm": arm, "frames": args.frames, "limit_bytes": args.limit, "weights": "bfloat16"}
    pipeline, seconds, size = WorldPlay(setup.reader(arm), history=setup.history(arm)), [], []
    vae, past, decoding = _vae(setup) if args.decode else None, None, []

    def look(_done, _total, state):
        size[:] = [cache_bytes(state.cache)]

    begin, finite = time.perf_counter(), True
    blocks = []
    for latents in pipeline.stream(setup.request, progress=look):
        blocks.append(np.asarray(latents))
        finite &= bool(np.isfinite(blocks[-1].astype(np.float32)).all())
        seconds.append(round(time.perf_counter() - begin, 3))
        log.info("block %d: %.3f s", len(seconds), seconds[-1])
        begin = time.perf_counter()
    del latents
    result |= {"block_seconds": seconds, "finite": finite, "walk_peak_bytes": peak()}
    for block in blocks if vae is not None else ():
        begin = time.perf_counter()
        video, past = jax.block_until_ready(player.decode(vae, jax.numpy.asarray(block), past))
        decoding.append(round(time.perf_counter() - begin, 3))
        log.info("pictures of block %d: %.3f s", len(decoding), decoding[-1])
    result |= {"decode_seconds": decoding, "peak_bytes": peak()}
    result |= {"cache_bytes": size[0].in_use.total, "allocated": size[0].allocated.total}
    result["ok"] = len(seconds) * setup.config.frames_per_block == args.frames


def _vae(setup: Setup) -> Any:
    """Wan2.2's VAE with random weights."""
    import jax

    from models.wan_vae import WanVAEConfig
    from models.wan_vae.params import WEIGHTS

    config = WanVAEConfig.wan_2_2()
    if setup.args.tiny:
        z = setup.config.latent_channels
        sizes = dict(width=4, decoder_width=4, multipliers=(1, 1, 1, 1), res_blocks=1)
        sizes |= dict(latent_channels=z, mean=config.mean[:z], std=config.std[:z])
        config = dataclasses.replace(config, **sizes)
    return jax.block_until_ready(WEIGHTS.random(config))


if __name__ == "__main__":
    sys.exit(main())
