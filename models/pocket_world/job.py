"""The main job on pocket world: a tour of real frames, then frames that have a ground truth.

By default the camera walks back over the tour and forward again, so every generated frame shows
a place that only the cache remembers. The truth of a frame is rendered at its own time, since
boats and beacons move on while the camera is away.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.common.checkpoint import CheckpointError
from models.pocket_world import camera, params, pipeline, trial, world
from models.pocket_world import capture as capturing
from models.pocket_world.config import PocketWorldConfig
from models.pocket_world.entry import NAME, Options
from models.pocket_world.sampling import FREE_OVERLAP, FREE_SHARPNESS, Sampler
from models.runs.request_checks import check_seed
from qvg_jax.app.job import BASELINE, Arm, Block, Job, Played
from qvg_jax.app.metrics import to_uint8
from qvg_jax.app.model_entry import CaptureOptions
from qvg_jax.app.saved_blocks import SavedBlocks
from qvg_jax.cache.health import cache_bytes
from qvg_jax.cache.layout import Layout
from qvg_jax.codecs.base import Codec
from qvg_jax.errors import UserError, told_to_user
from qvg_jax.loop import Step, stream
from qvg_jax.study.capture import Captured

FRAMES, STEPS = 240, 4
SAVED = "unfinished"  # folder in --out with the frames so far
HALF_WIDTH = 240.0  # world units; a tour within it meets some places twice
SPARE_SPANS = 16  # capacity comes in steps of so many spans: one program for many lengths


def prepare(options: Options) -> Job:
    """Loads the weights, lays out the path and makes an empty cache for each arm.

    Args:
        options: what is wanted. Without `frames`, 240 are made, or as many as `actions` say,
            rounded up to whole blocks. `tour` is rounded up to whole blocks.

    Returns:
        The job; nothing has been generated yet.

    Raises:
        UserError: a value that is not accepted, named with what would be.
    """
    check_seed(options.seed)
    actions = None if options.actions is None else camera.parse_actions(options.actions)
    with told_to_user():
        sampler = Sampler(
            steps=STEPS if options.steps is None else options.steps,
            sharpness=0.0 if actions is None else FREE_SHARPNESS,  # the default path is all replay
            overlap=0.0 if actions is None else FREE_OVERLAP,
        )
        recipes = dict.fromkeys((BASELINE, *options.codecs))
        codecs = {name: pipeline.world_recipe(name) for name in recipes}
    weights = Path(options.weights or params.DEFAULT_WEIGHTS)
    model = params.load_weights(weights)
    check_finite(model, weights)
    cfg = model.cfg

    n = cfg.block_frames
    tour = options.tour
    if tour < n:
        raise UserError(f"tour={tour} is too small: give at least one block, {n} frames")
    tour += -tour % n
    frames = options.frames
    if frames is None:
        frames = FRAMES if actions is None else len(actions) + -len(actions) % n
    if frames < 1:
        raise UserError(f"frames={frames} is not accepted: give a whole number above 0")

    path_F3 = _path(options.seed, tour, frames + -frames % n, actions)
    arms = []
    for name, codec in codecs.items():
        with told_to_user():  # a codec may refuse the span
            capacity = _capacity(cfg, codec, len(path_F3))
        cache = pipeline.make_cache(cfg, codec, capacity)
        arms.append(Arm(name=name, state=pipeline.WorldState(cache, noise_key(options.seed))))
    config = _config(options, tour, frames, sampler, cfg, weights, arms[0].state.cache.layout)
    block = (1, n, world.HEIGHT, world.WIDTH, 3)
    which = dict(resume=options.resume, restart=options.restart)
    saved = SavedBlocks(Path(options.out) / SAVED, config, block, np.float32, **which)
    step = pipeline.make_step(model, sampler)
    return Job(
        model=NAME,
        step=step,
        play=lambda arm, xs: _play(step, arm, xs, first=tour // n, saved=saved),
        arms=tuple(arms),
        blocks=_blocks(options.seed, path_F3, tour, n),
        cache=lambda state: state.cache,
        tour=tour,
        frames=frames,
        block_frames=n,
        height=world.HEIGHT,
        width=world.WIDTH,
        finished=lambda: saved.finish(keep=False),
        config=config,
    )


def _config(
    options: Options,
    tour: int,
    frames: int,
    sampler: Sampler,
    cfg: PocketWorldConfig,
    weights: Path,
    lay: Layout,
) -> dict[str, Any]:
    """All that the frames of an arm depend on beside its codec, as JSON types."""
    return {
        "tour_frames": tour,
        "frames": frames,
        "actions": options.actions,
        "seed": options.seed,
        "sampler": dataclasses.asdict(sampler),
        "model": dataclasses.asdict(cfg),
        "weights": {
            "file": weights.name,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        "cache": {
            "block_frames": cfg.block_frames,
            "block_tokens": lay.block_tokens,
            "sink_blocks": lay.sink_blocks,
            "span_blocks": lay.span_blocks,
            "span_shape_BHTD": list(lay.span_shape),
            "keep_recent_blocks": lay.keep_recent,
            "capacity_blocks": lay.capacity_blocks,
        },
    }


def _play(
    step: Step, arm: Arm, xs: Iterator[pipeline.BlockInput], *, first: int, saved: SavedBlocks
) -> Iterator[Played]:
    """Yields the frames of one arm, block by block; generated ones are on disk before they are yielded.

    Args:
        step: of the model.
        arm: its state is consumed.
        xs: the path.
        first: number of the first block that is generated.
        saved: blocks of an earlier run, which are shown to the model and not generated again.
    """
    stored = saved.read(arm.name)

    def known() -> Iterator[pipeline.BlockInput]:
        for number, x in enumerate(xs, -first):
            if 0 <= number < len(stored):
                x = dataclasses.replace(x, frames=stored[number], made=np.bool_(True))
            yield x

    blocks = stream(step, arm.state, known())
    for number, frames in enumerate(blocks, -first):
        kept = 0 <= number < len(stored)
        if number >= 0 and not kept:
            saved.add(arm.name, number, frames)
        yield Played(to_uint8(frames[0]), cache_bytes(blocks.state.cache), kept=kept)


def capture(options: CaptureOptions) -> Captured:
    """K, V and Q of the shipped model after a tour of `options.frames` frames; see `capture.capture`."""
    check_seed(options.seed)
    model = params.load_weights()
    return capturing.capture(model, options.layers, options.frames, seed=options.seed)


def loop(recipes: list[str], span_tokens: int) -> dict[str, float]:
    """dB to the bf16 run of a short replay with each recipe; see `trial.loop`."""
    return trial.loop(params.load_weights(), recipes, span_tokens)


def check_finite(model: nnx.Module, weights: Path) -> None:
    """Raises CheckpointError with the first parameter that has NaN or Inf."""
    for path, value in nnx.to_flat_state(nnx.state(model)):
        if bad := int(np.count_nonzero(~np.isfinite(np.asarray(value[...])))):
            raise CheckpointError(
                f"weights {str(weights)!r}: {'.'.join(map(str, path))} has {bad} NaN or Inf "
                "values; accepted: finite values"
            )


def _capacity(cfg, codec: tuple[Codec, Codec], frames: int) -> int:
    """At least `frames`: what a cache holds whose spans are a multiple of SPARE_SPANS."""
    lay = jax.eval_shape(lambda: pipeline.make_cache(cfg, codec, frames)).layout
    spans = lay.max_spans + -lay.max_spans % SPARE_SPANS
    blocks = lay.sink_blocks + lay.keep_recent + spans * lay.span_blocks
    return blocks * cfg.block_frames


def tour_path(seed: int, frames: int) -> Float[np.ndarray, "F 3"]:
    """Poses of the real frames that a run of this seed starts with."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return np.asarray(camera.wander(key, jnp.zeros(3), frames, HALF_WIDTH))


