"""Latent frames as tokens and back: one vector per patch, as Wan transformers cut them."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def to_patches(
    x_BFZYX: Float[Array, "B F Z Y X"], patch: tuple[int, int]
) -> Float[Array, "B T patch"]:
    """One vector per patch, the channel its slowest part; tokens by frame, then row, then column.

    Args:
        x_BFZYX: latents; Y and X are multiples of the patch.
        patch: (rows, columns) of latent pixels per token.
    """
    B, F, Z, Y, X = x_BFZYX.shape
    p, q = patch
    x = x_BFZYX.reshape(B, F, Z, Y // p, p, X // q, q).transpose(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(B, F * (Y // p) * (X // q), Z * p * q)


def from_patches(
    y_BTO: Float[Array, "B T patch"], patch: tuple[int, int], frame: tuple[int, int]
) -> Float[Array, "B F Z Y X"]:
    """The latents of patches whose *fastest* part is the channel, as output layers write them.

    Args:
        y_BTO: one vector per patch.
        patch: (rows, columns) of latent pixels per token.
        frame: (Y, X) of a latent frame.
    """
    (p, q), (Y, X) = patch, frame
    y = y_BTO.reshape(y_BTO.shape[0], -1, Y // p, X // q, p, q, y_BTO.shape[-1] // (p * q))
    y = jnp.transpose(y, (0, 1, 6, 2, 4, 3, 5))
    return y.reshape(*y.shape[:3], Y, X)
