"""Wan's rotary embedding over (frame, row, column), from float64 host tables.

Channels (0, 1), (2, 3), ... of a head are complex numbers. The D / 2 of them are split over the
three axes, and each axis has its own ladder of frequencies. Angles reach a thousand radians, where
float32 has lost four digits, so cosines and sines are computed in float64 on the host and only
looked up on the device; the rotation itself is float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from qvg_jax.cache.rope import Rope
from qvg_jax.codecs.spec import factory


class RopeTable(NamedTuple):
    """Float32 cosine and sine of every token (leading axes) and complex channel (last axis)."""

    cos: Float[Array, "... pairs"]
    sin: Float[Array, "... pairs"]


def axis_slots(head_dim: int) -> tuple[int, int, int]:
    """Complex channels that rotate with the frame, the row and the column: 22, 21, 21 for 128."""
    small = head_dim // 6
    return head_dim // 2 - 2 * small, small, small


def host_table(head_dim: int, rows: int, theta: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of every position on every axis.

    angle[p, j] = p theta^(-i / n), i the index of slot j among the n slots of its axis.

    Args:
        head_dim: D, even.
        rows: positions 0..rows-1 on each axis.
        theta: base of the frequencies.

    Returns:
        (cos, sin), float64 [rows, D / 2], the slots of frame, row and column side by side.
    """
    ladders = [theta ** -(np.arange(n) / n) for n in axis_slots(head_dim)]
    angle = np.arange(rows, dtype=np.float64)[:, None] * np.concatenate(ladders)
    return np.cos(angle), np.sin(angle)


def rotate(x_BHTD: Float[Array, "B H T D"], table: RopeTable) -> Float[Array, "B H T D"]:
    """Multiplies complex channel j of each token by exp(i angle_j); float32 inside."""
    cos, sin = table.cos[:, None], table.sin[:, None]
    re, im = x_BHTD[..., 0::2].astype(jnp.float32), x_BHTD[..., 1::2].astype(jnp.float32)
    out = jnp.stack([re * cos - im * sin, re * sin + im * cos], axis=-1)
    return out.reshape(x_BHTD.shape).astype(x_BHTD.dtype)


@factory
def wan_rope(head_dim: int, rows: int = 1024, theta: float = 10000.0) -> Rope:
    """The rotation in the form that `qvg_jax.attend` takes; equal for equal arguments.

    Args:
        head_dim: D, even.
        rows: positions that the tables hold on each axis. Larger positions read the last row, so
            callers check the length of the video first.
        theta: base of the frequencies.
    """
    edges = np.cumsum(axis_slots(head_dim))[:-1]
    host = [
        np.split(t.astype(np.float32), edges, axis=1) for t in host_table(head_dim, rows, theta)
    ]

    def table(positions_xP: Num[Array, "... 3"]) -> RopeTable:
        positions_xP = positions_xP.astype(jnp.int32)

        def look_up(parts):
            parts = [jnp.asarray(p)[positions_xP[..., axis]] for axis, p in enumerate(parts)]
            return jnp.concatenate(parts, axis=-1)

        return RopeTable(*map(look_up, host))

    return Rope(table, rotate, "interleaved")
