"""The definition of `decode_keys` and `decode_values` in plain JAX.

Axes: R rows, n of them decoded; T tokens, W tokens of the workspace, D head dim, B batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_kernels.dequantize.dither import FINE, dither
from pallas_kernels.dequantize.types import PAD, Encoded, Rotation, Source, Spans, padded

__all__ = [
    "cos_sin_of",
    "cut",
    "decode_keys",
    "decode_values",
    "decoded",
    "in_key_rows",
    "key_row_of_token",
    "laid_into",
    "rotated",
]


def key_row_of_token(tokens: int) -> Array:
    """The row of every token among e4m3 keys, permuted within each group of 16.

    An 8-bit matrix product wants its left operand, the probabilities, in another register order
    than the product before it left them. Storing token 4 i + 2 a + b of every 16 at row
    8 a + 2 i + b makes the registers right as they are.
    """
    t = jnp.arange(tokens)
    i, a, b = t % 16 // 4, t % 4 // 2, t % 2
    return t // 16 * 16 + 8 * a + 2 * i + b


def in_key_rows(x_nTD: Array) -> Array:
    """x with its tokens in the order of `key_row_of_token`; T is a multiple of 16."""
    n, t, d = x_nTD.shape
    return jnp.swapaxes(x_nTD.reshape(n, t // 16, 4, 2, 2, d), 2, 3).reshape(n, t, d)


def decoded(source: Source) -> Array:
    """The decoded rows in float32, (n, T, D), before any rotation; spans lie behind each other."""
    stored, scheme, rows = source.stored, source.scheme, source.rows
    first_row = jnp.asarray(source.first_row, jnp.int32)
    if source.window is not None:
        stored = cut(stored, source.window)
    if not isinstance(stored, Encoded) and stored.ndim == 4:
        stored = jnp.swapaxes(stored, 1, 2).reshape(-1, stored.shape[1], stored.shape[3])
    if first_row.ndim:
        spans = [decoded(Spans(stored, scheme, r, rows)) for r in first_row]
        return jnp.concatenate(spans, axis=1)
    if source.row_n is not None:
        return stored[source.row_n].astype(jnp.float32)
    pick = lambda x: lax.dynamic_slice_in_dim(x, first_row, rows, 0)  # noqa: E731
    if not isinstance(stored, Encoded):
        return pick(stored).astype(jnp.float32)
    codes_nTC, scales_nTG = pick(stored.codes_RTC), pick(stored.scales_RTG)
    n, t, c = codes_nTC.shape
    bit = np.arange(8 * c // scheme.bits) * scheme.bits
    byte, inside = bit // 8, jnp.asarray(bit % 8, jnp.uint16)[None, None]
    # Codes of 3 bits may begin in one byte and end in the next.
    wide = codes_nTC.astype(jnp.uint16)
    word = (wide[..., byte] << 8) | wide[..., np.minimum(byte + 1, c - 1)]
    codes = (word >> (16 - scheme.bits - inside)) & (2**scheme.bits - 1)
    numbers = lambda x: lax.bitcast_convert_type(x, jnp.float8_e4m3fn).astype(jnp.float32)  # noqa: E731
    scales, zeros = numbers(scales_nTG), None
    if scheme.zero_points:
        zeros = numbers(pick(stored.zeros_RTG))
    if stored.exponents_R is not None:
        power = jnp.exp2(pick(stored.exponents_R).astype(jnp.float32))[:, None, None]
        scales, zeros = scales * power, None if zeros is None else zeros * power
    levels = codes.astype(jnp.float32)
    if scheme.dithered:
        levels += dither(t, levels.shape[2]).astype(jnp.float32)[None] / FINE
    levels = levels.reshape(n, t, -1, scheme.group) - scheme.offset
    x_nTGg = levels * scales[..., None]
    x_nTD = (x_nTGg if zeros is None else x_nTGg + zeros[..., None]).reshape(n, t, -1)
    if scheme.deviations:
        x_nTD *= pick(stored.deviations_RD).astype(jnp.float32)[:, None]
    if scheme.stages:
        ids, centroids = pick(stored.ids_RST).astype(jnp.int32), stored.centroids(first_row, rows)
        for s in range(scheme.stages):
            x_nTD += jax.vmap(lambda c, i: c[i])(centroids[:, s], ids[:, s])
    return x_nTD


def cut(x_RTD: Array, window: tuple[Array | int, int]) -> Array:
    """Some tokens of x; beyond the last one, the last one again."""
    start, tokens = window
    token_T = start + jnp.arange(tokens)
    return jnp.take(x_RTD, jnp.minimum(token_T, x_RTD.shape[1] - 1), axis=1)


def cos_sin_of(rotation: Rotation) -> tuple[Array, Array]:
    """Cosines and sines (B, T, D / 2) of the videos; those of several spans behind each other."""
    first = jnp.asarray(rotation.first, jnp.int32)
    if first.ndim:
        parts = [cos_sin_of(dataclasses.replace(rotation, first=f)) for f in first]
        return tuple(jnp.concatenate(p, axis=1) for p in zip(*parts, strict=True))
    return tuple(lax.dynamic_slice_in_dim(t, first, rotation.batch, 0) for t in rotation.cos_sin)


def rotated(x_nTD: Array, cos_sin: tuple[Array, Array] | None, pairing: str) -> Array:
    """x rotated by cosines and sines (B, T, D / 2); n is a multiple of B."""
    if cos_sin is None:
        return x_nTD
    n, t, d = x_nTD.shape
    x = x_nTD.reshape(cos_sin[0].shape[0], -1, t, d)
    cos, sin = (x_BTd[:, None] for x_BTd in cos_sin)
    half = (x[..., : d // 2], x[..., d // 2 :])
    x1, x2 = half if pairing == "half" else (x[..., ::2], x[..., 1::2])
    y1, y2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
    y = jnp.concatenate([y1, y2], -1) if pairing == "half" else jnp.stack([y1, y2], -1)
    return y.reshape(n, t, d)


def _filled(x_nTD: Array, valid: Array, room: int = 0, width: int | None = None) -> Array:
    """Zeros behind the valid tokens, up to the size of the workspace."""
    t = x_nTD.shape[1]
    x_nTD = jnp.where((jnp.arange(t) < valid)[None, :, None], x_nTD, 0)
    more = (padded(t + room) if width is None else width) - t
    return jnp.pad(x_nTD, ((0, 0), (0, more), (0, 0)))


def laid_into(workspace: Array, x: Array, at: Array, valid: Array, axis: int) -> Array:
    """The workspace with x in place of its tokens from `at` on: valid ones, then zeros to a `PAD`."""
    token = jnp.arange(workspace.shape[axis]) - at
    new = jnp.take(x, token, axis=axis, mode="fill", fill_value=0)
    own = (token >= 0) & (token < -(-(at + valid) // PAD) * PAD - at)
    return jnp.where(own[:, None] if axis == 1 else own, new, workspace)


def decode_keys(
    source: Source,
    valid: Array,
    dtype: Any,
    scale_n: Array | None,
    rotation: Rotation | None,
    room: int = 0,
    width: int | None = None,
) -> Array:
    """See `api.decode_keys`."""
    cos_sin, pairing = None, "half"
    if rotation is not None:
        cos_sin, pairing = cos_sin_of(rotation), rotation.pairing
        if source.window is not None:
            cos_sin = tuple(cut(x, source.window) for x in cos_sin)
    x = _filled(rotated(decoded(source), cos_sin, pairing), valid, room, width)
    if dtype == jnp.bfloat16:
        return x.astype(dtype)
    return in_key_rows(jnp.clip(x / scale_n[:, None, None], -448, 448).astype(dtype))


def decode_values(
    source: Source,
    valid: Array,
    dtype: Any,
    scale_n: Array | None,
    room: int = 0,
    width: int | None = None,
) -> Array:
    """See `api.decode_values`."""
    x = _filled(decoded(source), valid, room, width)
    if dtype == jnp.bfloat16:
        return x.astype(dtype)
    return jnp.clip(x / scale_n[:, None, None], -448, 448).astype(dtype).swapaxes(1, 2)
