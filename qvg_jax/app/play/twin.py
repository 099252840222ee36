"""A second memory of the same walk, in bf16, that makes the same blocks: what compression costs, side by side."""

import dataclasses

from qvg_jax.app.play.walk import Seen, Walk, World

__all__ = ["Twin"]


class Twin:
    """The walk as bf16 would remember it. It follows the other one block by block, when there is time.

    Attributes:
        seen: the last block, None before the first.
    """

    def __init__(self, world: World, seed: int):
        """Compiles nothing yet."""
        self._walk = Walk(dataclasses.replace(world, truth=None), seed=seed, codec="bf16")
        self.seen: Seen | None = None

    @property
    def blocks(self) -> int:
        """Blocks that it has made."""
        return self._walk.blocks

    def restart(self, seed: int) -> None:
        """Begins in front of the tour of a world."""
        self._walk.restart(seed)
        self.seen = None

    def follow(self, actions: list[str]) -> Seen:
        """Makes its next block.

        Args:
            actions: of all blocks behind the tour that the other walk has made; more of them than here.
        """
        tour = self._walk.world.tour_blocks
        if self.blocks < tour:
            self.seen = next(self._walk.tour())
        else:
            self.seen = self._walk.step(actions[self.blocks - tour])
        return self.seen
