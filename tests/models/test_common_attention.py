"""Attention without a cache: the fused form and the piecewise one agree with the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common import attention
from models.common.attention import dense_attention, fused_attention


def arrays(T=12, U=20, H=2, D=16, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, T, H, D), (2, U, H, D), (2, U, H, D))
    return [
        jax.random.normal(k, shape).astype(dtype) for k, shape in zip(keys, shapes, strict=True)
    ]


def wanted(q, k, v, mask=None):
    logits = np.einsum("bthd,buhd->bhtu", *(np.asarray(x, np.float64) for x in (q, k)))
    logits = logits / np.sqrt(q.shape[-1])
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    weight = weight / weight.sum(-1, keepdims=True)
    return np.einsum("bhtu,buhd->bthd", weight, np.asarray(v, np.float64))


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_fused_attention_is_attention(implementation, strict_dtypes):
    q, k, v = arrays()
    mask = jnp.tril(jnp.ones((1, 1, 12, 20), bool), 3)
    for m in (None, mask):
        got = fused_attention(q, k, v, m, implementation=implementation)
        np.testing.assert_allclose(got, wanted(q, k, v, m), rtol=0, atol=2e-6)
    half = fused_attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), wanted(q, k, v), rtol=0, atol=0.03)


def test_pieces_change_nothing():
    q, k, v = arrays(T=13)
    got = dense_attention(q, k, v, logits_bytes=4 * 2 * 2 * 20 * 3)
    np.testing.assert_allclose(got, wanted(q, k, v), rtol=0, atol=2e-6)


def test_where_cudnn_fails_the_default_does_without(monkeypatch):
    """Also in the middle of a trace, where the trial must run at once."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention.cudnn_works.cache_clear()
    q, k, v = arrays(D=8, dtype=jnp.bfloat16)
    got = jax.jit(fused_attention)(q, k, v)
    assert attention.cudnn_works.cache_info().misses == 1
    np.testing.assert_allclose(got.astype(jnp.float32), wanted(q, k, v), rtol=0, atol=0.03)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        jax.block_until_ready(fused_attention(q, k, v, implementation="cudnn"))
    attention.cudnn_works.cache_clear()
