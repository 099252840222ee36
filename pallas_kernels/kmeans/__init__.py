"""One iteration of k-means: sums of the tokens nearest to each centroid."""

from pallas_kernels.kmeans.api import Sums, kmeans_sums, supported

__all__ = ["Sums", "kmeans_sums", "supported"]
