"""The new tokens of a call of `attend`, and how they come into a workspace of the kernels."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.dequantize import (
    Rotation,
    Tokens,
    append_keys,
    append_values,
    decode_keys,
    decode_values,
)
from qvg_jax.cache.rope import Rope
from qvg_jax.cache.view import CacheView

__all__ = ["NewBlock", "new_block", "pairing_in", "rotation_of", "scale_of"]


def scale_of(bound: Array) -> Array:
    """The least power of two by which values up to `bound` may be divided for e4m3."""
    bound = bound.astype(jnp.float32) / 448
    return jnp.exp2(jnp.ceil(jnp.log2(jnp.where(bound > 0, bound, 1))))


def pairing_in(view: CacheView) -> str | None:
    """The pairing of channels that a view's rope rotates, or None if kernels cannot rotate them."""
    if not isinstance(view.rope, Rope):
        return "half"
    return view.rope.pairing


def rotation_of(view: CacheView, x_BTHD: Array, batch: int) -> tuple[Array, Rotation | None]:
    """New queries or keys, and their rotation by the kernels; XLA rotates what the kernels cannot.

    Args:
        view: whose rope it is.
        x_BTHD: new tokens.
        batch: videos among the new tokens; the cache's or a multiple.
    """
    if not isinstance(view.rope, Rope) or view.table_new is None:
        return x_BTHD, None
    if (pairing := pairing_in(view)) is None:
        rotated = view.new(jnp.swapaxes(x_BTHD, 1, 2))
        return jnp.swapaxes(rotated, 1, 2), None
    return x_BTHD, Rotation(view.new_table(batch), pairing, batch)


@dataclasses.dataclass(frozen=True)
class NewBlock:
    """Keys and values of the new tokens on their way into a workspace.

    Attributes:
        k, v: bf16, as the kernels read them: (B, T, H, D), or rows.
        rows, tokens: sizes.
        rotation: of the keys, see `rotation_of`.
        scales: of the rows of keys and of values in e4m3; 1 in bf16.
        dtype, implementation: of the workspace, of the kernels.
    """

    k: Array
    v: Array
    rows: int
    tokens: int
    rotation: Rotation | None
    scales: list[Array]
    dtype: Any
    implementation: str

    def workspace(self, scales: list[Array], behind: Any = None) -> tuple[Array, Array]:
        """Keys and values in workspaces of their own, or in (keys, values) from token `at` on.

        Args:
            scales: of the rows.
            behind: (keys, values, at), or None.
        """
        k, v = (Tokens(x, 0, self.rows) for x in (self.k, self.v))
        here = dict(valid=self.tokens, implementation=self.implementation)
        keys = here | dict(scale_n=scales[0], rotation=self.rotation)
        values = here | dict(scale_n=scales[1])
        if behind is not None:
            k_nWD, v_nWD, at = behind
            return append_keys(k_nWD, at, k, **keys), append_values(v_nWD, at, v, **values)
        more = dict(dtype=self.dtype)
        return decode_keys(k, **keys, **more), decode_values(v, **values, **more)


def new_block(
    view: CacheView, k_BTHD: Array, v_BTHD: Array, dtype: Any, implementation: str
) -> NewBlock:
    """The new tokens of a call of `attend` as a `NewBlock`.

    Their batch may be a multiple of the cache's: the branches of guidance.
    """
    batch, tokens, heads, d = k_BTHD.shape
    rows, fp8 = batch * heads, dtype != jnp.bfloat16
    k_BTHD, v_BTHD = k_BTHD.astype(jnp.bfloat16), v_BTHD.astype(jnp.bfloat16)
    k_BTHD, rotation = rotation_of(view, k_BTHD, batch)
    # A rotation lets the largest number grow by no more than the root of two.
    growths = (1.0 if rotation is None else math.sqrt(2), 1.0)
    scales = [
        scale_of(jnp.abs(x).max(axis=(1, 3)).reshape(-1) * growth)
        if fp8
        else jnp.ones((rows,), jnp.float32)
        for x, growth in zip((k_BTHD, v_BTHD), growths, strict=True)
    ]
    k, v = k_BTHD, v_BTHD
    if implementation != "mosaic":
        k, v = (jnp.swapaxes(x, 1, 2).reshape(rows, tokens, d) for x in (k, v))
    return NewBlock(k, v, rows, tokens, rotation, scales, dtype, implementation)
