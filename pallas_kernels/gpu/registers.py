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

__all__ = [
    "WORDS_OF_LEFT_OPERAND", "columns", "constant", "fold", "left_operand", "over_columns", "product",
    "row_of",
]  # fmt: skip

_W = plgpu.Layout.WGMMA


def _layout_of_words() -> Any:
    tiles = tuple((*t[:-1], t[-1] // 4) for t in mgpu.WGMMA_LAYOUT_8BIT.tiling.tiles)
    return plgpu.Layout.TILED(
        dataclasses.replace(mgpu.WGMMA_LAYOUT_8BIT.tiling, tiles=tiles),
        warp_dims=(-7,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


# The layout of an 8-bit left operand of a product, in words of four columns. A thread that holds columns 2 i,
# 2 i + 1 of every 8 of a matrix must hold 4 i .. 4 i + 3 of every 16 of the operand. Taking the pairs of two
# neighbouring groups of 8 for those four moves no register, and permutes the columns within 16: the keys, which the
# decoder has permuted in advance (`key_row_of_token`). Words, because pairs of bytes carried from one step of a
# loop to the next are taken apart by the compiler.
WORDS_OF_LEFT_OPERAND = _layout_of_words()


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


def columns(x: Array, start: int, stop: int) -> Array:
    """Some columns of a register array; both bounds are multiples of eight."""

    @plgpu.inline_mgpu(
        arg_types=(_W,),
        return_type=plgpu.ShapeDtypeStruct((x.shape[0], stop - start), x.dtype, layout=_W),
    )
    def run(ctx, x):
        del ctx
        return x[:, start:stop]

    return run(x)


def left_operand(words: Array, dtype: Any) -> Array:
    """The 8-bit left operand of a product, from its words of `WORDS_OF_LEFT_OPERAND`."""
    shape = (words.shape[0], words.shape[1] * 4)

    @plgpu.inline_mgpu(
        arg_types=(WORDS_OF_LEFT_OPERAND,),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def run(ctx, x):
        del ctx
        four = ir.VectorType.get((4,), utils.dtype_to_ir_type(dtype))
        numbers = np.array([utils.bitcast(w, four) for w in x.registers.flat], dtype=object)
        layout = mgpu.WGMMA_LAYOUT_8BIT
        return mgpu.FragmentedArray(
            _registers=numbers.reshape(layout.registers_shape(shape)),
            _layout=layout,
            _is_signed=None,
        )

    return run(words)


def product(left: Any, right: Any, shape: tuple[int, int]) -> Array:
    """left @ right in float32, waited for, in an accumulator that starts at zero."""

    def run(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
