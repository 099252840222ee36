"""Smoothings: transforms that take something predictable out of a span before it is quantized."""

from qvg_jax.smoothing.kmeans import KMeansPacked, KMeansState, kmeans_smoothing

__all__ = ["KMeansPacked", "KMeansState", "kmeans_smoothing"]
