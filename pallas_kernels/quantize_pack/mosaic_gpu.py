"""The last pass of encoding on Hopper: nearest centroid, residual, scales, codes and their packing.

One pass over x. The centroid of a token is picked by a product of one-hot rows with the table that
already lies in shared memory, and codes are packed by a product with powers of two: a byte of four
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

from pallas_kernels.gpu.registers import fold, over_columns
from pallas_kernels.kmeans import mosaic_gpu as kmeans
from pallas_kernels.kmeans.mosaic_gpu import ROWS, nearest, swizzled
from pallas_kernels.kmeans.types import HEAD_DIM, TILE, Tuning
from pallas_kernels.quantize_pack.types import Integers, Midrise

__all__ = ["encode"]

_W = plgpu.Layout.WGMMA
_LARGE = 3e38
# Rows of at least so many bytes lie swizzled in shared memory, and their copies end with a row of the
# output. Of narrower ones Mosaic makes plain copies of consecutive bytes, which end with the array: a
# partial last tile would run into the codes of the next row, so those outputs have whole tiles.
_SWIZZLED = 32
_EVEN, _AWAY = lax.RoundingMethod.TO_NEAREST_EVEN, lax.RoundingMethod.AWAY_FROM_ZERO


def packer(bits: int) -> np.ndarray:
    """The weight (code bytes, D) of a channel's code in the byte that it is packed into."""
    per_byte = 8 // bits
    channel = np.arange(HEAD_DIM)
    weights = np.zeros((HEAD_DIM // per_byte, HEAD_DIM), np.float32)
    weights[channel // per_byte, channel] = 2.0 ** (bits * (per_byte - 1 - channel % per_byte))
    return weights


def _row_max(x: Array) -> Array:
    return fold(x, jnp.maximum, 8).max(axis=1)


def _row_sum(x: Array) -> Array:
    return fold(x, jnp.add, 8).sum(axis=1)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _floats(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.float32)


def _four_bits(x: Array) -> Array:
    """A positive float32 rounded to four significant bits, half to even; as an integer."""
    bits = _bits(x)
    return (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000


def _e4m3(x: Array) -> tuple[Array, Array]:
    """A positive float32 rounded to e4m3: its byte (int32) and its value."""
    x = jnp.minimum(x, 448.0)
    normal = _four_bits(x)
    steps = lax.round(x * 512.0, _EVEN)  # below 2^-6 the steps are 2^-9
    small = _bits(steps + 2.0**23) & 15
    is_small = x < 2.0**-6
    byte = jnp.where(is_small, small, (normal >> 20) - 960)
    return byte, jnp.where(is_small, steps * 2.0**-9, _floats(normal))


def _ones(condition: Array) -> Array:
    return jnp.where(condition, 1.0, 0.0)


def _integers(r: Array, form: Integers) -> tuple[Array, list[Array]]:
    """Codes as float32, and the scales of every group as bytes of e4m3."""
    q, codes, scales = 2 ** (form.bits - 1) - 1, [], []
    for start in range(0, HEAD_DIM, form.group):
        part = r[:, start : start + form.group]
        byte, scale = _e4m3(jnp.maximum(_row_max(jnp.abs(part)) / q, 1e-10))
        scales.append(byte)
        if q == 1:
            edge = over_columns(jnp.where(scale > 0.0, scale * 0.5, _LARGE), part.shape)
            codes.append(_ones(part >= edge) - _ones(part <= -edge) + 1.0)
        else:
            inverse = jnp.where(scale > 0.0, 1.0 / jnp.where(scale > 0.0, scale, 1.0), 0.0)
            code = lax.round(part * over_columns(inverse, part.shape), _AWAY)
            codes.append(jnp.minimum(jnp.maximum(code, -float(q)), float(q)) + float(q))
    return codes[0] if len(codes) == 1 else jnp.concatenate(codes, axis=1), scales


def _midrise(r: Array, form: Midrise) -> tuple[Array, list[Array]]:
    """Codes as float32, and least-squares scale, matching scale and largest entry."""
    n = 2**form.bits

    def codes_for(scale):
        if n == 2:
            return _ones(r >= 0.0)
        if n == 4:
            edge = over_columns(jnp.where(scale > 0.0, scale, 1.0), r.shape)
            return _ones(r >= -edge) + _ones(r >= 0.0) + _ones(r >= edge)
        inverse = over_columns(1.0 / jnp.where(scale > 0.0, scale, 1.0), r.shape)
        code = lax.round(r * inverse + (n - 1) / 2, _EVEN)
        return jnp.minimum(jnp.maximum(code, 0.0), float(n - 1))

    energy = _row_sum(r * r)
    scale = lax.sqrt(energy * (1 / HEAD_DIM)) * form.ratio
    for _ in range(form.refine):
        codes = codes_for(scale)
        levels = codes - (n - 1) / 2
        along, square = _row_sum(r * levels), _row_sum(levels * levels)
        scale = jnp.where(along > 0.0, along / square, scale)
    match = jnp.where(along > 0.0, energy / jnp.where(along > 0.0, along, 1.0), scale)
    if form.recode:
        codes = codes_for(_floats(_four_bits(scale)))
    return codes, [scale, match, _row_max(jnp.abs(r))]


@functools.partial(jax.jit, static_argnames=("form", "tokens", "parts", "tuning"))
def encode(
    x_RTD: Array,
    c_RKD: Array,
    bias_RK: Array,
    form: Integers | Midrise | None,
    *,
    tokens: int,
    parts: int,
    tuning: Tuning,
) -> tuple[Array, ...]:
    """Assigns every token, subtracts its centroid, and packs the residual.

    Args:
        x_RTD, c_RKD, bias_RK, tokens, parts, tuning: as in `kmeans.mosaic_gpu.sums`.
        form: how the residual is packed; None leaves it as it is.

    Returns:
        ids (uint8) of the tokens rounded up to tiles, and
        codes (R, T or more, C) with, for integers, bytes of scales (R, G, rounded), for mid-rise grids
        float32 (R, 3, rounded): least-squares scale, matching scale, largest entry;
        or without `form` the residual (R, T, D) in bf16.
    """
    (rows, clusters, _), tiles = c_RKD.shape, -(-tokens // TILE)
    width = 0 if form is None else HEAD_DIM * form.bits // 8
    quantize = {Integers: _integers, Midrise: _midrise}.get(type(form))

    def body(
        *refs, x_smem, c_smem, bias_smem, x_full, x_empty, c_full, w_smem=None, codes_smem=None
    ):
        x_gmem, c_gmem, bias_gmem, *refs = refs
        (w_gmem,), refs = (refs[:1], refs[1:]) if form else ((None,), refs)
        ids_gmem, out_gmem, *scales_gmem = refs
        row, part = lax.axis_index("row"), lax.axis_index("part")
        wg = lax.axis_index("wg")
        first, last = part * tiles // parts, (part + 1) * tiles // parts
        count = last - first

        def residual(x_ref):
            ids, _ = nearest(x_ref, c_smem, bias_smem, tuning.columns)
            picked = plgpu.layout_cast(jnp.zeros((ROWS, HEAD_DIM), jnp.float32), _W)
            for start in range(0, clusters, 64):
                shape = (ROWS, 64)
                cluster = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_W) + start
                hot = _ones(cluster == over_columns(ids, shape)).astype(jnp.bfloat16)
                picked = kmeans.multiply_into(picked, hot, c_smem.at[pl.ds(start, 64)])
            return ids, plgpu.load(x_ref, layout=_W).astype(jnp.float32) - picked

        def step(i):
            slot = lax.rem(i, tuning.stages)
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
            codes, scales = quantize(r, form)
            for g, scale in enumerate(scales):
                scales_gmem[0].at[row, g, tokens_of_wg][...] = scale.astype(scales_gmem[0].dtype)
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), _W)
            bytes_ = kmeans.multiply_into(zeros, codes.astype(jnp.bfloat16), w_smem.T)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            codes_smem.at[wg][...] = bytes_.astype(jnp.int32).astype(jnp.uint8)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(codes_smem.at[wg], out_gmem.at[row, tokens_of_wg])

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
            if form:
                plgpu.copy_gmem_to_smem(w_gmem, w_smem, c_full)
            kmeans.load_tiles(x_gmem.at[row], x_smem, x_full, x_empty, first, count)

    padded = tiles * TILE
    shapes = [((rows, padded), jnp.uint8)]
    scratch: dict[str, Any] = {}
    arrays = (x_RTD, c_RKD, bias_RK)
    if form is None:
        shapes.append((x_RTD.shape, jnp.bfloat16))
    else:
        integers = isinstance(form, Integers)
        count = HEAD_DIM // form.group if integers else 3
        written = x_RTD.shape[1] if width >= _SWIZZLED else padded
        shapes.append(((rows, written, width), jnp.uint8))
        shapes.append(((rows, count, padded), jnp.uint8 if integers else jnp.float32))
        scratch = dict(
            w_smem=swizzled(width, HEAD_DIM), codes_smem=plgpu.SMEM((2, ROWS, width), jnp.uint8)
        )
        arrays += (jnp.asarray(packer(form.bits), jnp.bfloat16),)
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*s) for s in shapes],
        grid=(rows, parts),
        grid_names=("row", "part"),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            x_smem=swizzled(tuning.stages, TILE, HEAD_DIM),
            c_smem=swizzled(clusters, HEAD_DIM),
            bias_smem=plgpu.SMEM((clusters,), jnp.float32),
            x_full=plgpu.Barrier(num_barriers=tuning.stages),
            x_empty=plgpu.Barrier(num_arrivals=2, num_barriers=tuning.stages),
            c_full=plgpu.Barrier(num_arrivals=3 if form else 2),
            **scratch,
        ),
        kernel_name="quantize_pack",
    )
    return tuple(kernel(*arrays))
