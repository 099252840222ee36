"""LongCat's rotary embedding over (frame, row, column) of the clip.

Each axis has its own ladder of frequencies and its own share of the channels of a head; channel
pairs are interleaved and the frame comes first. Positions are integers that start at 0 in every
clip: nothing is carried from segment to segment.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.common.tokens import token_positions
from models.longcat.config import LongCatConfig
from qvg_jax.cache.rope import Rope, axial_rope, frequency_ladder


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels that rotate with the frame, the row and the column: 44, 42, 42 for 128."""
    small = 2 * (head_dim // 6)
    return head_dim - 2 * small, small, small


def axis_frequencies(head_dim: int, theta: float = 10000.0) -> tuple[tuple[float, ...], ...]:
    """Radians per step on each axis: theta^(-2 j / d), j < d / 2, d the channels of that axis."""
    return tuple(frequency_ladder(d, theta) for d in axis_channels(head_dim))


def longcat_rope(head_dim: int, theta: float = 10000.0) -> Rope:
    """The rotation in the form that `qvg_jax.attend` takes."""
    return axial_rope(axis_frequencies(head_dim, theta), pairing="interleaved")


def model_rope(config: LongCatConfig) -> Rope:
    """The rotation of a model of this size."""
    return longcat_rope(config.head_dim, config.rope_theta)


def clip_positions(
    config: LongCatConfig, first: int, shape: tuple[int, ...]
) -> Float[Array, "B T 3"]:
    """Positions of the tokens of latent frames `first`, `first` + 1, ... of a clip.

    Args:
        config: gives the patch.
        first: latent frames of the clip that lie before these.
        shape: (B, F, Z, Y, X) of the latents.
    """
    B, F, _, Y, X = shape
    positions_TP = token_positions(first + np.arange(F), *config.grid(Y, X)).astype(jnp.float32)
    return jnp.broadcast_to(positions_TP[None], (B, *positions_TP.shape))
