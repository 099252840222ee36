"""Pocket world for `qvg play`: a person's keys instead of a list of actions.

Tour, noise and path are those of `qvg generate`, so the same actions give the same frames. Only
the memory is bounded, for a walk has no end: when it is full, its oldest span makes room.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from models.pocket_world import camera, job, params, pipeline, route, world
from models.pocket_world.config import ENDLESS
from models.pocket_world.entry import NAME, WalkOptions
from models.pocket_world.recalling import Recaller
from models.pocket_world.sampling import FREE_OVERLAP, FREE_SHARPNESS, Sampler
from models.runs.request_checks import check_seed
from qvg_jax.app.metrics import to_uint8
from qvg_jax.app.play.places import Box
from qvg_jax.app.play.walk import World
from qvg_jax.errors import told_to_user

KEPT_SPANS = 256  # of what is out of sight: two million tokens of each layer
KEYS = {
    "w": "w", "a": "a", "s": "s", "d": "d",
    "arrowup": "w", "arrowleft": "a", "arrowdown": "s", "arrowright": "d",
    "e": "up", "q": "down", " ": "stay",
}  # fmt: skip

REACH = (
    2.5 * camera.SPEED
)  # world units: a block goes 4 * SPEED, so no step leads past a goal by more

_follow = jax.jit(camera.follow)


def walk(options: WalkOptions) -> World:
    """Loads the weights and says how pocket world is walked in.

    Args:
        options: what is wanted; `memory` is frames of compressed history, rounded up to whole
            spans of 32, and sink and window come on top.

    Returns:
        The world. `begin` may be asked for any accepted seed.

    Raises:
        UserError: a value that is not accepted, named with what would be.
    """
    check_seed(options.seed)
    steps = job.STEPS if options.steps is None else options.steps
    with told_to_user():
        sampler = Sampler(steps, sharpness=FREE_SHARPNESS, overlap=FREE_OVERLAP)
    weights = pathlib.Path(options.weights or params.DEFAULT_WEIGHTS)
    model = params.load_weights(weights)
    job.check_finite(model, weights)
    cfg, n = model.cfg, model.cfg.block_frames
    tour = options.tour + -options.tour % n
    frames = job.MEMORY if options.memory is None else options.memory

    def begin(seed, codec):
        check_seed(seed)
        cache = job.bounded_cache(cfg, codec, frames)
        return pipeline.WorldState(cache, job.noise_key(seed))

    def before(state):
        slots = state.cache.layout.max_spans
        return Recaller(cfg, state.cache, sight=slots, spans=max(slots, KEPT_SPANS))

    return World(
        model=NAME,
        step=pipeline.make_step(model, sampler, ENDLESS if options.endless else None),
        actions=camera.ACTIONS,
        keys=KEYS,
        begin=begin,
        inputs=functools.partial(_inputs, tour, n),
        codec=pipeline.world_recipe,
        cache=lambda state: state.cache,
        with_cache=lambda state, cache: dataclasses.replace(state, cache=cache),
        tour_blocks=tour // n,
        block_frames=n,
        height=world.HEIGHT,
        width=world.WIDTH,
        fps=8,
        place=lambda x: (float(x.pose[0, -1, 0]), float(x.pose[0, -1, 1])),
        views=_views,
        toward=_toward,
        truth=_truth,
        before=before if options.recall else None,
    )


def _inputs(tour: int, n: int, seed: int, actions: Iterator[str]) -> Iterator[pipeline.BlockInput]:
    """Blocks of the tour with their frames, then a block for each action."""
    tour_F3 = route.tour_path(seed, tour)
    last_3 = tour_F3[0]
    _follow(last_3, np.zeros(n, np.int32))  # compiled here, and not when the first key is waiting
    nothing = np.zeros((1, n, world.HEIGHT, world.WIDTH, 3), np.float32)
    for number in itertools.count():
        first = number * n
        if given := first < tour:
            path_F3 = tour_F3[first : first + n]
        else:
            action = camera.ACTIONS.index(next(actions))
            path_F3 = np.asarray(_follow(last_3, np.full(n, action, np.int32)))
        x = pipeline.BlockInput(
            number=np.int32(number),
            pose=path_F3[None],
            before=np.concatenate([last_3[None], path_F3[:-1]])[None],
            time=np.arange(first, first + n, dtype=np.int32),
            frames=nothing,
            given=np.bool_(given),
            made=np.bool_(False),
        )
        yield dataclasses.replace(x, frames=_render(seed, x)) if given else x
        last_3 = path_F3[-1]


def _render(seed: int, x: pipeline.BlockInput) -> Any:
    n = x.pose.shape[1]
    return pipeline.render_path(jnp.array([seed]), x.pose, chunk=n, first_time=int(x.time[0]))


def _views(x: pipeline.BlockInput) -> list[Box]:
    """What each frame shows of the ground, in world units."""
    boxes = []
    for east, south, altitude in np.asarray(x.pose[0]).tolist():
        scale = float(world.units_per_pixel(altitude))
        half_width, half_height = world.WIDTH / 2 * scale, world.HEIGHT / 2 * scale
        boxes.append(
            (east - half_width, south - half_height, east + half_width, south + half_height)
        )
    return boxes


def _toward(view: Box, goal: Box) -> str | None:
    """The action of a block that brings a view nearer to another one, or None where it is near."""
    (a, b, c, d), (left, top, right, bottom) = view, goal
    if (c - a) > (right - left) + 1:
        return "down"  # from there less is in view, all of which was seen from above
    east, south = (left + right - a - c) / 2, (top + bottom - b - d) / 2
    if max(abs(east), abs(south)) <= REACH:
        return None
    if abs(east) > abs(south):
        return "d" if east > 0 else "a"
    return "s" if south > 0 else "w"


def _truth(seed: int, x: pipeline.BlockInput) -> UInt8[np.ndarray, "F H W 3"]:
    return to_uint8(_render(seed, x)[0])
