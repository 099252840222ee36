"""Arrays in the registers of a warpgroup: loads, reductions, products, and operands of 8-bit products."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxtyping import Array

__all__ = ["as_words", "constant", "fold", "left_operand", "over_columns", "product", "row_of"]

_W = plgpu.Layout.WGMMA


def row_of(ref: Any) -> Array:
    """Loads numbers from GPU memory, one for each row of a register array."""
    return plgpu.load(ref, layout=_W.reduce(1), optimized=False)


def constant(shape: tuple[int, ...], x: float) -> Array:
    """A register array of float32 with the same number everywhere, one number a row or a whole matrix."""
    layout = _W.reduce(1) if len(shape) == 1 else _W
    return plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)


def over_columns(x_Q: Array, shape: tuple[int, ...]) -> Array:
    """A matrix whose columns are all x_Q."""
    return lax.broadcast_in_dim(x_Q, shape, [0])


_REDUCTIONS = {
    jnp.add: lambda a, b: a + b,
    jnp.maximum: lambda a, b: a.max(b),
    jnp.minimum: lambda a, b: a.min(b),
}


def fold(x: Array, op: Any, width: int) -> Array:
    """Reduces the columns by `op` to `width` of them, by halves: independent steps, unlike one long sum.

    For the compiler it is one operation. As slices of arrays its steps took most of the time of inferring
    layouts.
    """
    shape = (x.shape[0], width)

    @plgpu.inline_mgpu(
        arg_types=(_W,), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=_W)
    )
    def run(ctx, x):
        del ctx
        while (half := x.shape[1] // 2) >= width:
            x = _REDUCTIONS[op](x[:, :half], x[:, half:])
        return x

    return run(x)


def _layout_of_words() -> Any:
    """The layout of an 8-bit left operand of a product, in words of four columns."""
    tiles = tuple((*t[:-1], t[-1] // 4) for t in mgpu.WGMMA_LAYOUT_8BIT.tiling.tiles)
    return plgpu.Layout.TILED(
        dataclasses.replace(mgpu.WGMMA_LAYOUT_8BIT.tiling, tiles=tiles),
        warp_dims=(-7,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def as_words(p: Array) -> Array:
    """Probabilities in e4m3 as words of the left operand of an 8-bit product, without moving a register.

    A thread holds columns 2 i, 2 i + 1 of every 8; as an 8-bit operand it must hold 4 i .. 4 i + 3 of
    every 16. Taking the pairs of two neighbouring groups of 8 for those four permutes the keys
    within 16, which the decoder has undone in advance (`key_row_of_token`). Words, because pairs of
    bytes carried from one step of a loop to the next are taken apart by the compiler.
    """
    shape = (p.shape[0], p.shape[1] // 4)

    @plgpu.inline_mgpu(
        arg_types=(_W,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=_layout_of_words()),
    )
    def run(ctx, x):
        del ctx
        word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        even, odd = x.registers[:, 0::2].flat, x.registers[:, 1::2].flat
        words = [
            utils.bitcast(utils.vector_concat([a, b]), word) for a, b in zip(even, odd, strict=True)
        ]
        return _registers(words, shape, _layout_of_words().to_mgpu(), signed=True)

    return run(p)


def left_operand(words: Array, dtype: Any) -> Array:
    """The 8-bit left operand of a product, from its words; see `as_words`."""
    shape = (words.shape[0], words.shape[1] * 4)

    @plgpu.inline_mgpu(
        arg_types=(_layout_of_words(),),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def run(ctx, x):
        del ctx
        four = ir.VectorType.get((4,), utils.dtype_to_ir_type(dtype))
        numbers = [utils.bitcast(w, four) for w in x.registers.flat]
        return _registers(numbers, shape, mgpu.WGMMA_LAYOUT_8BIT, signed=None)

    return run(words)


def _registers(values: list[Any], shape: tuple[int, int], layout: Any, signed: bool | None) -> Any:
    flat = np.empty(len(values), dtype=object)
    flat[:] = values
    registers = flat.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def product(left: Any, right: Any, shape: tuple[int, int]) -> Array:
    """left @ right in float32, waited for, in an accumulator that starts at zero."""

    def run(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
