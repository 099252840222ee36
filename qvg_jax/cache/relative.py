"""Time that counts back from the block that reads, so that a video may outlast its positions.

    view = cache.view(positions_BTP, rope, relative=RelativeTime(horizon=1000))

A rotary embedding sees differences of positions only. So all times of a view may move by the same
amount, and what a model never saw, a difference beyond those of its training or of its table, can be
kept from it: a token older than the horizon is read as if it were as old as the horizon. The cache
keeps K before RoPE, with the true positions, and nothing stored changes.

Source: the idea is that of Infinity-RoPE (arXiv 2511.20649), whose caches hold rotated keys that must be
turned again.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Moves", "RelativeTime"]


@dataclasses.dataclass(frozen=True)
class RelativeTime:
    """Positions whose time counts back from the reading block, no further than a horizon.

    Up to the horizon times stay as they are. Later ones move back, so that the first new token is always
    at `horizon` and no token is below 0; hence positions from 0 to horizon and a block, whatever the
    length of the video. Stored tokens beyond the horizon stand on it. The sink moves as one: its first
    token stops at the horizon, and the distances within it stay.

    Attributes:
        horizon: oldest age that a stored token is read with, in units of time; at least the times of one
            block.
        component: of the positions that is time.
        period: if given, a token beyond the horizon comes nearer by whole periods, and so keeps its phase:
            for models whose world has a clock. It is then younger than the horizon by less than one period.

    Raises:
        ValueError: a horizon or period that is not a finite number above 0, a period above the horizon, or a
            negative component.
    """

    horizon: float
    component: int = 0
    period: float | None = None

    def __post_init__(self):
        for name in ("horizon", "period"):
            value = getattr(self, name)
            if name == "period" and value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name}={value!r} is not accepted: give a finite number > 0")
        if self.period is not None and self.period > self.horizon:
            raise ValueError(
                f"period={self.period} is longer than horizon={self.horizon}: a token that keeps its "
                "phase needs a whole period in sight; give a longer horizon"
            )
        if isinstance(self.component, bool) or not isinstance(self.component, int):
            raise ValueError(f"component={self.component!r} is not accepted: give an integer >= 0")
        if self.component < 0:
            raise ValueError(f"component={self.component} is not accepted: give an integer >= 0")

    def check(self, block: float) -> None:
        """Raises ValueError if the horizon is shorter than a block of so many units of time."""
        if self.horizon < block:
            raise ValueError(
                f"horizon={self.horizon:g} is shorter than a block of {block:g} by its positions: the block "
                f"before would be out of its place; accepted: at least {block:g}"
            )

    def moves(
        self, new_BTP: Float[Array, "B T P"], first_BP: Float[Array, "B P"] | None
    ) -> "Moves":
        """How far times move for a block that reads.

        Args:
            new_BTP: positions of its tokens, the first one first in time.
            first_BP: position of the sink's first token; None without a sink.
        """
        here_B = new_BTP[:, 0, self.component]
        back_B = jnp.maximum(here_B - self.horizon, 0)
        floor_B = here_B - back_B - self.horizon
        lift_B = None
        if first_BP is not None:
            lift_B = self._lift(floor_B - (first_BP[:, self.component] - back_B))
        return Moves(back_B, floor_B, lift_B)

    def _lift(self, below: Array) -> Array:
        """By how much a time rises that is so far below the horizon."""
        below = jnp.maximum(below, 0)
        return below if self.period is None else jnp.ceil(below / self.period) * self.period

    def new(self, pos_BTP: Array, moves: "Moves") -> Array:
        """Positions of new tokens as the view rotates by them."""
        return pos_BTP.at[..., self.component].add(-moves.back_B[:, None])

    def stored(self, pos_xBTP: Array, moves: "Moves", in_sink_T: Array | None = None) -> Array:
        """Positions of stored tokens as the view rotates by them; `in_sink_T` says which are the sink's."""
        time_xBT = pos_xBTP[..., self.component]
        beside = lambda x_B: x_B.reshape(*(1,) * (time_xBT.ndim - 2), -1, 1)  # noqa: E731
        time_xBT = time_xBT - beside(moves.back_B)
        lift_xBT = self._lift(beside(moves.floor_B) - time_xBT)
        if in_sink_T is not None and moves.lift_B is not None:
            in_sink = in_sink_T.reshape(*(1,) * (time_xBT.ndim - 1), -1)
            lift_xBT = jnp.where(in_sink, beside(moves.lift_B), lift_xBT)
        return pos_xBTP.at[..., self.component].set(time_xBT + lift_xBT)


class Moves(NamedTuple):
    """How far times move for one block that reads, for each row of the batch."""

    back_B: Array  # what is taken off all times
    floor_B: Array  # the lowest time after that: the horizon
    lift_B: Array | None  # what is added to the sink's; None without a sink
