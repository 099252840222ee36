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

from models.pocket_world import camera, job, params, pipeline, world
from models.pocket_world.entry import NAME, WalkOptions
from models.pocket_world.sampling import FREE_OVERLAP, FREE_SHARPNESS, Sampler
from models.runs.request_checks import check_seed
from qvg_jax.app.metrics import to_uint8
from qvg_jax.app.play.walk import World
from qvg_jax.errors import told_to_user

MEMORY = 256  # frames; a block over twice as many takes twice as long
KEYS = {
    "w": "w", "a": "a", "s": "s", "d": "d",
    "arrowup": "w", "arrowleft": "a", "arrowdown": "s", "arrowright": "d",
    "e": "up", "q": "down", " ": "stay",
}  # fmt: skip

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
    frames = MEMORY if options.memory is None else options.memory

    def begin(seed, codec):
        check_seed(seed)
        # Of the capacity asked for, one block is the sink and the newest ones are the window's.
        cache = pipeline.make_cache(cfg, codec, frames + 3 * n, overflow="drop")
        return pipeline.WorldState(cache, job.noise_key(seed))

    return World(
        model=NAME,
        step=pipeline.make_step(model, sampler),
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
        truth=_truth,
    )


def _inputs(tour: int, n: int, seed: int, actions: Iterator[str]) -> Iterator[pipeline.BlockInput]:
    """Blocks of the tour with their frames, then a block for each action."""
    tour_F3 = job.tour_path(seed, tour)
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


def _truth(seed: int, x: pipeline.BlockInput) -> UInt8[np.ndarray, "F H W 3"]:
    return to_uint8(_render(seed, x)[0])
