"""The definitions of `visit`, one segment merged into a running softmax, and of `prepare_tokens`.

Axes: P splits, n rows (heads), Q queries, T tokens, D head dim.
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.dequantize.reference import key_row_of_token, rotated
from pallas_kernels.dequantize.types import Rotation

__all__ = ["MASK_VALUE", "empty", "grouped", "segment"]

MASK_VALUE = -1e30  # logit of a key that does not count; finite, so that differences are no NaN


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
    """The state (acc, m, l) before any key."""
    f32, shape = jnp.float32, (splits, rows, queries)
    return (
        jnp.zeros((*shape, head_dim), f32),
        jnp.full(shape, MASK_VALUE, f32),
        jnp.zeros(shape, f32),
    )


def segment(
    q_nQD: Array,
    logits_scale_nQ: Array,
    k_nTD: Array,
    v: Array,
    valid: Array,
    k_scale_n: Array,
    v_scale_n: Array,
    state: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """The state after a segment, all of which is added to the first split.

    `mosaic_gpu.segment` gives the same up to rounding. With m the largest logit so far,

        s = logits_scale k_scale q . k,  p = 2^(s - m),  acc = v_scale sum p v,  l = sum p.
    """
    f32 = jnp.float32
    if q_nQD.dtype != jnp.bfloat16:
        k_nTD, v = k_nTD[:, key_row_of_token(k_nTD.shape[1])], v.swapaxes(1, 2)
    q, k, v = (x.astype(f32) for x in (q_nQD, k_nTD, v))
    s_nQT = jnp.einsum("nqd,ntd->nqt", q, k, precision="highest")
    s_nQT *= (logits_scale_nQ * k_scale_n[:, None])[..., None]
    s_nQT = jnp.where((jnp.arange(k.shape[1]) < valid)[None, None], s_nQT, MASK_VALUE)
    acc, m, l = (x[0] for x in state)
    m_new = jnp.maximum(m, s_nQT.max(-1))
    p_nQT = jnp.where(s_nQT > MASK_VALUE / 2, jnp.exp2(s_nQT - m_new[..., None]), 0)
    alpha = jnp.exp2(m - m_new)
    new = jnp.einsum("nqt,ntd->nqd", p_nQT, v, precision="highest") * v_scale_n[:, None, None]
    parts = (acc * alpha[..., None] + new, m_new, l * alpha + p_nQT.sum(-1))
    return tuple(x.at[0].set(y) for x, y in zip(state, parts, strict=True))
