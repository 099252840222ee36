"""Smoothings: transforms that take something predictable out of a span before it is quantized."""

from qvg_jax.codecs.smoothing.klt import KLTPacked, klt_rotation
from qvg_jax.codecs.smoothing.kmeans import KMeansPacked, KMeansState, kmeans_smoothing
from qvg_jax.codecs.smoothing.low_rank import LowRankPacked, low_rank_smoothing
from qvg_jax.codecs.smoothing.rotation import rotation

__all__ = [
    "KLTPacked",
    "KMeansPacked",
    "KMeansState",
    "LowRankPacked",
    "klt_rotation",
    "kmeans_smoothing",
    "low_rank_smoothing",
    "rotation",
]
