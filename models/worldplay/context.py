"""The context pass: K and V of clean frames that see each other, all of them, both ways.

Before a block is denoised, the frames it will look back at go through the network together. How
many they are is data: arrays are made for the most there can be, and loops run over the blocks of
frames that are there, so the cost is that of the frames and the program is always the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from models.common.wan_text import TextKV
from models.worldplay.attention import Running
from models.worldplay.encoding import (
    Here,
    decode_outputs,
    encode_keys,
    encode_queries,
    encode_values,
)
from models.worldplay.modeling import WorldPlayDiT


class ContextKV(NamedTuple):
    """K and V of the pass before any positional transform: of all its frames or of one block."""

    k_LBTHD: Float[Array, "L B T H D"]
    v_LBTHD: Float[Array, "L B T H D"]


def context_kv(
    model: WorldPlayDiT,
    x_BFZYX: Float[Array, "B F Z Y X"],
    t: Float[Array, ""] | float,
    actions_BF: Num[Array, "B F"],
    at: Here,
    text_kv: TextKV,
    blocks: Int[Array, ""],
    *,
    last_only: bool,
) -> ContextKV:
    """Runs the first `blocks` blocks of frames through the network.

    Args:
        model: the transformer; blocks have its `frames_per_block`.
        x_BFZYX: clean latents, as many frames as there can ever be; those beyond are not read.
        t: timestep that all frames are told.
        actions_BF: action ids of the frames.
        at: encodings of the frames.
        text_kv: from `model.text_kv`.
        blocks: how many blocks of frames there are; at least 1.
        last_only: return K and V of the last of these blocks, not of all frames.

    Returns:
        K and V of all layers. Frames beyond `blocks` are zeros.

    Raises:
        ValueError: a number of frames that blocks cannot make up.
    """
    config = model.config
    B, F = x_BFZYX.shape[:2]
    n = config.frames_per_block
    if F % n or not F:
        raise ValueError(f"x_BFZYX has {F} frames; accepted: a multiple of frames_per_block={n}")
    N, H, D = F // n, config.heads, config.head_dim
    t_BF = jnp.full((B, F), t, jnp.float32)

    def in_blocks(x):  # [B, N * rest, ...] -> [N, B, rest, ...]
        return jnp.moveaxis(x.reshape(B, N, x.shape[1] // N, *x.shape[2:]), 1, 0)

    x_NBTM = in_blocks(model.patchify(x_BFZYX))
    e_NBF6M = in_blocks(model.condition(t_BF, actions_BF)[1])
    at_N = jax.tree.map(in_blocks, at)
    T = x_NBTM.shape[2]
    frame = T // n
    graphdef, stacked = nnx.split(model.blocks)

    def one_layer(x_NBTM, layer):
        state, text, index = layer
        block = nnx.merge(graphdef, state)

        def project(i, carry):
            queries, keys, values, kept = carry
            q, k, v = block.project(x_NBTM[i], e_NBF6M[i])
            heads = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
            here = jax.tree.map(lambda x: x[i], at_N)
            queries = queries.at[i].set(encode_queries(heads[0], here))
            keys = keys.at[i].set(encode_keys(heads[1], here.place))
            values = values.at[i].set(encode_values(heads[2], here.place))
            kept = tuple(
                new[None] if last_only else x.at[i].set(new)
                for x, new in zip(kept, (k, v), strict=True)
            )
            return queries, keys, values, kept

        def finish(i, x_NBTM):
            q_BCTD = queries[i]

            def visit(j, run):
                corner, form = (j // n, 0, 0, j % n * frame, 0), (1, B, 2 * H, frame, D)
                k, v = (jax.lax.dynamic_slice(x, corner, form)[0] for x in (keys, values))
                return run.visit(q_BCTD, k, v)

            run = jax.lax.fori_loop(0, blocks * n, visit, Running.of(q_BCTD))
            here = jax.tree.map(lambda x: x[i], at_N)
            branches = decode_outputs(run.result(q_BCTD.dtype), here)
            branches = tuple(jnp.swapaxes(o, 1, 2) for o in branches)
            return x_NBTM.at[i].set(block.finish(x_NBTM[i], e_NBF6M[i], branches, text))

        encoded = jnp.zeros((N, B, 2 * H, T, D), config.dtype)
        raw = jnp.zeros((1 if last_only else N, B, T, H, D), config.dtype)
        carry = (encoded, encoded, encoded, (raw, raw))
        queries, keys, values, kept = jax.lax.fori_loop(0, blocks, project, carry)
        # Nobody reads what the last layer makes of the frames: only its K and V.
        left = jnp.where(index == config.layers - 1, 0, blocks)
        return jax.lax.fori_loop(0, left, finish, x_NBTM), kept

    layers = (stacked, text_kv, jnp.arange(config.layers))
    _, kept = jax.lax.scan(one_layer, x_NBTM, layers)

    def in_a_row(x_LNBTHD):
        x = jnp.moveaxis(x_LNBTHD, 1, 2)
        return x.reshape(*x.shape[:2], -1, H, D)

    return ContextKV(*map(in_a_row, kept))
