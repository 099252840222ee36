"""Sizes of the attention kernel on Hopper, and what follows from them."""

import dataclasses
from typing import Any

import jax.numpy as jnp

__all__ = ["Q_TILE", "ROWS", "TUNING", "Form", "Tuning"]

ROWS = 64  # queries of a computing warpgroup
Q_TILE = 2 * ROWS  # queries of a CTA
_MOST_BESIDE = 128  # channels of weighted values beside which a product of as many fits


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result beyond rounding.

    Attributes:
        tile: keys that meet the queries at once, at most 256.
        stages: tiles of K and of V in flight.
        registers: of a computing and of a loading thread; twice the first and once the second are
            at most 504, which is what three warpgroups start with.
    """

    tile: int
    stages: int
    registers: tuple[int, int] = (232, 40)


# By dtype and head_dim. Measured at 128; at 64 the same; at 256 what registers and shared memory hold.
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
class Form:
    """What a kernel is made for.

    Attributes:
        head_dim: channels.
        dtype: of queries, keys and values, bf16 or e4m3.
        alone: whether a block of the GPU has one task, or one after another.
        tuning: sizes.
    """

    head_dim: int
    dtype: Any
    alone: bool
    tuning: Tuning

    @property
    def tile(self) -> int:
        return self.tuning.tile

    @property
    def stages(self) -> int:
        return self.tuning.stages

    @property
    def narrow(self) -> bool:
        """Whether it is e4m3."""
        return self.dtype != jnp.bfloat16

    @property
    def shift(self) -> float:
        """Probabilities come times 2 ** shift: in e4m3 into the middle of its range."""
        return 8.0 if self.narrow else 0.0

    @property
    def held(self) -> int:
        """Channels of an accumulator."""
        return min(self.head_dim, _MOST_BESIDE) if self.narrow else self.head_dim

    @property
    def accumulators(self) -> int:
        """How many hold the weighted values of a query."""
        return self.head_dim // self.held

    @property
    def last_apart(self) -> bool:
        """Whether the last tile's product has registers of its own, before it is added."""
        return self.held <= _MOST_BESIDE
