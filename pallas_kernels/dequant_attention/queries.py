"""Queries for attention on Hopper: rotated, grouped by key-value head, in bf16 and e4m3.

It is one pass over memory, of which XLA makes four: transposition and rotation, the largest number of
every query, division and rounding, and the scale of the logits.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dequant_attention.tuning import largest_query
from pallas_kernels.dequantize.types import Rotation
from pallas_kernels.gpu.channels import CHANNELS, load_channels, store_channels
from pallas_kernels.gpu.lanes import (
    bf16_pair,
    cta,
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
from pallas_kernels.gpu.rotate import load_cos_sin, rotate

__all__ = ["grouped"]

_TINY = 1e-30  # the largest number of a query of zeros, instead of 0
_QUERIES = 64  # queries of a CTA


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
    pair = 1 if heads % 2 else 2  # heads that share cosines and sines
    operands = (logits_scale.astype(jnp.float32).reshape(1), q_BTHD, *cos_sin)

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def run(ctx, *refs):
            del ctx
            scale_gmem, q_gmem, *cos_sin_gmem = refs[: len(operands)]
            bf16_gmem, *fp8_gmem = (global_address(r) for r in refs[len(operands) :])
            (scale,) = load(global_address(scale_gmem), 4)
            zero = integer(0).as_float()
            row = cta("y") * pair
            b, head = row // heads, row % heads
            lane, lane_group = thread() % lanes, thread() // lanes
            starts = [global_address(x) + (b * (tokens * d * 2)).wide() for x in cos_sin_gmem]
            for step in range(_QUERIES // at_once):
                query = cta("x") * _QUERIES + lane_group + step * at_once
                exists = query < queries
                safe = select(exists, query, integer(0))
                branch, token = safe // (group * tokens), safe % tokens
                angles = load_cos_sin(starts, token, lane, pairing, d)
                for h in range(pair):
                    q_head = (head + h) * group + safe // tokens % group
                    at = ((branch * batch + b) * tokens + token) * all_heads + q_head
                    start = global_address(q_gmem) + at.wide() * (2 * d) + (lane * 16).wide()
                    x = load_channels(start, d)
                    x = rotate(x, angles, pairing) if angles else x
                    x = [select(exists, y, zero) for y in x]
                    to = (row + h).wide() * size + query.wide()
                    words = [bf16_pair(x[i], x[i + 1]) for i in range(0, 16, 2)]
                    store_channels(bf16_gmem + to * (2 * d) + (lane * 16).wide(), words, d)
                    if fp8:
                        largest = largest_of(x, lanes, at_least=_TINY)
                        factor = largest.reciprocal() * largest_query(d)
                        pairs = [halves(x[i] * factor, x[i + 1] * factor) for i in range(0, 16, 2)]
                        store_channels(
                            fp8_gmem[0] + to * d + (lane * 8).wide(), e4m3_words(pairs), d
                        )
                        scale_of_query = largest * scale.as_float() * (1 / largest_query(d))
                        store(fp8_gmem[1] + to * 4, [scale_of_query], lane < 1)

        run(*refs)

    shape = (batch * heads, size)
    out = [jax.ShapeDtypeStruct((*shape, d), jnp.bfloat16)]
    if fp8:
        out += [jax.ShapeDtypeStruct((*shape, d), jnp.float8_e4m3fn)]
        out += [jax.ShapeDtypeStruct(shape, jnp.float32)]
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(batch * heads // pair, size // _QUERIES),
        grid_names=("head", "tile"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="group_queries",
    )(*operands)
