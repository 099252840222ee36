"""The transformer without a cache: all frames at once, with a mask between latent frames.

This is how the model is trained (and how causality is checked): what a cached, block-by-block
generation sees, written as a mask. All masks are [query frame, key frame], True where seen.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.common.attention import fused_attention
from models.common.tokens import token_positions
from models.common.wan_text import TextKV
from models.self_forcing.modeling import Output, SelfForcingDiT
from models.self_forcing.rope import model_rope


def block_of_frame(blocks: Sequence[int]) -> np.ndarray:
    """Index of the block of each frame, for blocks of the given numbers of frames."""
    return np.repeat(np.arange(len(blocks)), blocks)


def block_causal_mask(blocks: Sequence[int], window: int | None = None) -> np.ndarray:
    """Every frame sees its whole block and all blocks before it.

    Args:
        blocks: frames per block, e.g. (3, 3, 3), or (1, 3, 3) for a first frame of its own.
        window: if given, only frames less than `window` frames before the end of the block.
    """
    block = block_of_frame(blocks)
    seen = block[:, None] >= block[None, :]
    if window is not None:
        end = np.cumsum(blocks)[block]
        seen &= np.arange(len(block))[None, :] >= end[:, None] - window
    return seen


def teacher_forcing_mask(blocks: Sequence[int]) -> np.ndarray:
    """For the sequence [clean frames, noisy frames], both of the same blocks.

    Clean frames are block-causal among themselves; a noisy block sees itself and the clean blocks
    before it.
    """
    block = block_of_frame(blocks)
    clean = block[:, None] >= block[None, :]
    before, itself = block[:, None] > block[None, :], block[:, None] == block[None, :]
    return np.block([[clean, np.zeros_like(clean)], [before, itself]])


def dense_forward(
    model: SelfForcingDiT,
    x_BFZYX: Float[Array, "B F Z Y X"],
    t: Float[Array, "..."],
    text_kv: TextKV,
    *,
    frames: Int[np.ndarray, "F"] | None = None,
    mask: np.ndarray | None = None,
    keep_kv: bool = False,
) -> Output:
    """One forward pass over whole sequences, attention over all tokens at once.

    Args:
        model: the transformer.
        x_BFZYX: noisy latents.
        t: timesteps, as the model takes them.
        text_kv: from `model.text_kv`.
        frames: RoPE position of each frame; default 0..F-1.
        mask: bool [F, F], from the functions above; default: everything sees everything.
        keep_kv: also return K (before RoPE) and V.
    """
    B, F, _, Y, X = x_BFZYX.shape
    rows, columns = model.config.grid(Y, X)
    positions_TP = token_positions(np.arange(F) if frames is None else frames, rows, columns)
    rope = model_rope(model.config)
    table = rope.table(jnp.broadcast_to(positions_TP[None], (B, *positions_TP.shape)))
    if mask is not None:
        if mask.shape != (F, F):
            raise ValueError(f"mask has shape {mask.shape}; accepted: one row per frame, {(F, F)}")
        mask = jnp.asarray(np.repeat(np.repeat(mask, rows * columns, 0), rows * columns, 1))
        mask = mask[None, None]

    def rotated(x_BTHD):
        return jnp.swapaxes(rope.rotate(jnp.swapaxes(x_BTHD, 1, 2), table), 1, 2)

    def attention(q_BTHD, k_BTHD, v_BTHD, _):
        return fused_attention(rotated(q_BTHD), rotated(k_BTHD), v_BTHD, mask)

    return model(x_BFZYX, t, text_kv, attention, keep_kv=keep_kv)
