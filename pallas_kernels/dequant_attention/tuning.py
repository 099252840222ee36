"""Sizes of the attention kernel on Hopper, and what follows from them."""

import dataclasses
from typing import Any

import jax.numpy as jnp

__all__ = ["Q_TILE", "ROWS", "TUNING", "Config", "Tuning", "largest_query"]

ROWS = 64  # queries of a compute warpgroup
Q_TILE = 2 * ROWS  # queries of a CTA

# Accumulators of up to so many channels leave registers for a product of the same size.
_MOST_BESIDE_PRODUCT = 128


def largest_query(head_dim: int) -> float:
    """The largest number of a query in e4m3: products with keys, up to 448, stay below float16's 65,504."""
    return 128 / head_dim


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result beyond rounding.

    Attributes:
        tile: keys that meet the queries at once, at most 256.
        stages: tiles of K and of V in flight.
        registers: registers of a thread that computes and of a thread that loads; twice the first
            and once the second are at most 504, which is what three warpgroups start with.
        first_apart: whether the first tile's logits and probabilities come before the loop over tiles; otherwise
            it is a step of the loop, under conditions, and the compiler finds registers for all.
    """

    tile: int
    stages: int
    registers: tuple[int, int] = (232, 40)
    first_apart: bool = True


# By dtype and head dim. Sizes for 128 are measured; 64 has the same; those for 256 are what registers
# and shared memory hold. Where the first tile goes is measured for all.
TUNING = {
    "bfloat16": {
        64: Tuning(tile=128, stages=2),
        128: Tuning(tile=128, stages=2),
        256: Tuning(tile=64, stages=2),
    },
    "float8_e4m3fn": {
        64: Tuning(tile=256, stages=2),
        128: Tuning(tile=256, stages=2, first_apart=False),
        256: Tuning(tile=128, stages=2, first_apart=False),
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The properties that an attention kernel is specialised to.

    Attributes:
        head_dim: channels of a head.
        dtype: dtype of queries, keys and values, bf16 or e4m3.
        persistent: whether a CTA does one task after another; otherwise it has one task. Not in e4m3.
        tuning: sizes.
    """

    head_dim: int
    dtype: Any
    persistent: bool
    tuning: Tuning

    @property
    def tile(self) -> int:
        """Keys of a tile."""
        return self.tuning.tile

    @property
    def stages(self) -> int:
        """Tiles of K and of V in flight."""
        return self.tuning.stages

    @property
    def fp8(self) -> bool:
        """Whether queries, keys and values are e4m3."""
        return self.dtype != jnp.bfloat16

    @property
    def ones(self) -> int:
        """Rows of ones below the values in e4m3: their products are the sums of the probabilities."""
        return 8 if self.fp8 else 0

    @property
    def acc_channels(self) -> int:
        """Channels of an accumulator."""
        return min(self.head_dim, _MOST_BESIDE_PRODUCT) if self.fp8 else self.head_dim

    @property
    def num_accs(self) -> int:
        """Accumulators that hold all channels of a query."""
        return self.head_dim // self.acc_channels

    def channels(self, c: int) -> slice:
        """The channels of accumulator c among all of a query."""
        return slice(c * self.acc_channels, (c + 1) * self.acc_channels)

    def columns(self, c: int) -> int:
        """Columns of accumulator c: channels, and in the last one the sums."""
        return self.acc_channels + (self.ones if c == self.num_accs - 1 else 0)

    @property
    def adds_last_product(self) -> bool:
        """Whether the last tile's product has registers of its own, and is added to the accumulator."""
        return self.acc_channels <= _MOST_BESIDE_PRODUCT
