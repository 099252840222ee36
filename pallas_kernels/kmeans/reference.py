"""The definition of `kmeans_sums` in plain JAX.

Axes: R rows (batch and heads), T tokens, D head dim, K centroids.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.kmeans.types import Metric

__all__ = ["kmeans_sums", "nearest", "table_of"]


def table_of(c_RKD: Array, metric: Metric | None = None) -> tuple[Array, Array]:
    """The table t (bfloat16) and the biases b (float32) of scores x . t + b, which are largest at the nearest.

    t = c and b = -|c|^2 / 2; with a metric t = (c - centre) / size^2 and
    b = -|t size|^2 / 2 - centre . t. Biases are those of the rounded table.
    """
    if metric is None:
        table_RKD = c_RKD.astype(jnp.bfloat16)
        c_RKD = table_RKD.astype(jnp.float32)
        return table_RKD, -jnp.sum(c_RKD * c_RKD, axis=-1) / 2
    centre_R1D, size_R1D = (x[:, None] for x in metric)
    away_RKD = (c_RKD.astype(jnp.float32) - centre_R1D) / size_R1D
    table_RKD = (away_RKD / size_R1D).astype(jnp.bfloat16)
    t_RKD = table_RKD.astype(jnp.float32)
    scaled_RKD = t_RKD * size_R1D
    bias_RK = -jnp.sum(scaled_RKD * scaled_RKD, axis=-1) / 2
    return table_RKD, bias_RK - jnp.sum(centre_R1D * t_RKD, axis=-1)


def nearest(x_RTD: Array, c_RKD: Array, metric: Metric | None = None) -> tuple[Array, Array]:
    """ids (int32) of the nearest centroids, the first on ties, and their scores (float32), see `table_of`."""

    def one(x_TD: Array, c_KD: Array, bias_K: Array) -> tuple[Array, Array]:
        x_TD, c_KD = x_TD.astype(jnp.float32), c_KD.astype(jnp.float32)
        score_TK = jnp.dot(x_TD, c_KD.T, precision=lax.Precision.HIGHEST) + bias_K[None]
        return jnp.argmax(score_TK, axis=1).astype(jnp.int32), jnp.max(score_TK, axis=1)

    # One row at a time: scores of all of them may be gigabytes.
    return lax.map(lambda row: one(*row), (x_RTD, *table_of(c_RKD, metric)))


def kmeans_sums(
    x_RTD: Array, c_RKD: Array, metric: Metric | None = None
) -> tuple[Array, Array, Array, Array]:
    """Sums and numbers of the tokens of each cluster, float32; their ids and scores."""
    ids_RT, score_RT = nearest(x_RTD, c_RKD, metric)
    clusters = c_RKD.shape[1]

    def one(x_TD: Array, ids_T: Array) -> tuple[Array, Array]:
        hot_TK = jax.nn.one_hot(ids_T, clusters, dtype=jnp.float32)
        total_KD = jnp.dot(hot_TK.T, x_TD.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        return total_KD, hot_TK.sum(0)

    total_RKD, number_RK = lax.map(lambda row: one(*row), (x_RTD, ids_RT))
    return total_RKD, number_RK, ids_RT, score_RT
