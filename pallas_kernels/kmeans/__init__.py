"""One iteration of k-means: sums of the tokens nearest to each centroid."""

from pallas_kernels.kmeans.api import kmeans_sums, supported
from pallas_kernels.kmeans.types import Sums, Tuning

__all__ = ["Sums", "Tuning", "kmeans_sums", "supported"]
