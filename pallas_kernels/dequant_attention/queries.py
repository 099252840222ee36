"""Queries on their way to attention, on Hopper: rotated, grouped by key-value head, in bf16 and e4m3.

One pass over memory. XLA makes four of it: transposition and rotation, the largest number of every
row, division and rounding, and the factor of the logits.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dequantize.mosaic_gpu import load_turn, rotate
from pallas_kernels.dequantize.rows import CHANNELS, channels_at, store_channels
from pallas_kernels.dequantize.types import Rotation
from pallas_kernels.gpu.lanes import (
    bf16_pair,
    block,
    e4m3_words,
    global_address,
    halves,
    integer,
    largest_of,
    load,
    select,
    store,
    thread,
)

__all__ = ["LARGEST", "grouped"]

LARGEST = 256  # the largest number of a row in e4m3, which ends at 448
_TINY = 1e-30  # of a row of zeros, instead of 0
_QUERIES = 64  # of a block


def grouped(
    q_BTHD: Array,
    logits_scale: Array,
    rotation: Rotation | None,
    *,
    batch: int,
    heads: int,
    size: int,
    fp8: bool,
) -> list[Array]:
    """Queries by the rows of a cache; see `api.prepare_tokens`.

    Args:
        q_BTHD, rotation, batch, heads, fp8: as in `api.prepare_tokens`.
        logits_scale: factor of the base-2 logits.
        size: queries of a row of the result, a multiple of 64.

    Returns:
        bf16 queries (n, size, D), zero beyond the last one; if `fp8` also e4m3 queries and the
        scale of the logits of each (n, size).
    """
    cos_sin = () if rotation is None else rotation.cos_sin
    pairing = None if rotation is None else rotation.pairing
    rows, tokens, all_heads, d = q_BTHD.shape
    lanes = d // CHANNELS  # threads per query
    at_once = 128 // lanes  # queries that a warpgroup holds
    branches, group = rows // batch, all_heads // heads
    queries = branches * group * tokens
    pair = 1 if heads % 2 else 2  # heads that share the sines
    operands = (logits_scale.astype(jnp.float32).reshape(1), q_BTHD, *cos_sin)

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def run(ctx, *refs):
            del ctx
            scale_g, q_g, *angles_g = refs[: len(operands)]
            bf16_g, *fp8_g = (global_address(r) for r in refs[len(operands) :])
            (scale,) = load(global_address(scale_g), 4)
            zero = integer(0).as_float()
            row = block("y") * pair
            b, head = row // heads, row % heads
            lane, mine = thread() % lanes, thread() // lanes
            starts = [global_address(t) + (b * (tokens * d * 2)).wide() for t in angles_g]
            for step in range(_QUERIES // at_once):
                query = block("x") * _QUERIES + mine + step * at_once
                there = query < queries
                safe = select(there, query, integer(0))
                branch, token = safe // (group * tokens), safe % tokens
                turn = load_turn(starts, token, lane, pairing, d)
                for h in range(pair):
                    theirs = (head + h) * group + safe // tokens % group
                    at = ((branch * batch + b) * tokens + token) * all_heads + theirs
                    start = global_address(q_g) + at.wide() * (2 * d) + (lane * 16).wide()
                    x = channels_at(start, d)
                    x = rotate(x, turn, pairing) if turn else x
                    x = [select(there, y, zero) for y in x]
                    to = (row + h).wide() * size + query.wide()
                    words = [bf16_pair(x[i], x[i + 1]) for i in range(0, 16, 2)]
                    store_channels(bf16_g + to * (2 * d) + (lane * 16).wide(), words, d)
                    if fp8:
                        most = largest_of(x, lanes, at_least=_TINY)
                        share = most.reciprocal() * float(LARGEST)
                        pairs = [halves(x[i] * share, x[i + 1] * share) for i in range(0, 16, 2)]
                        store_channels(fp8_g[0] + to * d + (lane * 8).wide(), e4m3_words(pairs), d)
                        factor = most * scale.as_float() * (1 / LARGEST)
                        store(fp8_g[1] + to * 4, [factor], lane < 1)

        run(*refs)

    form = (batch * heads, size)
    out = [jax.ShapeDtypeStruct((*form, d), jnp.bfloat16)]
    if fp8:
        out += [jax.ShapeDtypeStruct((*form, d), jnp.float8_e4m3fn)]
        out += [jax.ShapeDtypeStruct(form, jnp.float32)]
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(batch * heads // pair, size // _QUERIES),
        grid_names=("head", "tile"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="group_queries",
    )(*operands)