def noise_key(seed: int) -> Array:
    """The key of all noise in a run of this seed; a new array on every call, as states are donated."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def _path(
    seed: int, tour: int, frames: int, actions: np.ndarray | None
) -> Float[np.ndarray, "F 3"]:
    """Poses of the tour and of the frames to generate, without a cut between them."""
    tour_F3 = tour_path(seed, tour)
    if actions is None:
        # Back from the last pose to the first, forward to the last, and so on.
        last = tour - 1
        made_F3 = tour_F3[np.abs(last - (np.arange(frames) + 1) % (2 * last))]
    else:
        made_F3 = np.asarray(camera.follow(tour_F3[-1], np.resize(actions, frames)))
    return np.concatenate([tour_F3, made_F3])


def _blocks(seed: int, path_F3: np.ndarray, tour: int, n: int) -> Iterator[Block]:
    """Renders the truth block by block, so that the length costs no memory."""
    seed_B = jnp.array([seed])
    before_F3 = np.concatenate([path_F3[:1], path_F3[:-1]])
    seen_F = seen_in_tour(path_F3, tour)
    for first in range(0, len(path_F3), n):
        part = slice(first, first + n)
        truth = pipeline.render_path(seed_B, path_F3[None, part], chunk=n, first_time=first)
        x = pipeline.BlockInput(
            number=np.int32(first // n),
            pose=path_F3[None, part],
            before=before_F3[None, part],
            time=np.arange(first, first + n, dtype=np.int32),
            frames=truth,
            given=np.bool_(first < tour),
            made=np.bool_(False),
        )
        yield Block(x, to_uint8(truth[0]), seen_F[part])


def seen_in_tour(
    path_F3: Float[np.ndarray, "F 3"], tour: int, *, cell: float = 4.0
) -> Float[np.ndarray, "F"]:
    """For each frame, the share of the ground in view that frames of the tour have shown.

    Ground truth is a fair judge of a frame only where this is near 1: nobody can remember what
    was never shown. Counted on a grid of squares of `cell` world units.
    """
    scale_F = np.asarray(world.units_per_pixel(path_F3[:, 2]))
    half_F2 = np.stack([world.WIDTH / 2 * scale_F, world.HEIGHT / 2 * scale_F], 1)
    low_F2 = np.floor((path_F3[:, :2] - half_F2) / cell).astype(int)
    high_F2 = np.ceil((path_F3[:, :2] + half_F2) / cell).astype(int)
    origin = low_F2.min(0)
    shown = np.zeros(high_F2.max(0) - origin, bool)
    views = [
        np.s_[a:c, b:d] for (a, b), (c, d) in zip(low_F2 - origin, high_F2 - origin, strict=True)
    ]
    for view in views[:tour]:
        shown[view] = True
    return np.array([shown[view].mean() for view in views])
