"""What is brought into sight before a block: the spans of the places that it looks at."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from models.pocket_world import camera
from models.pocket_world.config import PocketWorldConfig
from models.pocket_world.pipeline import BlockInput, WorldState
from qvg_jax.cache.recall import recall
from qvg_jax.cache.state import KVCache
from qvg_jax.cache.store import SpanStore

__all__ = ["Recaller"]

_positions = jax.jit(
    jax.vmap(camera.token_positions, (0, None, None)), static_argnums=2
)  # [B, T, 4]


class Recaller:
    """The spans nearest to each block, all others kept in a store: `before` of `qvg_jax.loop.stream`.

    Attributes:
        store: all spans of the walk so far.
        sight: spans that a block reads at most.
    """

    def __init__(
        self,
        cfg: PocketWorldConfig,
        cache: KVCache,
        *,
        sight: int,
        spans: int,
        memory: Literal["host", "device"] = "host",
    ):
        """Makes an empty store for a cache.

        Args:
            cfg: of the model.
            cache: of the walk.
            sight: spans that a block reads; at most the slots of the cache.
            spans, memory: as in `SpanStore.create`.

        Raises:
            ValueError: as in `SpanStore.create`, or more spans in sight than slots.
        """
        if not 1 <= sight <= cache.layout.max_spans:
            raise ValueError(
                f"sight={sight} is not accepted: give 1 to max_spans={cache.layout.max_spans}"
            )
        self.store = SpanStore.create(cache, spans=spans, memory=memory)
        self.sight = sight
        self._patch = cfg.patch
        self._ahead: dict = {}

    def __call__(self, state: WorldState, x: BlockInput) -> WorldState:
        """The state with the spans in sight that are nearest to where the block looks."""
        self.store = self.store.keep(state.cache)
        cache = self._recalled(state.cache, self.near(x.pose, x.time))
        # If the camera moves on like this, the next block needs these; they come while this one is made.
        onward = x.pose + (x.pose[:, -1:] - x.before[:, :1])
        self._ahead = self.store.fetch(self.near(onward, x.time))
        return dataclasses.replace(state, cache=cache)

    def near(self, pose_BF3: np.ndarray, time_F: np.ndarray) -> tuple[int, ...]:
        """Numbers of the spans nearest to the ground that these frames show."""
        positions_BTP = _positions(jnp.asarray(pose_BF3), jnp.asarray(time_F), self._patch)
        return self.store.nearest(np.asarray(positions_BTP), self.sight)

    def _recalled(self, cache: KVCache, ids: tuple[int, ...]) -> KVCache:
        cache, self.store = recall(cache, self.store, ids, self._ahead)
        return cache
