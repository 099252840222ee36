"""The last pass of encoding on Hopper: nearest centroid, residual, scales, codes and their packing.

One pass over x, and for dithered levels another over the residuals, since those need factors of channels
that depend on all tokens. The centroid of a token is picked by a product of one-hot rows with the table
that already lies in shared memory, and codes are packed by a product with powers of two: a byte of four
2-bit codes is 64 c0 + 16 c1 + 4 c2 + c3, exact in float32. So no thread needs its neighbours' bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.gpu.registers import constant, over_columns
from pallas_kernels.kmeans import mosaic_gpu as kmeans
from pallas_kernels.kmeans.mosaic_gpu import ROWS, nearest, swizzled
from pallas_kernels.kmeans.types import HEAD_DIM, TILE, Tuning
from pallas_kernels.quantize_pack.levels import dithered, integers, midrise, ones
from pallas_kernels.quantize_pack.types import Dithered, Integers, Midrise

__all__ = ["encode", "pack_dithered"]

_W = plgpu.Layout.WGMMA
# Rows of at least so many bytes lie swizzled in shared memory, and their copies end with a row of the
# output. Of narrower ones Mosaic makes plain copies of consecutive bytes, which end with the array: a
# partial last tile would run into the codes of the next row, so those outputs have whole tiles.
_SWIZZLED = 32


def packer(bits: int) -> np.ndarray:
    """The weight (code bytes, D) of a channel's code in the byte that it is packed into."""
    per_byte = 8 // bits
    channel = np.arange(HEAD_DIM)
    weights = np.zeros((HEAD_DIM // per_byte, HEAD_DIM), np.float32)
    weights[channel // per_byte, channel] = 2.0 ** (bits * (per_byte - 1 - channel % per_byte))
    return weights


def _packing(bits: int) -> dict[str, Any]:
    """The shared memory in which codes are packed: the packer, and the bytes of both warpgroups."""
    width = HEAD_DIM * bits // 8
    return dict(
        w_smem=swizzled(width, HEAD_DIM), codes_smem=plgpu.SMEM((2, ROWS, width), jnp.uint8)
    )


def _written(x_RTD: Array, bits: int, padded: int) -> int:
    """How many rows of codes the kernel writes for each row of tokens."""
    return x_RTD.shape[1] if HEAD_DIM * bits // 8 >= _SWIZZLED else padded


def _store_codes(codes: Array, w_smem: Any, codes_smem: Any, gmem: Any) -> None:
    """Packs the codes of a tile and begins to copy their bytes, when the copy before has read its own."""
    zeros = constant(codes_smem.shape, 0.0)
    bytes_ = kmeans.multiply_into(zeros, codes.astype(jnp.bfloat16), w_smem.T)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    codes_smem[...] = bytes_.astype(jnp.int32).astype(jnp.uint8)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(codes_smem, gmem)


@functools.partial(jax.jit, static_argnames=("form", "tokens", "parts", "tuning"))
def encode(
    x_RTD: Array,
    c_RKD: Array,
    bias_RK: Array,
    form: Integers | Midrise | None,
    picked_RKD: Array | None = None,
    *,
    tokens: int,
    parts: int,
    tuning: Tuning,
) -> tuple[Array, ...]:
    """Assigns every token, subtracts its centroid, and packs the residual.

    Args:
        x_RTD, c_RKD, bias_RK, tokens, parts, tuning: as in `kmeans.mosaic_gpu.sums`.
        form: how the residual is packed; None leaves it as it is.
        picked_RKD: the centroids, where scores are products with another table; None is `c_RKD`.

    Returns:
        ids (uint8) of the tokens rounded up to tiles, and
        codes (R, T or more, C) with, for integers, bytes of scales (R, G, rounded) and as many zero points
        behind them if there are any, for mid-rise grids
        float32 (R, 3, rounded): least-squares scale, matching scale, largest entry;
        or without `form` the residual (R, T, D) in bf16.
    """
    (rows, clusters, _), tiles = c_RKD.shape, -(-tokens // TILE)
    width = 0 if form is None else HEAD_DIM * form.bits // 8
    apart = picked_RKD is not None
    # Two tables leave less room for tiles.
    stages = min(tuning.stages, 3 if form is None else 2) if apart else tuning.stages

    def body(
        *refs, x_smem, c_smem, bias_smem, x_full, x_empty, c_full, picked_smem=None, w_smem=None,
        codes_smem=None,
    ):  # fmt: skip
        x_gmem, c_gmem, bias_gmem, *refs = refs
        (picked_gmem,), refs = (refs[:1], refs[1:]) if apart else ((None,), refs)
        (w_gmem,), refs = (refs[:1], refs[1:]) if form else ((None,), refs)
        ids_gmem, out_gmem, *scales_gmem = refs
        row, part = lax.axis_index("row"), lax.axis_index("part")
        wg = lax.axis_index("wg")
        first, last = part * tiles // parts, (part + 1) * tiles // parts
        count = last - first

        def residual(x_ref):
            ids, _ = nearest(x_ref, c_smem, bias_smem, tuning.columns)
            table = picked_smem if apart else c_smem
            picked = constant((ROWS, HEAD_DIM), 0.0)

            def pick(n, picked):
                start, shape = n * 64, (ROWS, 64)
                cluster = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_W) + start
                hot = ones(cluster == over_columns(ids, shape)).astype(jnp.bfloat16)
                return kmeans.multiply_into(picked, hot, table.at[pl.ds(start, 64)])

            picked = lax.fori_loop(0, clusters // 64, pick, picked)
            return ids, plgpu.load(x_ref, layout=_W).astype(jnp.float32) - picked

        def step(i):
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(x_full.at[slot])
            x_ref = x_smem.at[slot, pl.ds(wg * ROWS, ROWS)]
            ids, r = residual(x_ref)
            tokens_of_wg = pl.ds((first + i) * TILE + wg * ROWS, ROWS)
            ids_gmem.at[row, tokens_of_wg][...] = ids.astype(jnp.uint8)
            if form is None:
                x_ref[...] = r.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(x_ref, out_gmem.at[row, tokens_of_wg])
                plgpu.wait_smem_to_gmem(0)
                plgpu.barrier_arrive(x_empty.at[slot])
                return
            plgpu.barrier_arrive(x_empty.at[slot])
            codes, scales = (integers if isinstance(form, Integers) else midrise)(r, form)
            for g, scale in enumerate(scales):
                scales_gmem[0].at[row, g, tokens_of_wg][...] = scale.astype(scales_gmem[0].dtype)
            _store_codes(codes, w_smem, codes_smem.at[wg], out_gmem.at[row, tokens_of_wg])

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(tuning.registers[0], action="increase")
            plgpu.barrier_wait(c_full)

            @pl.loop(0, count)
            def _(i):
                step(i)

            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(tuning.registers[1], action="decrease")
            plgpu.copy_gmem_to_smem(c_gmem.at[row], c_smem, c_full)
            plgpu.copy_gmem_to_smem(bias_gmem.at[row], bias_smem, c_full)
            if apart:
                plgpu.copy_gmem_to_smem(picked_gmem.at[row], picked_smem, c_full)
            if form:
                plgpu.copy_gmem_to_smem(w_gmem, w_smem, c_full)
            kmeans.load_tiles(x_gmem.at[row], x_smem, x_full, x_empty, first, count)

    padded = tiles * TILE
    shapes = [((rows, padded), jnp.uint8)]
    scratch: dict[str, Any] = {}
    arrays = (x_RTD, c_RKD, bias_RK)
    if apart:
        scratch = dict(picked_smem=swizzled(clusters, HEAD_DIM))
        arrays += (picked_RKD,)
    if form is None:
        shapes.append((x_RTD.shape, jnp.bfloat16))
    else:
        whole = isinstance(form, Integers)
        count = HEAD_DIM // form.group * (1 + form.zero_points) if whole else 3
        shapes.append(((rows, _written(x_RTD, form.bits, padded), width), jnp.uint8))
        shapes.append(((rows, count, padded), jnp.uint8 if whole else jnp.float32))
        scratch |= _packing(form.bits)
        arrays += (jnp.asarray(packer(form.bits), jnp.bfloat16),)
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*s) for s in shapes],
        grid=(rows, parts),
        grid_names=("row", "part"),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            x_smem=swizzled(stages, TILE, HEAD_DIM),
            c_smem=swizzled(clusters, HEAD_DIM),
            bias_smem=plgpu.SMEM((clusters,), jnp.float32),
            x_full=plgpu.Barrier(num_barriers=stages),
            x_empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            c_full=plgpu.Barrier(num_arrivals=2 + apart + (form is not None)),
            **scratch,
        ),
        kernel_name="quantize_pack",
        # Threads of a row reduce it by shuffles. With less memory set aside for it, three tiles fit beside
        # two tables.
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=1024),
    )
    return tuple(kernel(*arrays))


