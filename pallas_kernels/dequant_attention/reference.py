"""The definitions of `visit`, one segment merged into a running softmax, and of `prepare_tokens`.

Axes: P splits, n rows (heads), Q queries, T tokens, D head dim.
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.dequantize.reference import key_row_of_token, rotated
from pallas_kernels.dequantize.types import Rotation

__all__ = ["empty", "grouped", "segment"]

FAR = -1e30


def grouped(q_BTHD: Array, rotation: Rotation | None, batch: int, heads: int) -> Array:
    """Rotated queries (n, Q, D) in q's dtype by the rows of a cache; see `api.prepare_tokens`."""
    rows, tokens, _, d = q_BTHD.shape
    q = jnp.swapaxes(q_BTHD, 1, 2).reshape(rows // batch, batch, heads, -1, tokens, d)
    q = jnp.transpose(q, (1, 2, 0, 3, 4, 5)).reshape(batch, -1, tokens, d)
    x_nTD = q.reshape(-1, tokens, d).astype(jnp.float32)
    if rotation is not None:
        x_nTD = rotated(x_nTD, rotation.cos_sin, rotation.pairing)
    return x_nTD.astype(q_BTHD.dtype).reshape(batch * heads, -1, d)


def empty(splits: int, rows: int, queries: int, head_dim: int) -> tuple[Array, Array, Array]:
    """The state before any key."""
    f32, form = jnp.float32, (splits, rows, queries)
    return jnp.zeros((*form, head_dim), f32), jnp.full(form, FAR, f32), jnp.zeros(form, f32)


def segment(
    q_nQD: Array,
    factor_nQ: Array,
    k_nTD: Array,
    v: Array,
    valid: Array,
    k_unit_n: Array,
    v_unit_n: Array,
    state: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Adds a segment to the first split; what `mosaic_gpu.segment` does up to rounding.

    s = factor k_unit q . k, p = 2^(s - m), out = sum p v, with m the maximum so far.
    """
    f32 = jnp.float32
    if q_nQD.dtype != jnp.bfloat16:
        k_nTD, v = k_nTD[:, key_row_of_token(k_nTD.shape[1])], v.swapaxes(1, 2)
    q, k, v = (x.astype(f32) for x in (q_nQD, k_nTD, v))
    s_nQT = jnp.einsum("nqd,ntd->nqt", q, k, precision="highest")
    s_nQT *= (factor_nQ * k_unit_n[:, None])[..., None]
    s_nQT = jnp.where((jnp.arange(k.shape[1]) < valid)[None, None], s_nQT, FAR)
    acc, top, total = (x[0] for x in state)
    new_top = jnp.maximum(top, s_nQT.max(-1))
    p_nQT = jnp.where(s_nQT > FAR / 2, jnp.exp2(s_nQT - new_top[..., None]), 0)
    fade = jnp.exp2(top - new_top)
    new = jnp.einsum("nqt,ntd->nqd", p_nQT, v, precision="highest") * v_unit_n[:, None, None]
    parts = (acc * fade[..., None] + new, new_top, total * fade + p_nQT.sum(-1))
    return tuple(x.at[0].set(y) for x, y in zip(state, parts, strict=True))
