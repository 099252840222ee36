"""Camera paths as maps: where the ray of every pixel starts and where it goes.

Host side, float64. Camera coordinates: x right, y down, z forward; poses are camera to world.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation, Slerp

from qvg_jax.errors import UserError

STRIDE = 4  # video frames of a latent frame, the first one excepted


def read_poses(path: str | Path) -> Float[np.ndarray, "N 4 4"]:
    """The camera-to-world matrices of a NumPy file, one for each video frame.

    Raises:
        UserError: the file is not readable, or holds something else.
    """
    try:
        poses = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--poses {path}: not readable as a NumPy file ({error})") from error
    shape = getattr(poses, "shape", ())  # an .npz has none
    if len(shape) != 3 or shape[1:] != (4, 4) or not np.isfinite(poses).all():
        raise UserError(
            f"--poses {path}: accepted is one array (frames, 4, 4) of finite camera-to-world "
            f"matrices; got shape {shape}"
        )
    return poses.astype(np.float64)


def latent_poses(
    c2w_N44: Float[np.ndarray, "N 4 4"], frames_per_block: int
) -> Float[np.ndarray, "F 4 4"]:
    """Poses of latent frames from those of video frames.

    (N - 1) // 4 + 1 poses are spread evenly from the first video frame to the last one; those that
    fill whole blocks are kept. Translations are interpolated linearly, rotations along the shortest
    arc.

    Args:
        c2w_N44: a pose for each video frame.
        frames_per_block: latent frames of a block.

    Raises:
        ValueError: too few poses for a block, or poses of another shape.
    """
    least = STRIDE * (frames_per_block - 1) + 1
    if c2w_N44.ndim != 3 or c2w_N44.shape[1:] != (4, 4) or len(c2w_N44) < least:
        raise ValueError(
            f"c2w_N44 has shape {c2w_N44.shape}; accepted: (N, 4, 4) with N at least {least}, a "
            f"block of {frames_per_block} latent frames"
        )
    last = len(c2w_N44) - 1
    spread = np.linspace(0, last, last // STRIDE + 1)
    at = spread[: len(spread) // frames_per_block * frames_per_block]
    poses = np.tile(np.eye(4), (len(at), 1, 1))
    if last == 0:  # Slerp wants two rotations
        poses[:] = c2w_N44[0]
        return poses
    given = np.arange(last + 1.0)
    poses[:, :3, :3] = Slerp(given, Rotation.from_matrix(c2w_N44[:, :3, :3]))(at).as_matrix()
    for axis in range(3):
        poses[:, axis, 3] = np.interp(at, given, c2w_N44[:, axis, 3])
    return poses


def steps_of(c2w_F44: Float[np.ndarray, "F 4 4"]) -> Float[np.ndarray, "F 4 4"]:
    """The motion into each frame, the first one's none; the longest translation is 1.

    G_i = C_{i-1}^-1 C_i, which does not depend on where the path begins; without any translation
    nothing is scaled.

    Raises:
        ValueError: no poses, or values that are not finite.
    """
    if c2w_F44.ndim != 3 or c2w_F44.shape[1:] != (4, 4) or not len(c2w_F44):
        raise ValueError(f"c2w_F44 has shape {c2w_F44.shape}; accepted: (frames, 4, 4)")
    if not np.isfinite(c2w_F44).all():
        raise ValueError("c2w_F44 has values that are not finite")
    before = np.concatenate([c2w_F44[:1], c2w_F44[:-1]])
    motion = np.linalg.inv(before) @ c2w_F44
    longest = np.linalg.norm(motion[:, :3, 3], axis=-1).max()
    motion[:, :3, 3] /= longest if longest > 0 else 1
    return motion


def camera_map(
    c2w_F44: Float[np.ndarray, "F 4 4"],
    intrinsics_33: Float[np.ndarray, "3 3"],
    height: int,
    width: int,
    *,
    fold: int = 8,
) -> Float[np.ndarray, "F C Y X"]:
    """Six numbers for every pixel: origin of its ray and unit direction, after `steps_of`.

    Args:
        c2w_F44: poses of the latent frames.
        intrinsics_33: focal lengths and principal point in pixels of a 480 x 832 image.
        height, width: of the video, multiples of `fold`.
        fold: `fold` x `fold` pixels become channels of one latent pixel, (number, row, column).

    Returns:
        Float32 maps at latent resolution, C = 6 fold^2.
    """
    return CameraMaps(steps_of(c2w_F44), intrinsics_33, height, width, fold)[:, :][0]


@dataclass(frozen=True, eq=False)
class CameraMaps:
    """The camera map of a walk, computed for the frames that are looked at: `maps[:, 8:12]`.

    The map of one frame of 720 x 1280 takes 22 MB, that of a long walk gigabytes.

    Attributes:
        motion_F44: the motion into each frame, from `steps_of`.
        intrinsics_33, height, width, fold: as for `camera_map`.
    """

    motion_F44: Float[np.ndarray, "F 4 4"]
    intrinsics_33: Float[np.ndarray, "3 3"]
    height: int
    width: int
    fold: int = 8

    def __post_init__(self):
        if self.height % self.fold or self.width % self.fold:
            raise ValueError(
                f"height={self.height} and width={self.width} must be multiples of {self.fold}"
            )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, F, C, Y, X) with B = 1."""
        rows, columns = self.height // self.fold, self.width // self.fold
        return 1, len(self.motion_F44), 6 * self.fold**2, rows, columns

    def __getitem__(self, at: tuple[slice, slice]) -> Float[np.ndarray, "B F C Y X"]:
        """Maps of some frames, float32; the first index is that of the batch."""
        motion = self.motion_F44[at[1]]
        height, width, fold = self.height, self.width, self.fold
        k = np.diag([width / 832, height / 480, 1.0]) @ self.intrinsics_33
        column, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        pixel = np.stack([column, row, np.ones_like(row)], -1)
        ray_YX3 = pixel @ np.linalg.inv(k).T
        ray_FYX3 = np.einsum("fij,yxj->fyxi", motion[:, :3, :3], ray_YX3)
        ray_FYX3 /= np.linalg.norm(ray_FYX3, axis=-1, keepdims=True)
        start_FYX3 = np.broadcast_to(motion[:, None, None, :3, 3], ray_FYX3.shape)
        both = np.concatenate([start_FYX3, ray_FYX3], -1)
        both = both.reshape(-1, height // fold, fold, width // fold, fold, 6)
        folded = both.transpose(0, 5, 2, 4, 1, 3).reshape(-1, *self.shape[2:])
        return folded.astype(np.float32)[None][at[0]]
