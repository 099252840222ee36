"""The context pass: K and V of clean frames that see each other, all of them, both ways.

Before a block is denoised, the frames it will look back at go through the network together. How
many they are is data: arrays are made for the most there can be, and loops run over the blocks of
frames that are there, so the cost is that of the frames and the program is always the same.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from models.common.attention import cudnn_works, fused_attention
from models.common.wan_text import TextKV
from models.runs.devices import whole_on_all
from models.worldplay.encoding import (
    Here,
    decode_outputs,
    encode_keys,
    encode_queries,
    encode_values,
)
from models.worldplay.modeling import WorldPlayDiT
from qvg_jax.cache.plan import Plan


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
    plan: Plan | None = None,
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
        plan: of the devices that run the pass together; None for one.

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
    graphdef, stacked = nnx.split(model.blocks)

    def one_layer(x_NBTM, layer):
        state, text, index = layer
        block = nnx.merge(graphdef, jax.tree.map(lambda x: whole_on_all(x, plan), state))

        def project(i, carry):
            queries, keys, values, kept = carry
            q, k, v = block.project(x_NBTM[i], e_NBF6M[i])
            heads = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
            here = jax.tree.map(lambda x: x[i], at_N)
            encoded = (
                encode_queries(heads[0], here),
                encode_keys(heads[1], here.place),
                encode_values(heads[2], here.place),
            )
            q_BTCD, k_BTCD, v_BTCD = (jnp.swapaxes(x, 1, 2) for x in encoded)
            put = jax.lax.dynamic_update_slice_in_dim
            kept = tuple(
                new[None] if last_only else x.at[i].set(new)
                for x, new in zip(kept, (k, v), strict=True)
            )
            keys, values = put(keys, k_BTCD, i * T, 1), put(values, v_BTCD, i * T, 1)
            return queries.at[i].set(q_BTCD), keys, values, kept

        def finish(i, x_NBTM):
            o_BTCD = _shared_first(queries[i], keys, values, blocks * T, T // n, plan)
            here = jax.tree.map(lambda x: x[i], at_N)
            branches = decode_outputs(jnp.swapaxes(o_BTCD, 1, 2), here)
            branches = tuple(jnp.swapaxes(o, 1, 2) for o in branches)
            return x_NBTM.at[i].set(block.finish(x_NBTM[i], e_NBF6M[i], branches, text, plan))

        asked = jnp.zeros((N, B, T, 2 * H, D), config.dtype)
        seen = jnp.zeros((B, N * T, 2 * H, D), config.dtype)
        raw = jnp.zeros((1 if last_only else N, B, T, H, D), config.dtype)
        carry = (asked, seen, seen, (raw, raw))
        queries, keys, values, kept = jax.lax.fori_loop(0, blocks, project, carry)
        # Nobody reads what the last layer makes of the frames: only its K and V.
        left = jnp.where(index == config.layers - 1, 0, blocks)
        return jax.lax.fori_loop(0, left, finish, x_NBTM), kept

    layers = (stacked, text_kv, jnp.arange(config.layers))
    _, kept = jax.lax.scan(one_layer, x_NBTM, layers)

    def in_a_row(x_LNBTHD):
        x = jnp.moveaxis(x_LNBTHD, 1, 2)
        return x.reshape(*x.shape[:2], -1, H, D)

    return ContextKV(*(whole_on_all(in_a_row(x), plan) for x in kept))


def _shared_first(
    q_BTCD: Float[Array, "B T C D"],
    k_BUCD: Float[Array, "B U C D"],
    v_BUCD: Float[Array, "B U C D"],
    keys: Int[Array, ""],
    piece: int,
    plan: Plan | None,
) -> Float[Array, "B T C D"]:
    """`_attend_first`, on several devices by each for some of the queries."""
    if plan is None or not plan.split_tokens:
        return _attend_first(q_BTCD, k_BUCD, v_BUCD, keys, piece)
    apart, everywhere = jax.P(None, plan.axis), jax.P()
    run = jax.shard_map(
        lambda *inputs: _attend_first(*inputs, piece),
        mesh=plan.mesh,
        in_specs=(apart, everywhere, everywhere, everywhere),
        out_specs=apart,
        check_vma=False,
    )
    return run(q_BTCD, k_BUCD, v_BUCD, keys)


def _attend_first(
    q_BTCD: Float[Array, "B T C D"],
    k_BUCD: Float[Array, "B U C D"],
    v_BUCD: Float[Array, "B U C D"],
    keys: Int[Array, ""],
    piece: int,
) -> Float[Array, "B T C D"]:
    """Attention to the first `keys` keys; without cuDNN, `piece` of them at a time, which divides them."""
    B, T, C, D = q_BTCD.shape
    if cudnn_works(q_BTCD.dtype.name, D):
        return fused_attention(q_BTCD, k_BUCD, v_BUCD, valid_B=jnp.full((B,), keys))
    f32 = jnp.float32

    def visit(j, run):
        top, total, out = run
        k, v = (jax.lax.dynamic_slice_in_dim(x, j * piece, piece, 1) for x in (k_BUCD, v_BUCD))
        s_BCTU = jnp.einsum("btcd,bucd->bctu", q_BTCD, k, preferred_element_type=f32)
        s_BCTU = s_BCTU * (1 / math.sqrt(D))
        higher = jnp.maximum(top, s_BCTU.max(-1))
        p_BCTU, fade = jnp.exp(s_BCTU - higher[..., None]), jnp.exp(top - higher)
        new = jnp.einsum("bctu,bucd->bctd", p_BCTU.astype(v.dtype), v, preferred_element_type=f32)
        return higher, total * fade + p_BCTU.sum(-1), out * fade[..., None] + new

    zero = jnp.zeros((B, C, T, D), f32)
    start = zero[..., 0] - jnp.inf, zero[..., 0], zero
    _, total, out = jax.lax.fori_loop(0, keys // piece, visit, start)
    return jnp.swapaxes(out / total[..., None], 1, 2).astype(q_BTCD.dtype)
