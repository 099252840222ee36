"""What is brought into sight before a block: spans with its field of view, from a store of all of them."""

import numpy as np
from jaxtyping import Float

from models.self_forcing.block import State
from models.worldplay.cameras import STEP
from models.worldplay.retrieval import ball_points, select_spans
from qvg_jax.cache.recall import recall
from qvg_jax.cache.state import KVCache
from qvg_jax.cache.store import SpanStore

__all__ = ["Recaller", "world_to_camera"]

POINTS = 50_000


def world_to_camera(motion_F44: Float[np.ndarray, "F 4 4"]) -> Float[np.ndarray, "F 4 4"]:
    """World-to-camera matrices of latent frames from the motions into them.

    The scale of LingBot's poses is not known: the longest step of a walk counts as one of WorldPlay's, whose fields
    of view are compared.
    """
    at, poses = np.eye(4), []
    for motion in motion_F44:
        step = np.array(motion, np.float64)
        step[:3, 3] *= STEP
        at = at @ step
        poses.append(at)
    return np.linalg.inv(np.stack(poses))


class Recaller:
    """The spans with the field of view of each block: `before` of `qvg_jax.loop.stream`.

    Attributes:
        store: all spans of the walk so far.
        chosen: numbers of the spans that the last block was given.
    """

    def __init__(self, cache: KVCache, w2c_F44: Float[np.ndarray, "F 4 4"], block_frames: int):
        """Makes an empty store for the whole walk, in host memory.

        Args:
            cache: of the walk, whose oldest span makes room. A block of it is one latent frame.
            w2c_F44: world to camera, of all frames of the walk.
            block_frames: latent frames that are denoised together.

        Raises:
            ValueError: host memory that does not hold the spans of the walk.
        """
        lay = cache.layout
        spans = max(len(w2c_F44) // lay.span_blocks, lay.max_spans)
        self.store = SpanStore.create(cache, spans=spans)
        self.chosen: tuple[int, ...] = ()
        self._w2c_F44, self._n, self._blocks = w2c_F44, block_frames, 0
        self._points_N3 = ball_points(np.random.default_rng(0), POINTS)
        self._ahead: dict = {}

    def __call__(self, state: State, x: object) -> State:
        """The state with the spans in sight that share most of the block's field of view."""
        self.store = self.store.keep(state.cache)
        self.chosen = self.near(self._blocks)
        cache, self.store = recall(state.cache, self.store, self.chosen, self._ahead)
        self._blocks += 1
        self._ahead = self.store.fetch(
            self.near(self._blocks)
        )  # they come while this block is made
        return State(cache=cache, text_kv=state.text_kv, sink_average=state.sink_average)

    def near(self, block: int) -> tuple[int, ...]:
        """Numbers of the spans that share most of the field of view of a block, as many as have room."""
        lay, n = self.store.layout, self._n
        queries_Q44 = self._w2c_F44[block * n : (block + 1) * n]
        first, size = lay.sink_blocks, lay.span_blocks
        if not len(queries_Q44):
            return ()
        return select_spans(
            self._points_N3,
            self._w2c_F44[first : first + self.store.next * size],
            queries_Q44,
            lay.max_spans,
            span_frames=size,
            block_frames=n if size % n == 0 else size,
        )
