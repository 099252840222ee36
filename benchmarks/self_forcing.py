"""Self-Forcing at its true size with random weights: bf16 against compressed caches, on one GPU.

    python -m benchmarks.self_forcing --out DIR                 # 63 frames, three arms, all parts
    python -m benchmarks.self_forcing --out DIR --parts arms --frames 180 --budget 600
    python -m benchmarks.self_forcing --out DIR --parts arms --frames 0 --histories 60,150 --heads published
    python -m benchmarks.self_forcing --out DIR --model krea-realtime --parts limit \
        --limit 80e9 --limit-frames 63 --limit-arm dither --span 6

The last has local heads in the compressed arms: --heads takes a file, or makes a list up (`benchmarks.heads`).
Models of the same family come by name. Prints a table and writes DIR/self_forcing.json; DIR/log.txt says what
is going on:

- arms: a video of --frames latent frames (0 for none), block by block as the command makes it, for
  each arm with the same noise; stops after --budget seconds for each arm. Then, with a history that
  is filled in rather than generated, single blocks at each of --histories. Arms come in the order
  given: with the smallest cache first, the peak so far is the arm's own.
- forward: one pass of the transformer over a block (4,680 queries) that sees 32,760 tokens.
- limit: a whole video of --limit-frames under --limit bytes of device memory, decoded on the way, in
  a process of its own.

Most of a first run is compilation; DIR/compiled keeps it for the next one.
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
    an_arm,
    device,
    names,
    numbers,
    one_of,
    peak,
    positive,
    several_of,
    some_arms,
    spawn,
)
from benchmarks.forward_pass import forward
from benchmarks.heads import STAND_IN
from benchmarks.model_tables import self_forcing_table
from benchmarks.self_forcing_setup import Setup
from models.self_forcing.releases import RELEASES

PARTS = ("arms", "forward", "limit")
ARMS_HELP = "CODEC or CODEC@IMPLEMENTATION of attention, smallest cache first"
log = logging.getLogger("benchmark")


def main() -> int:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child:
        _child(args)
        return 0
    results: dict[str, Any] = {"command": sys.argv[1:]}
    file = args.out / "self_forcing.json"
    begin = time.perf_counter()
    together = tuple(part for part in PARTS if part in args.parts and part != "limit")
    for parts in (together, ("limit",) if "limit" in args.parts else ()):
        if not parts:
            continue
        limit = args.limit if "limit" in parts else None
        results |= spawn("benchmarks.self_forcing", args.out, parts, limit)
        results["seconds"] = round(time.perf_counter() - begin, 1)
        file.write_text(json.dumps(results, indent=1) + "\n")
    print(self_forcing_table(results, PARTS))
    print(f"{results['seconds']:.0f} s; wrote {file}")
    return 1 if any("error" in results.get(part, {}) for part in args.parts) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    family = ", ".join(RELEASES)
    add("--model", type=one_of(RELEASES), default="self-forcing", help=f"of {family}")
    add("--parts", type=several_of(PARTS), default=PARTS, help=",".join(PARTS))
    add("--arms", type=some_arms, default=("qvg@mosaic_fp8", "qvg", "bf16"), help=ARMS_HELP)
    add("--frames", type=int, default=63, help="latent frames of a whole video")
    add("--budget", type=float, default=20, help="seconds for the blocks of an arm's video")
    add("--histories", type=numbers, default=(0, 60), help="latent frames before a block")
    add(
        "--repeats",
        type=positive,
        default=2,
        help="blocks timed at each history, passes for forward",
    )
    add("--span", type=int, help="latent frames compressed together (24)")
    add(
        "--heads",
        default="all",
        help="list of heads for compressed arms: FILE, all, or " + STAND_IN,
    )
    add(
        "--head-multiple",
        type=int,
        default=1,
        help="raises heads with a history in a layer to this",
    )
    add("--limit", type=float, default=24e9, help="bytes of device memory")
    add("--limit-frames", type=int, default=180)
    add("--limit-budget", type=float, default=float("inf"), help="seconds of its blocks")
    add("--limit-arm", type=an_arm, default="qvg@mosaic_fp8")
    add("--capacity", type=int, help="frames that caches of arms are made for (as many as needed)")
    add("--height", type=int, default=480)
    add("--width", type=int, default=832)
    add("--layers", type=int, help="fewer layers than the model has")
    add("--seed", type=int, default=0)
    add("--child", type=names, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- in the process of a part ---------------------------------------------------------------


def _child(args: argparse.Namespace) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)
    decodes = "limit" in args.child or ("arms" in args.child and args.frames > 0)
    setup = Setup(args, vae=decodes, release=args.model)
    for part in args.child:
        result = {"device": device()} | ({} if setup.heads is None else {"heads": setup.heads})
        try:
            {"forward": forward, "arms": arms, "limit": limit}[part](setup, result)
        finally:  # what was measured before an error is kept
            (args.out / f"{part}.json").write_text(json.dumps(result))


def arms(setup: Setup, result: dict[str, Any]) -> None:
    """A video for each arm, then single blocks at given histories."""
    args = setup.args
    result["arms"] = {}
    if args.frames:
        result["decoder_first_calls_seconds"] = _compiled_decoder(setup)
    for arm in args.arms:
        found = result["arms"][arm] = {}
        if args.frames:
            _video(
                setup, arm, found, frames=args.frames, capacity=_capacity(setup), budget=args.budget
            )
        for history in args.histories:
            block_at(setup, arm, history, found)
        found["peak_bytes_so_far"] = peak()


def limit(setup: Setup, result: dict[str, Any]) -> None:
    """A whole long video with little memory."""
    args = setup.args
    result |= {"frames": args.limit_frames, "arm": args.limit_arm, "limit_bytes": args.limit}
    _video(setup, args.limit_arm, result, frames=args.limit_frames, budget=args.limit_budget)
    result["ok"] = result["latent_frames"] == args.limit_frames


def _compiled_decoder(setup: Setup) -> list[float]:
    """Seconds of the decoder's first two blocks, which are two programs: no arm pays for them."""
    import jax
    import jax.numpy as jnp

    from models.runs import decode as player

    _, request = setup.pipeline("bf16", 21)
    n, channels = setup.sizes.dit.frames_per_block, request.done_BFZYX.shape[2]
    shape = (1, n, channels, request.latent_height, request.latent_width)
    latents, past, times = jnp.zeros(shape, request.done_BFZYX.dtype), None, []
    for _ in range(2):
        begin = time.perf_counter()
        video, past = player.decode(setup.vae, latents, past)
        jax.block_until_ready(video)
        times.append(round(time.perf_counter() - begin, 2))
    log.info("decoder: first blocks in %s s", times)
    return times


