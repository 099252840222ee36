"""What is brought into sight before a block: spans with its field of view, and the frames that they show.

The device runs the program of a short walk: the frames in sight, in order, and the block that reads them.
Between the blocks this module puts other frames into their place: packed spans come from a store in host
memory, latents and cameras from lists. Frames are numbered anew for each block, as the original model
numbers retrieved frames, so positions stay within the RoPE table however long the walk is.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from models.worldplay.block import BlockInput, State
from models.worldplay.config import WorldPlayConfig
from models.worldplay.history import History
from models.worldplay.retrieval import select_spans
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.recall import recall
from qvg_jax.cache.store import SpanStore

__all__ = ["Recaller"]


class Recaller:
    """The spans in sight of each block, all others kept in a store: `before` of `qvg_jax.loop.stream`.

    Attributes:
        store: all spans of the walk so far.
        chosen: numbers of the spans that the last block was given.
    """

    def __init__(
        self,
        config: WorldPlayConfig,
        history: History,
        state: State,
        *,
        frames: int,
        points_N3: Float[np.ndarray, "N 3"],
    ):
        """Makes an empty store for a walk.

        Args:
            config: sizes of the model.
            history: what is remembered, with `sight`.
            state: of the walk, before its first block.
            frames: most latent frames of the walk.
            points_N3: on which fields of view are compared, from `ball_points`.

        Raises:
            ValueError: host memory that does not hold the spans of so many frames.
        """
        self.chosen: tuple[int, ...] = ()
        self._frames, self._history, self._points_N3 = config.frames_per_block, history, points_N3
        spans = max(frames // (history.span_blocks * self._frames), state.cache.layout.max_spans)
        self.store = SpanStore.create(state.cache, spans=spans)
        self._shown: list = []  # (latents, Frames) of each block, on the host
        self._ahead: dict = {}

    def __call__(self, state: State, x: BlockInput) -> State:
        """The state in which the chosen spans and all blocks behind the last span are in sight."""
        if not int(state.blocks):
            return state
        self._shown.append(self._newest(state))
        self.store = self.store.keep(state.cache)
        size, blocks = self._history.span_blocks, len(self._shown)
        count, behind = self._history.spans_in_sight(blocks)
        self.chosen = self.near(x.frames.w2c_BF44[0], count)
        cache, self.store = recall(state.cache, self.store, self.chosen, self._ahead)
        if len(self.chosen) < self.store.next:
            # If the camera moves on like this, the next block needs these; they come while this one is made.
            w2c_F44, before_F44 = (
                np.float64(f.w2c_BF44[0]) for f in (x.frames, self._shown[-1][1])
            )
            onward_F44 = w2c_F44[-1] @ np.linalg.inv(before_F44[-1]) @ w2c_F44
            following = self._history.spans_in_sight(blocks + 1)[0]
            self._ahead = self.store.fetch(self.near(onward_F44, following))
        seen = [i * size + j for i in self.chosen for j in range(size)]
        seen += range(blocks - behind, blocks)
        return self._with_frames(dataclasses.replace(state, cache=self._numbered(cache)), seen)

    def near(self, w2c_F44: Float[np.ndarray, "F 4 4"], count: int) -> tuple[int, ...]:
        """Numbers of the `count` spans that share most of the field of view of these cameras."""
        size, n = self._history.span_blocks, self._frames
        cameras = [frames.w2c_BF44[0] for _, frames in self._shown[: self.store.next * size]]
        return select_spans(
            self._points_N3,
            np.concatenate([np.zeros((0, 4, 4)), *cameras]),
            np.float64(w2c_F44),
            count,
            span_frames=size * n,
            block_frames=n,
        )

    def _newest(self, state: State):
        """Latents and cameras of the newest block, on the host."""
        first, n = (int(state.blocks) - 1) * self._frames, self._frames
        rows = lambda x: np.asarray(lax.dynamic_slice_in_dim(x, first, n, 1))  # noqa: E731
        return jax.tree.map(rows, (state.latents_BFZYX, state.frames))

    def _numbered(self, cache: KVCache) -> KVCache:
        """The cache whose frames count from 0 on: the spans in their order, then the window."""
        lay = cache.layout
        frames = lay.span_blocks * self._frames
        first_S = np.zeros(lay.max_spans, np.int32)
        for slot, number in enumerate(self.store.sight):
            if number in self.chosen:
                first_S[slot] = self.chosen.index(number) * frames
        window = np.int32(len(self.chosen) * frames)
        return _with_numbers(cache, first_S, window, lay.block_tokens // self._frames)

    def _with_frames(self, state: State, blocks: list[int]) -> State:
        """The state that has seen these blocks and nothing else."""

        def filled(buffer, *parts):
            new = np.zeros(buffer.shape, buffer.dtype)
            new[:, : len(parts) * self._frames] = np.concatenate(parts, 1)
            return jnp.asarray(new)

        buffers = (state.latents_BFZYX, state.frames)
        latents, frames = jax.tree.map(filled, buffers, *(self._shown[i] for i in blocks))
        counted = jnp.asarray(len(blocks), jnp.int32)
        return dataclasses.replace(state, latents_BFZYX=latents, frames=frames, blocks=counted)


@functools.partial(jax.jit, static_argnames="tokens", donate_argnames="cache")
def _with_numbers(
    cache: KVCache, first_S: Int[Array, "S"], window: Int[Array, ""], tokens: int
) -> KVCache:
    """The cache whose frames have other numbers, the first component of their positions.

    Args:
        cache: the cache; donated.
        first_S: number of the first frame of the span in each slot.
        window: number of the first frame of the window.
        tokens: of a frame.
    """

    def numbered(pos_BTP, first):
        number_T = first + jnp.arange(pos_BTP.shape[1]) // tokens
        return pos_BTP.at[..., 0].set(number_T.astype(pos_BTP.dtype)[None])

    return dataclasses.replace(
        cache,
        span_pos=jax.vmap(numbered)(cache.span_pos, first_S),
        dense_pos=numbered(cache.dense_pos, window),
    )
