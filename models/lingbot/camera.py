"""Camera paths as maps: where the ray of every pixel starts and where it goes.

Host side, float64. Camera coordinates: x right, y down, z forward; poses are camera to world.
"""

import numpy as np
from jaxtyping import Float


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
    if height % fold or width % fold:
        raise ValueError(f"height={height} and width={width} must be multiples of {fold}")
    motion = steps_of(c2w_F44)
    k = np.diag([width / 832, height / 480, 1.0]) @ intrinsics_33
    column, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    pixel = np.stack([column, row, np.ones_like(row)], -1)
    ray_YX3 = pixel @ np.linalg.inv(k).T
    ray_FYX3 = np.einsum("fij,yxj->fyxi", motion[:, :3, :3], ray_YX3)
    ray_FYX3 /= np.linalg.norm(ray_FYX3, axis=-1, keepdims=True)
    start_FYX3 = np.broadcast_to(motion[:, None, None, :3, 3], ray_FYX3.shape)
    both = np.concatenate([start_FYX3, ray_FYX3], -1)
    F = len(motion)
    both = both.reshape(F, height // fold, fold, width // fold, fold, 6)
    folded = both.transpose(0, 5, 2, 4, 1, 3).reshape(F, -1, height // fold, width // fold)
    return folded.astype(np.float32)
