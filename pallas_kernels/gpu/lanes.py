"""Numbers of one GPU thread, their arithmetic, loads and stores, for bodies of `inline_mgpu`.

Pallas Mosaic GPU describes work on whole arrays and infers which thread holds which element. Unpacking
interleaved bits and gathering rows of centroids are simpler the other way round: every thread knows its
channels.
`Lane` wraps one MLIR value of one thread with Python's operators; addresses are integers, 64 bits
for global and 32 bits for shared memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

__all__ = [
    "Halves", "Lane", "bf16_pair", "cta", "e4m3_word", "e4m3_words", "exchanged", "floating",
    "global_address", "halves", "halves_below", "integer", "largest_of", "load", "permute_bytes", "select",
    "shared_address", "shared_load", "shared_store", "store", "thread",
]  # fmt: skip

_LESS = arith.CmpIPredicate.slt


def _type(name: str) -> ir.Type:
    return ir.Type.parse(name)


@dataclasses.dataclass(frozen=True)
class Lane:
    """One value of one thread: i16, i32, i64 or f32."""

    value: Any  # ir.Value

    @property
    def is_float(self) -> bool:
        return str(self.value.type) == "f32"

    def _other(self, y: Lane | int | float) -> ir.Value:
        return y.value if isinstance(y, Lane) else utils.c(y, self.value.type)

    def _do(self, on_int: Any, on_float: Any, y: Lane | int | float) -> Lane:
        return Lane((on_float if self.is_float else on_int)(self.value, self._other(y)))

    def __add__(self, y: Lane | int | float) -> Lane:
        return self._do(arith.addi, arith.addf, y)

    def __sub__(self, y: Lane | int | float) -> Lane:
        return self._do(arith.subi, arith.subf, y)

    def __mul__(self, y: Lane | int | float) -> Lane:
        return self._do(arith.muli, arith.mulf, y)

    def __floordiv__(self, y: int) -> Lane:
        return Lane(arith.divui(self.value, self._other(y)))

    def __mod__(self, y: int) -> Lane:
        return Lane(arith.remui(self.value, self._other(y)))

    def __and__(self, y: Lane | int) -> Lane:
        return Lane(arith.andi(self.value, self._other(y)))

    def __or__(self, y: Lane | int) -> Lane:
        return Lane(arith.ori(self.value, self._other(y)))

    def __xor__(self, y: Lane | int) -> Lane:
        return Lane(arith.xori(self.value, self._other(y)))

    def __lshift__(self, y: int) -> Lane:
        return self if y == 0 else Lane(arith.shli(self.value, self._other(y)))

    def __rshift__(self, y: int) -> Lane:
        return self if y == 0 else Lane(arith.shrui(self.value, self._other(y)))

    def __lt__(self, y: Lane | int) -> Lane:
        return Lane(arith.cmpi(_LESS, self.value, self._other(y)))

    def with_bits(self, keep: int, add: int) -> Lane:
        """The bits of a mask, and those of `add` beside them, in one instruction."""
        asm = f"lop3.b32 $0, $1, {keep:#x}, {add:#x}, 0xEA;"
        return Lane(utils.inline_ptx(asm, self.value, result_types=_type("i32")))

    def fma(self, y: Lane, z: Lane) -> Lane:
        """self * y + z, rounded once."""
        asm = "fma.rn.f32 $0, $1, $2, $3;"
        f32 = _type("f32")
        return Lane(utils.inline_ptx(asm, self.value, y.value, z.value, result_types=f32))

    def max(self, y: Lane) -> Lane:
        """The larger float, NaN if one of them is."""
        asm = "max.NaN.f32 $0, $1, $2;"
        return Lane(utils.inline_ptx(asm, self.value, y.value, result_types=_type("f32")))

    def exp2(self) -> Lane:
        """2 ** self, to about 22 bits."""
        asm = "ex2.approx.ftz.f32 $0, $1;"
        return Lane(utils.inline_ptx(asm, self.value, result_types=_type("f32")))

    def wide(self) -> Lane:
        """The unsigned value in 64 bits."""
        return Lane(arith.extui(_type("i64"), self.value))

    def as_float(self) -> Lane:
        """The same 32 bits read as a float."""
        return Lane(arith.bitcast(_type("f32"), self.value))

    def as_integer(self) -> Lane:
        """The same 32 bits read as an integer."""
        return Lane(arith.bitcast(_type("i32"), self.value))

    def reciprocal(self) -> Lane:
        """1 / self, correctly rounded."""
        asm = "rcp.rn.f32 $0, $1;"
        return Lane(utils.inline_ptx(asm, self.value, result_types=_type("f32")))


def integer(x: int) -> Lane:
    """A constant of 32 bits."""
    return Lane(utils.c(x, _type("i32")))


def floating(x: float) -> Lane:
    """A constant in float32."""
    return Lane(utils.c(x, _type("f32")))


def thread() -> Lane:
    """Index of this thread in its CTA, which has one dimension."""
    return Lane(arith.index_castui(_type("i32"), gpu.thread_id(gpu.Dimension.x)))


def cta(axis: str) -> Lane:
    """Index of this CTA along "x" (the last grid axis) or "y" (the one before)."""
    return Lane(arith.index_castui(_type("i32"), gpu.block_id(getattr(gpu.Dimension, axis))))


def select(condition: Lane, yes: Lane, no: Lane) -> Lane:
    """`yes` where the condition holds, otherwise `no`."""
    return Lane(arith.select(condition.value, yes.value, no.value))


def global_address(ref: Any) -> Lane:
    """Address of the first byte of an array in GPU memory."""
    return Lane(llvm.ptrtoint(_type("i64"), utils.memref_ptr(ref)))


def shared_address(ref: Any) -> Lane:
    """Address of the first byte of an array in shared memory."""
    return Lane(llvm.ptrtoint(_type("i32"), utils.memref_ptr(ref)))


def load(address: Lane, nbytes: int) -> tuple[Lane, ...]:
    """Reads 1, 2, 4, 8 or 16 bytes that no thread of this kernel writes, as 32-bit words."""
    i16, i32 = _type("i16"), _type("i32")
    if nbytes < 4:
        kind = {1: "u8", 2: "u16"}[nbytes]
        asm = f"ld.global.nc.{kind} $0, [$1];"
        return (Lane(arith.extui(i32, utils.inline_ptx(asm, address.value, result_types=i16))),)
    n = nbytes // 4
    if n == 1:
        asm = "ld.global.nc.b32 $0, [$1];"
        return (Lane(utils.inline_ptx(asm, address.value, result_types=i32)),)
    regs = ", ".join(f"${i}" for i in range(n))
    asm = f"ld.global.nc.v{n}.b32 {{{regs}}}, [${n}];"
    words = utils.inline_ptx(asm, address.value, result_types=[i32] * n)
    return tuple(Lane(w) for w in words)


def store(address: Lane, words: list[Lane], where: Lane | None = None) -> None:
    """Writes 1, 2 or 4 words of 32 bits; with a condition only where it holds, without a branch."""
    n = len(words)
    vector = f".v{n}" if n > 1 else ""
    regs = ", ".join(f"${i + 1}" for i in range(n))
    regs = f"{{{regs}}}" if n > 1 else regs
    asm, operands = f"st.global{vector}.b32 [$0], {regs};", [address.value]
    operands += [w.value for w in words]
    if where is not None:
        asm = f"{{ .reg .pred p; setp.ne.b32 p, ${n + 1}, 0; @p {asm} }}"
        operands.append(arith.extui(_type("i32"), where.value))
    utils.inline_ptx(asm, *operands, has_side_effects=True)


def shared_load(address: Lane) -> Lane:
    """Reads a word of 32 bits from shared memory."""
    asm = "ld.shared.b32 $0, [$1];"
    i32 = _type("i32")
    return Lane(utils.inline_ptx(asm, address.value, result_types=i32, has_side_effects=True))


def shared_store(address: Lane, word: Lane) -> None:
    """Writes a word of 32 bits to shared memory."""
    asm = "st.shared.b32 [$0], $1;"
    utils.inline_ptx(asm, address.value, word.value, has_side_effects=True)


def permute_bytes(a: Lane, b: Lane, selector: Lane | int) -> Lane:
    """The word whose byte i is byte `(selector >> 4 i) & 7` of the eight bytes of a, then b."""
    i32 = _type("i32")
    if isinstance(selector, Lane):
        asm, more = "prmt.b32 $0, $1, $2, $3;", (selector.value,)
    else:
        asm, more = f"prmt.b32 $0, $1, $2, {selector};", ()
    return Lane(utils.inline_ptx(asm, a.value, b.value, *more, result_types=i32))


def largest_of(x: list[Lane], lanes: int, at_least: float) -> Lane:
    """The largest magnitude among the floats of `lanes` neighbouring threads.

    `lanes` is a power of two, and all threads of the warp must execute this. Positive floats are compared
    by their bits, whose order is the same.
    """
    bits = [y.as_integer() & 0x7FFFFFFF for y in x]
    bits.append(Lane(utils.c(at_least, _type("f32"))).as_integer())
    most = bits[0]
    for y in bits[1:]:
        most = Lane(arith.maxui(most.value, y.value))
    while lanes > 1:
        lanes //= 2
        most = Lane(arith.maxui(most.value, exchanged(most, lanes).value))
    return most.as_float()


def exchanged(word: Lane, apart: int) -> Lane:
    """The word of the thread of this warp whose index differs in the bit `apart`."""
    asm = "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;"
    operands = word.value, integer(apart).value
    return Lane(utils.inline_ptx(asm, *operands, result_types=_type("i32"), has_side_effects=True))


def bf16_pair(low: Lane, high: Lane) -> Lane:
    """Two floats rounded to bf16 in one word."""
    asm = "cvt.rn.bf16x2.f32 $0, $1, $2;"
    return Lane(utils.inline_ptx(asm, high.value, low.value, result_types=_type("i32")))


@dataclasses.dataclass(frozen=True)
class Halves:
    """Two float16 numbers in one word of 32 bits, with arithmetic on both at once."""

    word: Lane

    def _two(self, name: str, *others: Halves) -> Halves:
        operands = ", ".join(f"${i + 1}" for i in range(1 + len(others)))
        values = [x.word.value for x in (self, *others)]
        asm = f"{name}.f16x2 $0, {operands};"
        return Halves(Lane(utils.inline_ptx(asm, *values, result_types=_type("i32"))))

    def __add__(self, y: Halves) -> Halves:
        return self._two("add.rn", y)

    def __mul__(self, y: Halves) -> Halves:
        return self._two("mul.rn", y)

    def __sub__(self, y: Halves) -> Halves:
        return self._two("sub.rn", y)

    def fma(self, y: Halves, z: Halves) -> Halves:
        """self * y + z, rounded once."""
        return self._two("fma.rn", y, z)

    def fma_or_zero(self, y: Halves, z: Halves) -> Halves:
        """self * y + z, rounded once, and zero where that is negative."""
        return self._two("fma.rn.relu", y, z)

    def max(self, y: Halves) -> Halves:
        """The larger numbers, NaN where one of them is."""
        return self._two("max.NaN", y)

    def floats(self) -> tuple[Lane, Lane]:
        """The two numbers in float32."""
        words = self.word, self.word >> 16
        parts = [arith.bitcast(_type("f16"), arith.trunci(_type("i16"), w.value)) for w in words]
        low, high = (Lane(arith.extf(_type("f32"), x)) for x in parts)
        return low, high

    def swapped(self) -> Halves:
        """The two numbers in the other order."""
        return Halves(permute_bytes(self.word, self.word, 0x1032))

    def minus(self) -> Halves:
        """The two numbers with the other sign."""
        return Halves(self.word ^ -0x7FFF8000)


def halves(low: Lane, high: Lane) -> Halves:
    """Two floats rounded to float16."""
    asm = "cvt.rn.f16x2.f32 $0, $1, $2;"
    return Halves(Lane(utils.inline_ptx(asm, high.value, low.value, result_types=_type("i32"))))


def halves_below(x: Lane) -> Halves:
    """The largest float16 number that is not above a float, twice."""
    asm = "cvt.rm.f16.f32 $0, $1;"
    half = Lane(
        arith.extui(_type("i32"), utils.inline_ptx(asm, x.value, result_types=_type("i16")))
    )
    return Halves(permute_bytes(half, half, 0x1010))


def e4m3_word(x: list[Lane]) -> Lane:
    """Four floats rounded to e4m3, saturating at 448."""
    asm = "cvt.rn.satfinite.e4m3x2.f32"
    asm = f"{{ .reg .b16 a, b; {asm} a, $2, $1; {asm} b, $4, $3; mov.b32 $0, {{a, b}}; }}"
    return Lane(utils.inline_ptx(asm, *(y.value for y in x), result_types=_type("i32")))


def e4m3_words(x: list[Halves]) -> list[Lane]:
    """Pairs rounded to e4m3, saturating at 448; four numbers in a word."""
    asm = "cvt.rn.satfinite.e4m3x2.f16x2 $0, $1;"
    i16, i32 = _type("i16"), _type("i32")
    pairs = [
        Lane(arith.extui(i32, utils.inline_ptx(asm, h.word.value, result_types=i16))) for h in x
    ]
    return [permute_bytes(a, b, 0x5410) for a, b in zip(pairs[0::2], pairs[1::2], strict=True)]
