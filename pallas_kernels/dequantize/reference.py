"""The definition of `decode_keys` and `decode_values` in plain JAX.

Axes: R rows, n of them decoded; T tokens, W tokens of the workspace, D head dim, B batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_kernels.dequantize.types import PAD, Encoded, Scheme, padded

__all__ = [
    "cut",
    "decode_keys",
    "decode_values",
    "decoded",
    "in_key_rows",
    "key_row_of_token",
    "laid_into",
    "rotated",
    "table_rows",
]


def key_row_of_token(tokens: int) -> Array:
    """Where e4m3 keys lie in their group of 16.

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


def decoded(source: Encoded | Array, scheme: Scheme | None, first_row: Array, rows: int) -> Array:
    """float32 values (n, T, D) of `rows` rows from `first_row` on; spans behind each other."""
    if not isinstance(source, Encoded) and source.ndim == 4:
        source = jnp.swapaxes(source, 1, 2).reshape(-1, source.shape[1], source.shape[3])
    if first_row.ndim:
        return jnp.concatenate([decoded(source, scheme, r, rows) for r in first_row], axis=1)
    pick = lambda x: lax.dynamic_slice_in_dim(x, first_row, rows, 0)  # noqa: E731
    if not isinstance(source, Encoded):
        return pick(source).astype(jnp.float32)
    codes_nTC, scales_nTG = pick(source.codes_RTC), pick(source.scales_RTG)
    n, t, c = codes_nTC.shape
    bit = np.arange(8 * c // scheme.bits) * scheme.bits
    byte, inside = bit // 8, jnp.asarray(bit % 8, jnp.uint16)[None, None]
    # Codes of 3 bits may begin in one byte and end in the next.
    wide = codes_nTC.astype(jnp.uint16)
    word = (wide[..., byte] << 8) | wide[..., np.minimum(byte + 1, c - 1)]
    codes = (word >> (16 - scheme.bits - inside)) & (2**scheme.bits - 1)
    scales = lax.bitcast_convert_type(scales_nTG, jnp.float8_e4m3fn).astype(jnp.float32)
    if source.exponents_R is not None:
        scales *= jnp.exp2(pick(source.exponents_R).astype(jnp.float32))[:, None, None]
    levels = codes.reshape(n, t, -1, scheme.group).astype(jnp.float32) - scheme.offset
    x_nTD = (levels * scales[..., None]).reshape(n, t, -1)
    if scheme.stages:
        ids, tables = pick(source.ids_RST).astype(jnp.int32), source.tables(first_row, rows)
        for s in range(scheme.stages):
            x_nTD += jax.vmap(lambda c, i: c[i])(tables[:, s], ids[:, s])
    return x_nTD


def cut(x_RTD: Array, window: tuple[Array, int]) -> Array:
    """Some tokens of x; beyond the last one, the last one again."""
    start, tokens = window
    token_T = start + jnp.arange(tokens)
    return jnp.take(x_RTD, jnp.minimum(token_T, x_RTD.shape[1] - 1), axis=1)


def table_rows(tables: tuple[Array, Array], first: Array, batch: int) -> tuple[Array, Array]:
    """The tables of `batch` rows from `first` on; those of several spans behind each other."""
    if first.ndim:
        parts = [table_rows(tables, f, batch) for f in first]
        return tuple(jnp.concatenate(p, axis=1) for p in zip(*parts, strict=True))
    return tuple(lax.dynamic_slice_in_dim(t, first, batch, 0) for t in tables)


def rotated(x_nTD: Array, tables: tuple[Array, Array] | None, pairing: str) -> Array:
    """x turned by cosines and sines (B, T, D / 2); n is a multiple of B."""
    if tables is None:
        return x_nTD
    n, t, d = x_nTD.shape
    x = x_nTD.reshape(tables[0].shape[0], -1, t, d)
    cos, sin = (table_BTd[:, None] for table_BTd in tables)
    half = (x[..., : d // 2], x[..., d // 2 :])
    x1, x2 = half if pairing == "half" else (x[..., ::2], x[..., 1::2])
    y1, y2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
    y = jnp.concatenate([y1, y2], -1) if pairing == "half" else jnp.stack([y1, y2], -1)
    return y.reshape(n, t, d)


def _filled(x_nTD: Array, valid: Array, room: int = 0) -> Array:
    """Zeros behind the valid tokens, up to the size of the workspace."""
    t = x_nTD.shape[1]
    x_nTD = jnp.where((jnp.arange(t) < valid)[None, :, None], x_nTD, 0)
    return jnp.pad(x_nTD, ((0, 0), (0, padded(t + room) - t), (0, 0)))


def laid_into(workspace: Array, x: Array, at: Array, valid: Array, axis: int) -> Array:
    """The workspace with x in place of its tokens from `at` on: valid ones, then zeros to a `PAD`."""
    token = jnp.arange(workspace.shape[axis]) - at
    new = jnp.take(x, token, axis=axis, mode="fill", fill_value=0)
    own = (token >= 0) & (token < -(-(at + valid) // PAD) * PAD - at)
    return jnp.where(own[:, None] if axis == 1 else own, new, workspace)


def decode_keys(source, scheme, first_row, rows, valid, dtype, unit_n, tables, pairing, room=0):
    """See `api.decode_keys`; here `tables` are those of the decoded rows."""
    x = rotated(decoded(source, scheme, first_row, rows), tables, pairing)
    x = _filled(x, valid, room)
    if dtype == jnp.bfloat16:
        return x.astype(dtype)
    return in_key_rows(jnp.clip(x / unit_n[:, None, None], -448, 448).astype(dtype))


def decode_values(source, scheme, first_row, rows, valid, dtype, unit_n, room=0):
    """See `api.decode_values`."""
    x = _filled(decoded(source, scheme, first_row, rows), valid, room)
    if dtype == jnp.bfloat16:
        return x.astype(dtype)
    return jnp.clip(x / unit_n[:, None, None], -448, 448).astype(dtype).swapaxes(1, 2)