@functools.partial(jax.jit, static_argnames=("form", "tokens", "parts", "tuning"))
def pack_dithered(
    r_RTD: Array,
    factor_RD: Array,
    form: Dithered,
    *,
    tokens: int,
    parts: int,
    tuning: Tuning,
) -> tuple[Array, Array]:
    """Packs residuals whose channels are multiplied by a factor, on dithered levels.

    Args:
        r_RTD, tokens, parts, tuning: residuals, and as in `kmeans.mosaic_gpu.sums`.
        factor_RD: factors of the channels, float32.
        form: how they are packed.

    Returns:
        codes (R, T or more, C), and float32 (R, 2 or 3, rounded): least-squares scale, matching scale, and
        the middle if there is one.
    """
    rows, tiles = r_RTD.shape[0], -(-tokens // TILE)
    width, stages = HEAD_DIM * form.bits // 8, tuning.stages

    def body(
        r_gmem, factor_gmem, w_gmem, codes_gmem, scales_gmem,
        *, r_smem, factor_smem, r_full, r_empty, w_full, w_smem, codes_smem,
    ):  # fmt: skip
        row, part = lax.axis_index("row"), lax.axis_index("part")
        wg = lax.axis_index("wg")
        first, last = part * tiles // parts, (part + 1) * tiles // parts
        count = last - first

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(tuning.registers[0], action="increase")
            plgpu.barrier_wait(w_full)

            @pl.loop(0, count)
            def _(i):
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(r_full.at[slot])
                r = plgpu.load(r_smem.at[slot, pl.ds(wg * ROWS, ROWS)], layout=_W)
                r = r.astype(jnp.float32)
                plgpu.barrier_arrive(r_empty.at[slot])
                start = (first + i) * TILE + wg * ROWS
                here = pl.ds(start, ROWS)
                codes, scales = dithered(r, factor_smem, start, form)
                for n, scale in enumerate(scales):
                    scales_gmem.at[row, n, here][...] = scale
                _store_codes(codes, w_smem, codes_smem.at[wg], codes_gmem.at[row, here])

            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(tuning.registers[1], action="decrease")
            plgpu.copy_gmem_to_smem(factor_gmem.at[row], factor_smem, w_full)
            plgpu.copy_gmem_to_smem(w_gmem, w_smem, w_full)
            kmeans.load_tiles(r_gmem.at[row], r_smem, r_full, r_empty, first, count)

    padded = tiles * TILE
    shapes = [
        ((rows, _written(r_RTD, form.bits, padded), width), jnp.uint8),
        ((rows, 2 + form.zero_points, padded), jnp.float32),
    ]
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*s) for s in shapes],
        grid=(rows, parts),
        grid_names=("row", "part"),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            r_smem=swizzled(stages, TILE, HEAD_DIM),
            factor_smem=plgpu.SMEM((HEAD_DIM,), jnp.float32),
            r_full=plgpu.Barrier(num_barriers=stages),
            r_empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            w_full=plgpu.Barrier(num_arrivals=2),
            **_packing(form.bits),
        ),
        kernel_name="pack_dithered",
    )
    codes_RTC, scales_RNT = kernel(r_RTD, factor_RD, jnp.asarray(packer(form.bits), jnp.bfloat16))
    return codes_RTC, scales_RNT
