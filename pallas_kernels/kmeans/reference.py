"""The definition of `kmeans_sums` in plain JAX.

Axes: R rows (batch and heads), T tokens, D head dim, K centroids.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

__all__ = ["bias_of", "kmeans_sums", "nearest"]


def bias_of(c_RKD: Array) -> Array:
    """-|c|^2 / 2 in float32."""
    c_RKD = c_RKD.astype(jnp.float32)
    return -jnp.sum(c_RKD * c_RKD, axis=-1) / 2


def nearest(x_RTD: Array, c_RKD: Array) -> tuple[Array, Array]:
    """ids (int32) of the nearest centroids, the first on ties, and x . c - |c|^2 / 2 (float32)."""

    def one(x_TD: Array, c_KD: Array, bias_K: Array) -> tuple[Array, Array]:
        x_TD, c_KD = x_TD.astype(jnp.float32), c_KD.astype(jnp.float32)
        score_TK = jnp.dot(x_TD, c_KD.T, precision=lax.Precision.HIGHEST) + bias_K[None]
        return jnp.argmax(score_TK, axis=1).astype(jnp.int32), jnp.max(score_TK, axis=1)

    # One row at a time: scores of all of them may be gigabytes.
    return lax.map(lambda row: one(*row), (x_RTD, c_RKD, bias_of(c_RKD)))


def kmeans_sums(x_RTD: Array, c_RKD: Array) -> tuple[Array, Array, Array, Array]:
    """Sums and numbers of the tokens of each cluster, float32; their ids and scores."""
    ids_RT, score_RT = nearest(x_RTD, c_RKD)
    clusters = c_RKD.shape[1]

    def one(x_TD: Array, ids_T: Array) -> tuple[Array, Array]:
        hot_TK = jax.nn.one_hot(ids_T, clusters, dtype=jnp.float32)
        total_KD = jnp.dot(hot_TK.T, x_TD.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        return total_KD, hot_TK.sum(0)

    total_RKD, number_RK = lax.map(lambda row: one(*row), (x_RTD, ids_RT))
    return total_RKD, number_RK, ids_RT, score_RT
