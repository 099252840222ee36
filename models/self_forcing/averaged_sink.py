"""A sink that is a running average of the frames that leave the window, as in Reward-Forcing.

It lies right before the oldest frame of the window wherever that is, so that its distance to the
queries does not grow. Keys are stored before RoPE, so that both are changes of data.

Source: Reward Forcing, github.com/JaydenLyh/Reward-Forcing, "EMA sink".
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qvg_jax.cache.operations import KVCache

__all__ = ["absorb_oldest", "before_the_window"]


def absorb_oldest(cache: KVCache, average: float) -> KVCache:
    """The cache with the frame that the next one will overwrite averaged into the sink.

    sink = average sink + (1 - average) frame, for K and V; frames of the sink take turns. A window that
    still has room gives nothing away.

    Args:
        cache: a window without compressed spans, whose blocks are frames.
        average: how much of the sink stays.
    """
    lay = cache.layout
    full = cache.dense_blocks >= lay.dense_blocks
    oldest = lay.sink_blocks + cache.dropped_blocks % lay.window_blocks
    turn = cache.dropped_blocks % lay.sink_blocks

    def averaged(x_LBHTD: Array) -> Array:
        def frame(block: Array) -> Array:
            start = block * lay.block_tokens
            return lax.dynamic_slice_in_dim(x_LBHTD, start, lay.block_tokens, 3)

        old, leaving = frame(turn), frame(oldest)
        mean = average * old.astype(jnp.float32) + (1 - average) * leaving.astype(jnp.float32)
        new = jnp.where(full, mean.astype(x_LBHTD.dtype), old)
        return lax.dynamic_update_slice_in_dim(x_LBHTD, new, turn * lay.block_tokens, 3)

    return dataclasses.replace(
        cache, dense_k=averaged(cache.dense_k), dense_v=averaged(cache.dense_v)
    )


def before_the_window(cache: KVCache) -> KVCache:
    """The cache with the frames of its sink at the positions right before the oldest frame of the window."""
    lay = cache.layout
    frame_F = cache.seen_blocks - cache.dense_blocks + jnp.arange(lay.sink_blocks)
    frame_T = jnp.repeat(frame_F, lay.block_tokens).astype(cache.dense_pos.dtype)
    pos = cache.dense_pos.at[:, : frame_T.shape[0], 0].set(frame_T[None])
    return dataclasses.replace(cache, dense_pos=pos)
