"""Rotary position embedding from per-token positions, split into its two halves.

The cache keeps K before rotation and the positions beside it. Sine and cosine depend on the
positions only, so they are computed once for all layers (`table`); applying them to K or Q is a
handful of multiplications (`rotate`). `Rope` is that pair of functions; a model with another
rotation (tables in bf16, integer lookups, projective encodings) brings its own.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from qvg_jax.codecs.spec import Spec, Value, factory

__all__ = ["Encodings", "Rope", "Table", "axial_rope", "frequency_ladder"]

type Table = Any  # a pytree of arrays: what a rope makes of positions, with their leading axes


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rope(Value):
    """A rotation of Q and K by position: a pair of pure functions.

    Those that factories made, as `axial_rope`, are equal if their settings are. One that is made by
    hand is equal to another of the same functions.

    Attributes:
        table: `table(pos_xP) -> pytree` of arrays with the same leading axes as `pos_xP`, of
            which there may be any number; the last axis are the position components.
        rotate: `rotate(x_BHTD, table) -> x_BHTD` with table leaves (B, T, ...); keeps x's dtype.
        pairing: "half" or "interleaved" if the table is (cos, sin), each float32 (..., D / 2), and
            `rotate` turns channel j with j + D / 2, or 2 j with 2 j + 1, by them: what kernels do
            themselves. None for any other rotation.
        spec: the factory and the settings that made the rope; None if it was made by hand.
    """

    table: Callable[[Array], Table]
    rotate: Callable[[Array, Table], Array]
    pairing: Literal["half", "interleaved"] | None = None
    spec: Spec | None = dataclasses.field(default=None, init=False)


class Encodings(NamedTuple):
    """Several encodings of one stored k and v, made when they are read.

    For models that attend more than once over the same k and v, each time encoded in another way:
    the cache keeps H heads, and attention reads C = copies H of them. New tokens and queries come
    to `attend` with all their heads encoded.

    Attributes:
        table: as of a `Rope`.
        keys: `keys(k_BHTD, table) -> k_BCTD`, the encodings of a head next to each other; keeps
            the dtype, and zeros stay zeros.
        values: `values(v_BHTD, table) -> v_BCTD`, likewise.
        copies: C / H.
        growth: `growth(table) -> (of keys, of values)`, by how much an encoding may at most exceed
            the largest number that went in. With it attention in e4m3 needs no pass over encoded
            numbers to find their unit.
    """

    table: Callable[[Array], Any]
    keys: Callable[[Array, Any], Array]
    values: Callable[[Array, Any], Array]
    copies: int
    growth: Callable[[Any], tuple[Array, Array]] | None = None


def frequency_ladder(channels: int, theta: float = 10000.0) -> tuple[float, ...]:
    """The usual geometric frequencies of one axis: theta ** (-2 i / channels), i < channels / 2.

    Args:
        channels: channels of a head that this axis rotates; even.
        theta: base of the ladder.

    Returns:
        `channels // 2` angles in radians per unit of position.

    Raises:
        ValueError: `channels` is odd or negative, or `theta` is not positive.

    Source: Su et al., RoFormer (arXiv 2104.09864), section 3.2.2.
    """
    if channels < 0 or channels % 2:
        raise ValueError(f"channels={channels} is not accepted: give an even number >= 0")
    if not theta > 0:
        raise ValueError(f"theta={theta} is not accepted: give a number > 0")
    return tuple(math.exp(-2 * i / channels * math.log(theta)) for i in range(channels // 2))


@factory
def axial_rope(
    frequencies: Sequence[Sequence[float]], *, pairing: Literal["half", "interleaved"] = "half"
) -> Rope:
    """Rotation of channel pairs, each pair by one component of the position.

    Pair j belongs to position component a(j) and turns by the angle w_j pos[a(j)]:
    (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos). The pairs of component 0 come first.

    Args:
        frequencies: for each of the P position components its frequencies in radians per unit
            of position; together D / 2 of them.
        pairing: "half" pairs channel j with j + D / 2, "interleaved" pairs 2 j with 2 j + 1.

    Returns:
        A `Rope` for positions (..., P); its table is (cos, sin), each (..., D / 2) float32.

    Raises:
        ValueError: `frequencies` is empty or `pairing` is unknown; when used, positions whose
            last axis is not P or x whose D is not twice the number of frequencies.

    Source: Su et al., RoFormer (arXiv 2104.09864), section 3.2.2, one ladder for each axis.
    """
    ladders = tuple(tuple(float(w) for w in ladder) for ladder in frequencies)
    axes = tuple(a for a, ladder in enumerate(ladders) for _ in ladder)
    if not axes:
        raise ValueError(f"frequencies={frequencies!r} is empty; give at least one frequency")
    if pairing not in ("half", "interleaved"):
        raise ValueError(f"pairing={pairing!r} is not accepted: give 'half' or 'interleaved'")

    def table(pos_xP: Float[Array, "... P"]) -> tuple[Array, Array]:
        if pos_xP.shape[-1] != len(ladders):
            raise ValueError(
                f"positions have {pos_xP.shape[-1]} components in shape {pos_xP.shape}; "
                f"this rope rotates by {len(ladders)}"
            )
        angles = [
            pos_xP[..., a, None].astype(jnp.float32)
            * jnp.asarray(ladder, jnp.float32).reshape((1,) * (pos_xP.ndim - 1) + (-1,))
            for a, ladder in enumerate(ladders)
            if ladder
        ]
        angle = jnp.concatenate(angles, axis=-1)
        return jnp.cos(angle), jnp.sin(angle)

    def rotate(x_BHTD: Float[Array, "B H T D"], cos_sin: tuple[Array, Array]) -> Array:
        if x_BHTD.shape[-1] != 2 * len(axes):
            raise ValueError(
                f"head_dim={x_BHTD.shape[-1]} in shape {x_BHTD.shape}; "
                f"this rope has {len(axes)} frequencies and rotates {2 * len(axes)} channels"
            )
        cos, sin = (t[:, None] for t in cos_sin)
        x = x_BHTD.astype(jnp.float32)
        if pairing == "half":
            x1, x2 = jnp.split(x, 2, axis=-1)
        else:
            x1, x2 = x[..., 0::2], x[..., 1::2]
        y1, y2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
        if pairing == "half":
            y = jnp.concatenate([y1, y2], axis=-1)
        else:
            y = jnp.stack([y1, y2], axis=-1).reshape(x.shape)
        return y.astype(x_BHTD.dtype)

    return Rope(table, rotate, pairing)
