"""One iteration of k-means: sums of the tokens nearest to each centroid."""

from pallas_kernels.kmeans.api import assign, kmeans_sums, supported
from pallas_kernels.kmeans.types import Metric, Sums, Tuning

__all__ = ["Metric", "Sums", "Tuning", "assign", "kmeans_sums", "supported"]
