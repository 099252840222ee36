"""The main job on pocket world: a tour of real frames, then frames that have a ground truth.

By default the camera walks back over the tour and forward again, so every generated frame shows
a place that only the cache remembers. The truth of a frame is rendered at its own time, since
boats and beacons move on while the camera is away.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from models.common.checkpoint import CheckpointError
from models.pocket_world import camera, params, pipeline, trial, world
from models.pocket_world import capture as capturing
from models.pocket_world.config import ENDLESS, PocketWorldConfig
from models.pocket_world.early_checks import check_endless
from models.pocket_world.entry import NAME, Options
from models.pocket_world.recalling import Recaller
from models.pocket_world.route import path_blocks, path_of
from models.pocket_world.sampling import FREE_OVERLAP, FREE_SHARPNESS, Sampler
from models.runs.head_lists import history_of
from models.runs.request_checks import check_seed
from qvg_jax.app.job import BASELINE, Arm, Job, Played
from qvg_jax.app.metrics import to_uint8
from qvg_jax.app.model_entry import CaptureOptions
from qvg_jax.app.saved_blocks import SavedBlocks
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.cache.health import cache_bytes
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.state import KVCache
from qvg_jax.codecs.base import Codec
from qvg_jax.errors import UserError, told_to_user
from qvg_jax.loop import Step, stream
from qvg_jax.study.capture import Captured

FRAMES, STEPS = 240, 4
MEMORY = 256  # frames of a bounded memory; a block over twice as many takes twice as long
SAVED = "unfinished"  # folder in --out with the frames so far
HEADS = Path(__file__).with_name("heads.json")  # the list of `--heads auto`
SPARE_SPANS = 16  # capacity comes in steps of so many spans: one program for many lengths

log = logging.getLogger(__name__)


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
    memory = _memory(options)
    actions = None if options.actions is None else camera.parse_actions(options.actions)
    free = actions is not None or options.endless
    with told_to_user():
        sampler = Sampler(
            steps=STEPS if options.steps is None else options.steps,
            # The default path is all replay.
            sharpness=FREE_SHARPNESS if free else 0.0,
            overlap=FREE_OVERLAP if free else 0.0,
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

    if actions is not None and len(actions) > frames:
        log.warning(
            f"--frames {frames} is less than the walk: the last {len(actions) - frames} of its "
            f"{len(actions)} frames are not made; leave --frames out for all of it"
        )
    if BASELINE in options.compare:
        log.info(f"--compare {BASELINE} changes nothing: {NAME} always runs it, to compare with")

    history = history_of(
        options.heads, layers=cfg.layers, count=cfg.heads, local=None, usual=2, own=HEADS
    )
    path_F3 = path_of(options.seed, tour, frames + -frames % n, actions, options.endless)
    arms = []
    for name, codec in codecs.items():
        heads = None if name == BASELINE else history
        with told_to_user():  # a codec may refuse the span
            if memory is None:
                capacity = _capacity(cfg, codec, len(path_F3))
                cache = pipeline.make_cache(cfg, codec, capacity, history=heads)
            else:
                cache = bounded_cache(cfg, codec, memory, heads)
        arms.append(Arm(name=name, state=pipeline.WorldState(cache, noise_key(options.seed))))
    config = _config(options, tour, frames, sampler, cfg, weights, arms[0].state.cache.layout)
    if history is not None:
        config["heads"] = str(history)
    block = (1, n, world.HEIGHT, world.WIDTH, 3)
    which = dict(resume=options.resume, restart=options.restart)
    saved = SavedBlocks(Path(options.out) / SAVED, config, block, np.float32, **which)
    step = pipeline.make_step(model, sampler, ENDLESS if options.endless else None)

    def before(arm: Arm) -> Recaller | None:
        """What brings spans into sight before each block of an arm."""
        if not options.recall:
            return None
        cache, slots = arm.state.cache, arm.state.cache.layout.max_spans
        spans = max(slots, len(path_F3) // (n * cache.layout.span_blocks))
        return Recaller(cfg, cache, sight=slots, spans=spans)

    with told_to_user():  # a store may not fit the memory
        hooks = {arm.name: before(arm) for arm in arms}
    return Job(
        model=NAME,
        step=step,
        play=lambda arm, xs: _play(
            step, arm, xs, first=tour // n, saved=saved, before=hooks[arm.name]
        ),
        arms=tuple(arms),
        blocks=path_blocks(options.seed, path_F3, tour, n),
        cache=lambda state: state.cache,
        tour=tour,
        frames=frames,
        block_frames=n,
        height=world.HEIGHT,
        width=world.WIDTH,
        finished=lambda: saved.finish(keep=False),
        anew=saved.missing,
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
        **({"endless": dataclasses.asdict(ENDLESS)} if options.endless else {}),
        **({"recall": True} if options.recall else {}),
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
    step: Step,
    arm: Arm,
    xs: Iterator[pipeline.BlockInput],
    *,
    first: int,
    saved: SavedBlocks,
    before: Recaller | None,
) -> Iterator[Played]:
    """Yields the frames of one arm, block by block; generated ones are on disk before they are yielded.

    Args:
        step: of the model.
        arm: its state is consumed.
        xs: the path.
        first: number of the first block that is generated.
        saved: blocks of an earlier run, which are shown to the model and not generated again.
        before: what brings spans into sight before each block; None for nothing.
    """
    stored = saved.read(arm.name)

    def known() -> Iterator[pipeline.BlockInput]:
        for number, x in enumerate(xs, -first):
            if 0 <= number < len(stored):
                x = dataclasses.replace(x, frames=stored[number], made=np.bool_(True))
            yield x

    blocks = stream(step, arm.state, known(), before=before)
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


def _memory(options: Options) -> int | None:
    """Frames of a bounded memory, or None for one that holds all.

    Raises:
        UserError: an option that needs --endless.
    """
    check_endless(options)
    if not options.endless:
        return None
    return MEMORY if options.memory is None else options.memory


def bounded_cache(
    cfg: PocketWorldConfig,
    codec: tuple[Codec, Codec],
    frames: int,
    history: HeadHistory | None = None,
) -> KVCache:
    """A cache that remembers at least so many frames, in whole spans; then its oldest span makes room."""
    # Of the capacity, one block is the sink and the newest ones are the window's.
    capacity = frames + 3 * cfg.block_frames
    return pipeline.make_cache(cfg, codec, capacity, overflow="drop", history=history)


def _capacity(cfg, codec: tuple[Codec, Codec], frames: int) -> int:
    """At least `frames`: what a cache holds whose spans are a multiple of SPARE_SPANS."""
    lay = jax.eval_shape(lambda: pipeline.make_cache(cfg, codec, frames)).layout
    spans = lay.max_spans + -lay.max_spans % SPARE_SPANS
    blocks = lay.sink_blocks + lay.keep_recent + spans * lay.span_blocks
    return blocks * cfg.block_frames


def noise_key(seed: int) -> Array:
    """The key of all noise in a run of this seed; a new array on every call, as states are donated."""
    return jax.random.fold_in(jax.random.key(seed), 1)
