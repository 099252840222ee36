"""Small functions that transformers of the Wan family share; each rounds once, at its end.

Statistics of norms and activation functions run in float32 whatever the dtype of the activations.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def standardise(x: Float[Array, "*rows M"], eps: float) -> Float[Array, "*rows M"]:
    """(x - mean) / sqrt(var + eps) over the last axis, float32 (biased variance)."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def rms_norm(
    x: Float[Array, "*rows M"], weight_M: Float[Array, "M"], eps: float
) -> Float[Array, "*rows M"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, rounded to x's dtype, then times the weight."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight_M.reshape((1,) * (x.ndim - 1) + (-1,))


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(x)."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU in its tanh form."""
    return jax.nn.gelu(x.astype(jnp.float32)).astype(x.dtype)
