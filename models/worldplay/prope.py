"""PRoPE: attention that sees where tokens are by the camera matrices of their frames.

With P = K W of each frame (W world to camera, K intrinsics without principal point), the score of
query q and key k is q^T P_q P_k^-1 k. It depends on the relative pose of the two cameras only. A
head vector is D / 4 groups of four channels, and each group is multiplied by the same 4 x 4 matrix.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.common.rounding import round_to


class Camera(NamedTuple):
    """Projection and its inverse, of frames or of tokens (leading axes)."""

    project: Float[Array, "... 4 4"]  # P
    unproject: Float[Array, "... 4 4"]  # P^-1


def camera_matrices(
    w2c_x44: Float[Array, "... 4 4"],
    intrinsics_x33: Float[Array, "... 3 3"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Camera:
    """P = K W and P^-1 = W^-1 K^-1, each operation rounded to `dtype`.

    K = diag(K_00, K_11, 1, 1): principal point and skew are ignored. W^-1 = [R^T, -R^T t; 0 1].

    Args:
        w2c_x44: world-to-camera matrices [R t; 0 1]; translation in world units.
        intrinsics_x33: focal lengths in units of the image size, on the diagonal; None for 1.
        dtype: the model's; in bfloat16 P P^-1 is off the identity by 3e-3, as in the released code.

    Returns:
        The matrices in `dtype`.
    """
    w2c = round_to(w2c_x44, dtype)
    turn, shift = w2c[..., :3, :3], w2c[..., :3, 3]
    back = jnp.swapaxes(turn, -1, -2)
    # Sums of three products written out: a matrix unit would round the factors.
    home = -round_to((back * shift[..., None, :]).sum(-1), dtype)
    last = jnp.broadcast_to(jnp.asarray([0.0, 0.0, 0.0, 1.0], w2c.dtype), (*w2c.shape[:-2], 1, 4))
    c2w = jnp.concatenate([jnp.concatenate([back, home[..., None]], -1), last], -2)
    if intrinsics_x33 is None:
        return Camera(w2c.astype(dtype), c2w.astype(dtype))
    k = round_to(intrinsics_x33, dtype)
    one = jnp.ones_like(k[..., 0, 0])
    focal = jnp.stack([k[..., 0, 0], k[..., 1, 1], one, one], -1)
    inverse = round_to(1 / focal, dtype)
    return Camera(
        (focal[..., :, None] * w2c).astype(dtype), (c2w * inverse[..., None, :]).astype(dtype)
    )


def per_token(matrix_BF44: Float[Array, "B F 4 4"], tokens: int) -> Float[Array, "B T 4 4"]:
    """Gives every token the matrix of its frame."""
    return jnp.repeat(matrix_BF44, tokens // matrix_BF44.shape[1], axis=1)


def transform(
    matrix_BT44: Float[Array, "B T 4 4"], x_BHTD: Float[Array, "B H T D"]
) -> Float[Array, "B H T D"]:
    """y_i = sum_j M_ij x_j in every group of four channels; float32 inside, keeps x's dtype.

    Raises:
        ValueError: a head dim that is not a multiple of 4.
    """
    D = x_BHTD.shape[-1]
    if D % 4:
        raise ValueError(f"head_dim={D} in shape {x_BHTD.shape}; accepted: a multiple of 4")
    # Four products written out: one pass, where a reduction over an axis of 4 may be slow.
    B, H, T, D = x_BHTD.shape
    x = x_BHTD.astype(jnp.float32).reshape(B, H, T, D // 4, 4)
    m_B1T1ij = matrix_BT44[:, None, :, None].astype(jnp.float32)
    # By diagonals: every element of y is the same four products, of neighbours in memory. Row by
    # row, threads of a GPU would take turns at four rows.
    row = jnp.arange(4)
    y = sum(m_B1T1ij[..., row, (row + d) % 4] * jnp.roll(x, -d, -1) for d in range(4))
    return y.reshape(x_BHTD.shape).astype(x_BHTD.dtype)


def transposed(matrix: Float[Array, "... 4 4"]) -> Float[Array, "... 4 4"]:
    """Rows for columns."""
    return jnp.swapaxes(matrix, -1, -2)
