"""Probabilities of a tile of keys in e4m3: powers of two by arithmetic on bits, two at once in float16.

A multiprocessor of Hopper has 16 units for 2^x, and in e4m3 they take longer than the products do. So three of
four powers are computed without them. The bits of 2^e (1 + f) in e4m3, read as an integer, are
8 (e + 7) + 8 f. For 2^x they are h = 8 (x + 7) where x is whole; between, with g = x - floor(x),

    8 (2^g - 1 - g)

is missing, at most 0.69. For it stands u^2 - 1/2, u = 51/32 (g - 1/2), which has its shape within 0.04 and
differs by an offset that moves into h. Rounding to an integer is an addition of 1024, where neighbours in
float16 are 1 apart.

Against rounding 2^x itself, whose error is 2.65 % (rms), the error is 2.66 %, in the same mean.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector
from jaxtyping import Array

from pallas_kernels.gpu.lanes import (
    Halves,
    Lane,
    e4m3_word,
    exchanged,
    floating,
    halves,
    halves_below,
    integer,
    permute_bytes,
)
from pallas_kernels.gpu.registers import WORDS_OF_LEFT_OPERAND

__all__ = ["SHIFT", "of_thread", "probabilities"]

SHIFT = 8.0  # probabilities are multiplied by 2 ** SHIFT, into the middle of e4m3's range
# h of 2^0: 56 less the mean of what stands for 8 (2^g - 1 - g). It is a multiple of 1/16, so that m and b are made of
# each other without rounding: an m that is made anew from itself at every tile must not move.
_ZERO_AT = 56 - 3 / 16
_BEND = 51 / 32
_BY_UNITS = 4  # of so many words, one is computed by the units for 2^x
_LEAST_FACTOR = 2.0**-24  # the least in float16: a masked logit times it is still minus infinity
_MATRIX, _ROWS = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


def probabilities(s: Array, m: Array, scale: Array) -> tuple[Array, Array]:
    """The left operand of P V for a tile of logits, in words, and the new m.

    Args:
        s: products of queries and keys, of magnitudes up to 65,504, or `MASK_VALUE`.
        m: the running maximum of the base-2 logits, less `SHIFT`.
        scale: factor from products to base-2 logits, positive, or zero for a query of zeros.

    Returns:
        The words (in the layout `WORDS_OF_LEFT_OPERAND`) of 2^(scale s - m_new), and m_new. Logits beyond about
        8,000 make m_new infinite.
    """
    shape = (s.shape[0], s.shape[1] // 4)

    @plgpu.inline_mgpu(
        arg_types=(_MATRIX, _ROWS, _ROWS),
        return_type=(
            plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=WORDS_OF_LEFT_OPERAND),
            plgpu.ShapeDtypeStruct(m.shape, jnp.float32, layout=_ROWS),
        ),
    )
    def run(ctx, s, m, scale):
        del ctx
        # A thread has two rows, and of each two neighbouring columns of every eight.
        rows = s.registers.reshape(-1, 2).T
        numbers = [[(_element(x, 0), _element(x, 1)) for x in row] for row in rows]
        per_row = [[_element(x, 0) for x in y.registers.flat] for y in (m, scale)]
        words, m_new = of_thread(numbers, *per_row)
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        in_words = np.array([_vector(w, i32) for row in words for w in row], dtype=object)
        in_words = in_words.reshape(2, -1).T
        in_rows = np.array([_vector(x, f32) for x in m_new], dtype=object)
        layout = WORDS_OF_LEFT_OPERAND.to_mgpu()
        return (
            mgpu.FragmentedArray(
                _registers=in_words.reshape(layout.registers_shape(shape)),
                _layout=layout,
                _is_signed=True,
            ),
            mgpu.FragmentedArray(
                _registers=in_rows.reshape(m.registers.shape), _layout=m.layout, _is_signed=None
            ),
        )

    return run(s, m, scale)


def _element(x: Any, i: int) -> Lane:
    return Lane(vector.extract(x, dynamic_position=[], static_position=[i]))


def _vector(x: Lane, dtype: Any) -> Any:
    return vector.broadcast(ir.VectorType.get((1,), dtype), x.value)


def of_thread(
    s: Sequence[Sequence[tuple[Lane, Lane]]], m: Sequence[Lane], scale: Sequence[Lane]
) -> tuple[list[list[Lane]], list[Lane]]:
    """`probabilities` of a thread: words of four columns and the new m of each of its two rows.

    Args:
        s: pairs of columns of each row; four neighbouring threads have the same rows.
        m, scale: one number for each row.
    """
    in_half = [[halves(*pair) for pair in row] for row in s]
    factors = [halves(x, x) for x in ((y * 8.0).max(floating(_LEAST_FACTOR)) for y in scale)]
    words, m_new = [], []
    for row, numbers, m_old, factor, largest in zip(
        in_half, s, m, factors, _largest_of_rows(in_half), strict=True
    ):
        # What is multiplied is the rounded factor, everywhere, and m is what b can hold.
        exact = factor.floats()[0] * 0.125
        b = halves_below(
            (largest * exact - SHIFT).max(m_old).fma(floating(-8.0), floating(_ZERO_AT))
        )
        less_m = (b.floats()[0] - _ZERO_AT) * 0.125
        m_new.append(less_m * -1.0)
        words.append([])
        for i in range(0, len(row), 2):
            if i // 2 % _BY_UNITS == _BY_UNITS - 1:
                four = [x for pair in numbers[i : i + 2] for x in pair]
                word = e4m3_word([x.fma(exact, less_m).exp2() for x in four])
            else:
                low, high = (_bits(x.fma_or_zero(factor, b)) for x in row[i : i + 2])
                word = permute_bytes(low.word, high.word, 0x6420)
            words[-1].append(word)
    return words, m_new


def _bits(h: Halves) -> Halves:
    """Numbers whose lowest bytes are the e4m3 numbers that belong to h = 8 (x + 7)."""
    # In eighths the fraction of h + 128 is in the lowest six bits: 64 g, here on top of 1024.
    fraction = Halves((h + _both(128)).word.with_bits(0x003F003F, 0x64006400))
    u = fraction.fma(_both(_BEND / 64), _both(-(1024 + 32) * _BEND / 64))
    return u.fma(u, h) + _both(1024 - 0.5)


def _both(x: float) -> Halves:
    """A constant, twice; it must be a float16 number."""
    half = np.float16(x)
    assert half == x
    word = int(half.view(np.uint16)) * 0x10001
    return Halves(integer(word - (word >> 31 << 32)))


def _largest_of_rows(rows: list[list[Halves]]) -> tuple[Lane, Lane]:
    """The largest number of each of two rows among four neighbouring threads."""
    first, second = (_tree(row, Halves.max).word for row in rows)
    low, high = (Halves(permute_bytes(first, second, s)) for s in (0x5410, 0x7632))
    both = low.max(high)
    for apart in (1, 2):
        both = both.max(Halves(exchanged(both.word, apart)))
    return both.floats()


def _tree(x: list[Halves], op: Callable[[Halves, Halves], Halves]) -> Halves:
    while len(x) > 1:
        x = [op(*pair) for pair in zip(x[0::2], x[1::2], strict=True)]
    return x[0]