def _video(
    setup: Setup,
    arm: str,
    found: dict[str, Any],
    *,
    frames: int,
    capacity: int | None = None,
    budget: float = float("inf"),
) -> None:
    """Blocks of a video as the command makes them; what was measured before an error is kept."""
    import jax

    from models.runs import decode as player
    from qvg_jax.cache.health import cache_bytes

    pipeline, request = setup.pipeline(arm, frames, capacity)
    size, past = [], None
    made, decoded = (
        found.setdefault("block_generate_seconds", []),
        found.setdefault("block_decode_seconds", []),
    )

    def look(done, total, state):
        size[:] = [cache_bytes(state.cache)]

    begin = time.perf_counter()
    for latents in pipeline.stream(request, progress=look):
        middle = time.perf_counter()
        video, past = player.decode(setup.vae, latents, past)
        jax.block_until_ready(video)
        end = time.perf_counter()
        made.append(round(middle - begin, 4))
        decoded.append(round(end - middle, 4))
        log.info("%s block %d: %.3f + %.3f s", arm, len(made), made[-1], decoded[-1])
        found |= {
            "latent_frames": len(made) * setup.sizes.dit.frames_per_block,
            "peak_bytes": peak(),
            "cache_bytes": {
                "in_use": size[0].in_use.total,
                "spans_in_use": size[0].in_use.spans,
                "allocated": size[0].allocated.total,
                "bf16_of_the_same_tokens": size[0].bf16,
            },
        }
        begin = time.perf_counter()
        if sum(made[1:]) + sum(decoded[1:]) > budget:
            break


def block_at(
    setup: Setup,
    arm: str,
    history: int,
    found: dict[str, Any],
) -> None:
    """Seconds of a block after so many frames that were filled in."""
    import jax
    import numpy as np

    from benchmarks.noise import filled
    from models.self_forcing.block import Known
    from models.self_forcing.pipeline import generating_step
    from qvg_jax.cache.health import cache_bytes
    from qvg_jax.loop import stream

    n = setup.sizes.dit.frames_per_block
    frames = _capacity(setup)
    pipeline, request = setup.pipeline(arm, frames)
    state = pipeline.start(request)
    state = dataclasses.replace(state, cache=filled(state.cache, history))
    shape = (1, n, request.latent_height, request.latent_width)
    step = jax.tree_util.Partial(generating_step(pipeline.sampler, shape, True), pipeline.model)
    unknown = Known(np.bool_(False), np.zeros((1, n, *request.done_BFZYX.shape[2:]), "bfloat16"))
    keys = jax.random.split(jax.random.key(1), min(1 + setup.args.repeats, (frames - history) // n))
    times = []
    blocks = stream(step, state, [(key, unknown) for key in keys])
    del state
    for _ in keys:
        begin = time.perf_counter()
        next(blocks)
        times.append(time.perf_counter() - begin)
    size = cache_bytes(blocks.state.cache)
    after = [round(t, 4) for t in times[1:]]
    found.setdefault("filled", {})[str(history)] = {
        "first_call_seconds": round(times[0], 2),
        "seconds_of_later_blocks": after,
        "cache_bytes_allocated": size.allocated.total,
        "spans": int(blocks.state.cache.num_spans),
    }
    log.info("%s after %d frames: %s", arm, history, found["filled"][str(history)])


def _capacity(setup: Setup) -> int:
    """Frames that all caches of the arms are made for: one program for all of an arm."""
    args, n = setup.args, setup.sizes.dit.frames_per_block
    return args.capacity or max(
        args.frames, max(args.histories, default=0) + n * (1 + args.repeats)
    )


if __name__ == "__main__":
    sys.exit(main())
