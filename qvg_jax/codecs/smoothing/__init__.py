"""Smoothings: transforms that take something predictable out of a span before it is quantized."""

from qvg_jax.codecs.smoothing.channel_scale import ChannelScalePacked, channel_scale
from qvg_jax.codecs.smoothing.klt import KLTPacked, klt_rotation
from qvg_jax.codecs.smoothing.kmeans import KMeansPacked, KMeansState, kmeans_smoothing
from qvg_jax.codecs.smoothing.low_rank import LowRankPacked, low_rank_smoothing
from qvg_jax.codecs.smoothing.mean import MeanPacked, mean_smoothing
from qvg_jax.codecs.smoothing.rotation import rotation

__all__ = [
    "ChannelScalePacked",
    "KLTPacked",
    "KMeansPacked",
    "KMeansState",
    "LowRankPacked",
    "MeanPacked",
    "channel_scale",
    "klt_rotation",
    "kmeans_smoothing",
    "low_rank_smoothing",
    "mean_smoothing",
    "rotation",
]
