"""From what the hands do to where the camera is: pose strings, camera paths, action ids.

"w-8,right-4" walks forward for eight latent frames and then turns right for four. Everything here
is float64 on the host. Camera coordinates: x right, y down, z forward; poses are camera to world.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

STEP = 0.08  # world units a latent frame
TURN = math.radians(3)  # radians a latent frame

# Name -> (forward, right, yaw, pitch) of one latent frame.
ACTIONS = {
    "w": (STEP, 0.0, 0.0, 0.0),
    "s": (-STEP, 0.0, 0.0, 0.0),
    "d": (0.0, STEP, 0.0, 0.0),
    "a": (0.0, -STEP, 0.0, 0.0),
    "right": (0.0, 0.0, TURN, 0.0),
    "left": (0.0, 0.0, -TURN, 0.0),
    "up": (0.0, 0.0, 0.0, TURN),
    "down": (0.0, 0.0, 0.0, -TURN),
}

# The released calibration: focal length in pixels, image width and height in pixels.
FOCAL, IMAGE = 969.6969696969696, (1920.0, 1080.0)

_MOVES = {(1, 0): 1, (-1, 0): 2, (0, 1): 3, (0, -1): 4, (0, 0): 0}
_MOVES |= {(1, 1): 5, (1, -1): 6, (-1, 1): 7, (-1, -1): 8}

MOST_FRAMES = 10**4  # that actions may say: many times the RoPE table of the released model


@dataclass(frozen=True, eq=False)
class CameraPath:
    """One camera and one action id for each latent frame, the first frame at the start.

    Attributes:
        c2w_F44: camera to world.
        intrinsics_F33: focal lengths and principal point in units of the image size.
        actions_F: id of the motion that led into the frame; 0 for the first.

    Raises:
        ValueError: shapes that do not fit each other, values that are not finite, or ids outside
            0..80.
    """

    c2w_F44: Float[np.ndarray, "F 4 4"]
    intrinsics_F33: Float[np.ndarray, "F 3 3"]
    actions_F: Int[np.ndarray, "F"]

    def __post_init__(self):
        frames = len(self.c2w_F44)
        shapes = dict(c2w_F44=(4, 4), intrinsics_F33=(3, 3), actions_F=())
        for name, shape in shapes.items():
            x = getattr(self, name)
            if x.shape != (frames, *shape):
                raise ValueError(f"{name} has shape {x.shape}; accepted: {(frames, *shape)}")
            if not np.isfinite(x).all():
                raise ValueError(f"{name} has values that are not finite")
        if not ((self.actions_F >= 0) & (self.actions_F <= 80)).all():
            raise ValueError(f"actions_F={self.actions_F.tolist()}; accepted: ids 0..80")

    def __len__(self) -> int:
        return len(self.c2w_F44)

    @property
    def w2c_F44(self) -> Float[np.ndarray, "F 4 4"]:
        """World to camera."""
        return np.linalg.inv(self.c2w_F44)

    @classmethod
    def from_string(
        cls, text: str, *, durations: Literal["whole", "truncate"] = "whole"
    ) -> "CameraPath":
        """The path of a pose string: one more frame than it has steps. See `parse_actions`."""
        c2w_F44 = walk(parse_actions(text, durations=durations))
        return cls(c2w_F44, intrinsics(len(c2w_F44)), action_ids(c2w_F44))


def parse_actions(
    text: str, *, durations: Literal["whole", "truncate"] = "whole"
) -> Float[np.ndarray, "N 4"]:
    """One (forward, right, yaw, pitch) for each latent frame of a string such as "w-8,right-4".

    Args:
        text: comma-separated NAME-FRAMES with names from `ACTIONS`; spaces around the parts and
            empty items do not matter.
        durations: "whole" accepts whole numbers above 0 only. "truncate" does what the released
            code does silently: "d-3.7" is three frames and "right-0.5" none.

    Returns:
        Motions in world units and radians, float64.

    Raises:
        ValueError: an unknown action, a duration that is not accepted, or no action at all.
    """
    if durations not in ("whole", "truncate"):
        raise ValueError(f"durations={durations!r} is not accepted: give 'whole' or 'truncate'")
    motions = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, *rest = (part.strip() for part in item.split("-"))
        if name.lower() not in ACTIONS or len(rest) != 1:
            raise ValueError(
                f"unknown action {item[:60]!r} in {text[:60]!r}; accepted: NAME-FRAMES with NAME one of "
                f"{', '.join(ACTIONS)}, joined by commas, such as 'w-8,right-4'"
            )
        steps = _frames(rest[0], item, durations)
        if len(motions) + steps > MOST_FRAMES:
            raise ValueError(
                f"actions={text[:60]!r} have too many frames; accepted: at most {MOST_FRAMES} in all"
            )
        motions += [ACTIONS[name.lower()]] * max(0, steps)
    if not motions:
        raise ValueError(f"no action in {text!r}; accepted: for instance 'w-8,right-4'")
    return np.asarray(motions, np.float64)


def _frames(duration: str, item: str, durations: str) -> int:
    try:
        number = float(duration)
    except ValueError:
        number = math.nan
    if durations == "truncate" and math.isfinite(number):
        return int(number)
    if not number.is_integer() or number < 1:
        raise ValueError(
            f"duration {duration[:40]!r} in {item[:60]!r}; accepted: a whole number of latent frames above 0"
        )
    return int(number)


def walk(
    motions_N4: Float[np.ndarray, "N 4"], start_44: Float[np.ndarray, "4 4"] | None = None
) -> Float[np.ndarray, "F 4 4"]:
    """Camera-to-world poses of a walk, its start included: F = N + 1.

    Each step turns, R <- R R_y(yaw) R_x(pitch), then moves along the camera's own axes,
    t <- t + R (right, 0, forward).

    Args:
        motions_N4: (forward, right, yaw, pitch) in world units and radians.
        start_44: pose to start from; None is the identity.
    """
    poses = [np.eye(4) if start_44 is None else np.asarray(start_44, np.float64)]
    for forward, right, yaw, pitch in np.asarray(motions_N4, np.float64):
        pose = poses[-1].copy()
        (cy, sy), (cx, sx) = ((math.cos(a), math.sin(a)) for a in (yaw, pitch))
        around_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        around_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        pose[:3, :3] = pose[:3, :3] @ around_y @ around_x
        pose[:3, 3] += forward * pose[:3, 2]
        pose[:3, 3] += right * pose[:3, 0]
        poses.append(pose)
    return np.stack(poses)


def intrinsics(frames: int) -> Float[np.ndarray, "F 3 3"]:
    """The released calibration for every frame, in units of the image size."""
    width, height = IMAGE
    k = np.array([[FOCAL / width, 0, 0.5], [0, FOCAL / height, 0.5], [0, 0, 1]])
    return np.tile(k, (frames, 1, 1))


def action_ids(
    c2w_F44: Float[np.ndarray, "F 4 4"],
    *,
    third_person: bool = False,
    previous_44: Float[np.ndarray, "4 4"] | None = None,
) -> Int[np.ndarray, "F"]:
    """The model's id of the motion into each frame: 9 move + turn.

    move: none 0, forward 1, back 2, right 3, left 4, then their pairs; within 60 degrees of an
    axis. turn: none 0, right 1, left 2, up 3, down 4, then their pairs; above 0.05 degrees.

    Args:
        c2w_F44: camera to world.
        third_person: a move counts only without a turn.
        previous_44: pose of the frame before the first; None gives the first the id 0.
    """
    first = c2w_F44[0] if previous_44 is None else previous_44
    before = np.concatenate([np.asarray(first)[None], c2w_F44[:-1]])
    return np.array(
        [
            _action_id(np.linalg.inv(a) @ b, third_person)
            for a, b in zip(before, c2w_F44, strict=True)
        ],
        np.int64,
    )


def _action_id(motion_44: np.ndarray, third_person: bool) -> int:
    turn = motion_44[:3, :3]
    pitch = math.degrees(math.atan2(turn[2, 1], turn[2, 2]))
    yaw = math.degrees(-math.asin(min(1.0, max(-1.0, turn[2, 0]))))
    shift, move = motion_44[:3, 3], (0, 0)
    distance = np.linalg.norm(shift)
    if distance > 1e-4 and not (third_person and max(abs(pitch), abs(yaw)) >= 0.05):
        # Within 60 degrees of an axis is more than 30 degrees out of the plane across it.
        ahead, aside = (_side(90 - _angle(shift[i] / distance), 30) for i in (2, 0))
        move = (ahead, aside)
    sideways, upward = (_side(angle, 0.05) for angle in (yaw, pitch))
    # Turns are numbered like moves, with right and left in the place of forward and back.
    return 9 * _MOVES[move] + _MOVES[(sideways, upward)]


def _angle(cosine: float) -> float:
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))


def _side(value: float, beyond: float) -> int:
    return int(value > beyond) - int(value < -beyond)


def joined(paths: Iterable[CameraPath]) -> CameraPath:
    """Several pieces of one path behind each other, as a player that walks on makes them."""
    paths = list(paths)
    return CameraPath(
        *(
            np.concatenate([getattr(p, name) for p in paths])
            for name in ("c2w_F44", "intrinsics_F33", "actions_F")
        )
    )
