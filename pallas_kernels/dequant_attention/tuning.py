"""Sizes of the attention kernel on Hopper, and what follows from them."""

import dataclasses
from typing import Any

import jax.numpy as jnp

__all__ = ["LARGEST_QUERY", "Q_TILE", "ROWS", "TUNING", "Config", "Tuning"]

ROWS = 64  # queries of a compute warpgroup
Q_TILE = 2 * ROWS  # queries of a CTA
LARGEST_QUERY = 256  # the largest number of a query in e4m3, which ends at 448

# Accumulators of up to so many channels leave registers for a product of the same size.
_MOST_BESIDE_PRODUCT = 128


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result beyond rounding.

    Attributes:
        tile: keys that meet the queries at once, at most 256.
        stages: tiles of K and of V in flight.
        registers: registers of a thread that computes and of a thread that loads; twice the first
            and once the second are at most 504, which is what three warpgroups start with.
    """

    tile: int
    stages: int
    registers: tuple[int, int] = (232, 40)


# By dtype and head dim. Sizes for 128 are measured; 64 has the same; those for 256 are what registers
# and shared memory hold.
TUNING = {
    "bfloat16": {
        64: Tuning(tile=128, stages=2),
        128: Tuning(tile=128, stages=2),
        256: Tuning(tile=64, stages=2),
    },
    "float8_e4m3fn": {
        64: Tuning(tile=256, stages=2),
        128: Tuning(tile=256, stages=2),
        256: Tuning(tile=128, stages=2, registers=(240, 24)),
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The properties that an attention kernel is specialised to.

    Attributes:
        head_dim: channels of a head.
        dtype: dtype of queries, keys and values, bf16 or e4m3.
        persistent: whether a CTA does one task after another; otherwise it has one task.
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
    def shift(self) -> float:
        """Probabilities are multiplied by 2 ** shift: in e4m3 into the middle of its range."""
        return 8.0 if self.fp8 else 0.0

    @property
    def acc_channels(self) -> int:
        """Channels of an accumulator."""
        return min(self.head_dim, _MOST_BESIDE_PRODUCT) if self.fp8 else self.head_dim

    @property
    def num_accs(self) -> int:
        """Accumulators that hold all channels of a query."""
        return self.head_dim // self.acc_channels

    @property
    def adds_last_product(self) -> bool:
        """Whether the last tile's product has registers of its own, and is added to the accumulator."""
        return self.acc_channels <= _MOST_BESIDE_PRODUCT
