"""What the k-means kernels return, and their sizes on Hopper."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float, Int

__all__ = ["HEAD_DIM", "TILE", "Metric", "Sums", "Tuning"]

HEAD_DIM = 128  # the head dim that the Hopper kernels read
TILE = 128  # tokens that a CTA assigns at once


class Sums(NamedTuple):
    """The sum and the number of every cluster's tokens, and the cluster and the score of every token.

    `ids_RT` and `score_RT` are None unless asked for.
    """

    total_RKD: Float[Array, "R K D"]
    number_RK: Float[Array, "R K"]
    ids_RT: Int[Array, "R T"] | None
    score_RT: Float[Array, "R T"] | None


class Metric(NamedTuple):
    """Distances |(x - c) / size|, with channels divided by their sizes.

    The kernels compute them with another table and other biases, and read tokens as they are. A centre of
    the tokens keeps the numbers of that table small; distances do not depend on it.
    """

    centre_RD: Float[Array, "R D"]
    size_RD: Float[Array, "R D"]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes of the Hopper kernels that do not change the result.

    Attributes:
        stages: tiles of x in flight.
        columns: centroids per product.
        registers: registers of a thread that computes and of a thread that loads.
    """

    stages: int = 4
    columns: int = 128
    registers: tuple[int, int] = (240, 24)
