"""Two encodings of one q, k and v: rotary positions, and camera matrices.

    q -> [RoPE q | P^T q]    k -> [RoPE k | P^-1 k]    v -> [v | P^-1 v]    o -> o | P o

Both encodings of a head stand next to each other on the head axis, (head, encoding), so one
attention over 2 H heads is both attentions, and splitting heads over devices splits no pair.
Letters as in `modeling.py`; C is 2 H, the encoded heads.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.common.tokens import token_positions
from models.common.wan_rope import RopeTable, rotate, wan_rope
from models.worldplay.config import WorldPlayConfig
from models.worldplay.prope import Camera, per_token, transform, transposed
from qvg_jax.cache.rope import Encodings

# A token's position, as caches keep it: slot of its frame, row, column, and P^-1 of its frame but
# for the last row, which is always 0 0 0 1. So a stored k can be encoded again without its camera.
POSITION = 3 + 12


class Place(NamedTuple):
    """What K and V of tokens are encoded by; leading axes B, T."""

    rope: RopeTable
    unproject: Float[Array, "... 4 4"]


class Here(NamedTuple):
    """What Q and the output of the frames in the pass are encoded by, besides."""

    place: Place
    project_BT44: Float[Array, "B T 4 4"]


def positions(
    slots_F: Int[Array, "F"], grid: tuple[int, int], camera_BF44: Camera
) -> Float[Array, "B T 15"]:
    """Positions of all tokens of some frames.

    Args:
        slots_F: the frames' places in the sequence that the pass sees; the RoPE position.
        grid: token rows and columns of a frame.
        camera_BF44: matrices of the frames.
    """
    tokens_T3 = token_positions(slots_F, *grid).astype(jnp.float32)
    matrix_BT44 = per_token(camera_BF44.unproject.astype(jnp.float32), len(tokens_T3))
    B, T = matrix_BT44.shape[:2]
    tokens_BT3 = jnp.broadcast_to(tokens_T3[None], (B, T, 3))
    return jnp.concatenate([tokens_BT3, matrix_BT44[:, :, :3].reshape(B, T, 12)], -1)


@functools.cache
def place_encodings(head_dim: int, rows: int, theta: float) -> Encodings:
    """Both encodings of stored k and v in the form of `qvg_jax`; one object per arguments."""
    table = wan_rope(head_dim, rows, theta).table

    def place(positions_xP: Float[Array, "... 15"]) -> Place:
        top = positions_xP[..., 3:].reshape(*positions_xP.shape[:-1], 3, 4)
        last = jnp.asarray([0.0, 0.0, 0.0, 1.0], top.dtype)
        last = jnp.broadcast_to(last.reshape((1,) * (top.ndim - 1) + (4,)), (*top.shape[:-2], 1, 4))
        return Place(table(positions_xP[..., :3]), jnp.concatenate([top, last], -2))

    return Encodings(place, encode_keys, encode_values, copies=2, growth=growth)


def model_encodings(config: WorldPlayConfig) -> Encodings:
    """`place_encodings` of a model of this size."""
    return place_encodings(config.head_dim, config.rope_frames, config.rope_theta)


def growth(at: Place) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """By how much encoded keys and values may exceed the largest number of what they encode.

    A rotation mixes two channels, a camera matrix four.
    """
    matrices = jnp.abs(at.unproject.astype(jnp.float32)).sum(-1).max()
    return jnp.maximum(2**0.5, matrices), jnp.maximum(1, matrices)


def here(
    config: WorldPlayConfig, positions_BTP: Float[Array, "B T 15"], camera_BF44: Camera
) -> Here:
    """The encodings of the frames of a pass."""
    place = model_encodings(config).table(positions_BTP)
    return Here(place, per_token(camera_BF44.project, positions_BTP.shape[1]))


def encode_queries(q_BHTD: Float[Array, "B H T D"], at: Here) -> Float[Array, "B C T D"]:
    """[RoPE q | P^T q]."""
    return _side_by_side(
        rotate(q_BHTD, at.place.rope), transform(transposed(at.project_BT44), q_BHTD)
    )


def encode_keys(k_BHTD: Float[Array, "B H T D"], at: Place) -> Float[Array, "B C T D"]:
    """[RoPE k | P^-1 k]."""
    return _side_by_side(rotate(k_BHTD, at.rope), transform(at.unproject, k_BHTD))


def encode_values(v_BHTD: Float[Array, "B H T D"], at: Place) -> Float[Array, "B C T D"]:
    """[v | P^-1 v]."""
    return _side_by_side(v_BHTD, transform(at.unproject, v_BHTD))


def decode_outputs(
    o_BCTD: Float[Array, "B C T D"], at: Here
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T D"]]:
    """(o, P o) of the two halves."""
    o_BHTD, o_prope_BHTD = apart(o_BCTD)
    return o_BHTD, transform(at.project_BT44, o_prope_BHTD)


def _side_by_side(a_BHTD, b_BHTD):
    B, H, T, D = a_BHTD.shape
    return jnp.stack([a_BHTD, b_BHTD], 2).reshape(B, 2 * H, T, D)


def apart(x_BCTD: Float[Array, "B C T D"]) -> tuple[Float[Array, "B H T D"], ...]:
    """The two encodings of every head."""
    B, C, T, D = x_BCTD.shape
    x = x_BCTD.reshape(B, C // 2, 2, T, D)
    return x[:, :, 0], x[:, :, 1]
