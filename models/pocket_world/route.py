"""The path of a run: poses of a tour and of the frames after it, and its blocks with their truth."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from models.pocket_world import camera, pipeline, world
from qvg_jax.app.job import Block
from qvg_jax.app.metrics import to_uint8

HALF_WIDTH = 240.0  # world units; a tour within it meets some places twice


def tour_path(seed: int, frames: int) -> Float[np.ndarray, "F 3"]:
    """Poses of the real frames that a run of this seed starts with."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return np.asarray(camera.wander(key, jnp.zeros(3), frames, HALF_WIDTH))


def path_of(
    seed: int, tour: int, frames: int, actions: np.ndarray | None, onward: bool = False
) -> Float[np.ndarray, "F 3"]:
    """Poses of the tour and of the frames to generate, without a cut between them.

    Args:
        seed: of the world.
        tour, frames: how many poses of each.
        actions: where to go after the tour, again and again; None for back over the tour and forward.
        onward: without actions, to wander on from the tour instead.
    """
    tour_F3 = tour_path(seed, tour)
    if actions is None and onward:
        key = jax.random.fold_in(jax.random.key(seed), 2)
        made_F3 = np.asarray(camera.wander(key, jnp.asarray(tour_F3[-1]), frames, HALF_WIDTH))
    elif actions is None:
        # Back from the last pose to the first, forward to the last, and so on.
        last = tour - 1
        made_F3 = tour_F3[np.abs(last - (np.arange(frames) + 1) % (2 * last))]
    else:
        made_F3 = np.asarray(camera.follow(tour_F3[-1], np.resize(actions, frames)))
    return np.concatenate([tour_F3, made_F3])


def path_blocks(seed: int, path_F3: Float[np.ndarray, "F 3"], tour: int, n: int) -> Iterator[Block]:
    """Yields the blocks of a path with their truth, rendered one by one: the length costs no memory.

    Args:
        seed: of the world.
        path_F3: poses, tour first.
        tour: frames of it, which the model is given.
        n: frames of a block.
    """
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
