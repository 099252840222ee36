"""Actions, camera paths, and where tokens are in the world.

A pose is (x, y, altitude): world units east and south, and notches of altitude. Moves are
`SPEED` units a frame on a lattice, so a walk that turns back meets its own poses again.
Actions are written as HY-WorldPlay writes them: "w-8,d-4" walks north for 8 frames, then
east for 4.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.pocket_world.world import CLOCK, HEIGHT, MAX_ALTITUDE, WIDTH, units_per_pixel
from qvg_jax.errors import UserError

SPEED = 8.0  # world units a frame
ACTIONS = ("w", "s", "a", "d", "up", "down", "stay")
MOVES = np.array(
    [[0, -1, 0], [0, 1, 0], [-1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, -1], [0, 0, 0]], np.float32
) * np.array([SPEED, SPEED, 1.0], np.float32)
FEATURES = 7  # what `frame_features` returns for each frame

MOST_FRAMES = 10**5  # that actions may say; at 8 frames a second they take hours


def parse_actions(text: str) -> np.ndarray:
    """Turns "w-8,d-4" into one action number a frame (an index into `ACTIONS`), int32 [F].

    Raises:
        UserError: an unknown action, or a duration that is not a whole number above 0.
    """
    frames = []
    for part in text.replace(" ", "").split(","):
        name, _, duration = part.rpartition("-")
        if name not in ACTIONS:
            raise UserError(
                f"unknown action {part[:60]!r} in {text[:60]!r}; accepted: NAME-FRAMES with NAME one of "
                f"{', '.join(ACTIONS)}, joined by commas, such as 'w-8,d-4'"
            )
        if not (duration.isascii() and duration.isdecimal()) or not duration.strip("0"):
            raise UserError(
                f"duration {duration[:40]!r} in {part[:60]!r}; accepted: a whole number of frames "
                "above 0"
            )
        if len(duration) > 9 or len(frames) + int(duration) > MOST_FRAMES:
            raise UserError(
                f"actions={text[:60]!r} have too many frames; accepted: at most {MOST_FRAMES} in all"
            )
        frames += [ACTIONS.index(name)] * int(duration)
    return np.array(frames, np.int32)


def follow(start_3: Float[Array, "3"], actions_F: Int[Array, "F"]) -> Float[Array, "F 3"]:
    """Poses after each action, from a start pose. Altitude stays within 0 and `MAX_ALTITUDE`."""

    def step(pose, action):
        pose = pose + jnp.asarray(MOVES)[action]
        pose = pose.at[2].set(jnp.clip(pose[2], 0.0, MAX_ALTITUDE))
        return pose, pose

    return jax.lax.scan(step, jnp.asarray(start_3, jnp.float32), actions_F)[1]


@functools.partial(jax.jit, static_argnames="frames")
def wander(
    key, start_3: Float[Array, "3"], frames: int, half_width: Float[Array, ""] | float = 240.0
) -> Float[Array, "F 3"]:
    """A random walk of `frames` poses: straight pieces of 4 to 20 frames, at times a change of altitude.

    It stays within `half_width` world units of (0, 0), so long walks meet places again.
    """
    weights = jnp.log(jnp.array([1.0, 1.0, 1.0, 1.0, 0.12, 0.36, 0.10]))
    opposite = jnp.array([1, 0, 3, 2, 5, 4, 6])

    def step(carry, key):
        pose, action, left = carry
        k_action, k_length = jax.random.split(key)
        outside = jnp.stack(
            [
                pose[1] < -half_width, pose[1] > half_width, pose[0] < -half_width,
                pose[0] > half_width, pose[2] >= MAX_ALTITUDE, pose[2] <= 0, False,
            ]
        )  # fmt: skip
        allowed = ~outside & (jnp.arange(len(ACTIONS)) != opposite[action])
        new = jax.random.categorical(k_action, jnp.where(allowed, weights, -jnp.inf))
        length = jax.random.randint(k_length, (), 4, 21)
        length = jnp.where(new >= 4, 1 + length % MAX_ALTITUDE, length)
        turn = (left <= 0) | outside[action]
        action, left = jnp.where(turn, new, action), jnp.where(turn, length, left)
        pose = pose + jnp.asarray(MOVES)[action]
        return (pose, action, left - 1), pose

    carry = (jnp.asarray(start_3, jnp.float32), jnp.int32(6), jnp.int32(0))
    return jax.lax.scan(step, carry, jax.random.split(key, frames))[1]


def frame_features(
    pose_F3: Float[Array, "F 3"], previous_F3: Float[Array, "F 3"], time_F: Int[Array, "F"]
) -> Float[Array, "F 7"]:
    """What the model is told of each frame: the action taken, the altitude and the clock.

    Args:
        pose_F3: poses of the frames.
        previous_F3: the pose one frame earlier in time. A jump of more than one move is a cut:
            the motion is then given as zero with the cut flag set.
        time_F: frame numbers.

    Returns:
        [F, 7]: motion east, south, up (in moves), cut, sin and cos of the clock, altitude.
    """
    delta = (pose_F3 - previous_F3) / jnp.array([[SPEED, SPEED, 1.0]])
    cut = jnp.any(jnp.abs(delta) > 1.5, -1, keepdims=True)
    phase = 2 * jnp.pi * (time_F % CLOCK).astype(jnp.float32)[:, None] / CLOCK
    altitude = pose_F3[:, 2:] / MAX_ALTITUDE
    return jnp.concatenate(
        [
            jnp.where(cut, 0.0, delta),
            cut.astype(jnp.float32),
            jnp.sin(phase),
            jnp.cos(phase),
            altitude,
        ],
        -1,
    )


def token_positions(
    pose_F3: Float[Array, "F 3"],
    time_F: Int[Array, "F"],
    patch: int,
    height: int = HEIGHT,
    width: int = WIDTH,
) -> Float[Array, "T 4"]:
    """Where each token is: (frame number, y, x, altitude) with y and x of the patch centre.

    y and x are world coordinates divided by `patch`, so tokens of different frames that show the
    same place have the same position. T = F * (height // patch) * (width // patch), for patches of
    the middle `height` x `width` pixels of a frame.
    """
    rows, columns = height // patch, width // patch
    scale = units_per_pixel(pose_F3[:, 2])[:, None, None]
    y = (
        pose_F3[:, 1, None, None] / patch
        + (jnp.arange(rows) + 0.5 - rows / 2)[None, :, None] * scale
    )
    x = (
        pose_F3[:, 0, None, None] / patch
        + (jnp.arange(columns) + 0.5 - columns / 2)[None, None, :] * scale
    )
    shape = (len(pose_F3), rows, columns)
    parts = (time_F.astype(jnp.float32)[:, None, None], y, x, pose_F3[:, 2, None, None])
    return jnp.stack([jnp.broadcast_to(p, shape) for p in parts], -1).reshape(-1, 4)
