"""A machine for kernels written in `pallas_kernels.gpu.lanes`: all threads at once, in numpy.

Pallas cannot interpret such kernels. They use few operations, though, each of which is a line of numpy; so
their numbers can be compared without a GPU. The machine is strict: an access must be aligned and lie inside an
array, no byte is written twice, threads of a warp exchange numbers only if all of them are there, and it notes
how many words of a bank of shared memory a warp asks for.
"""

import contextlib
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dequant_attention import queries
from pallas_kernels.dequantize import mosaic_gpu
from pallas_kernels.gpu import lanes

__all__ = ["Machine"]

_NUMPY = {
    "i1": np.bool_, "i16": np.uint16, "i32": np.uint32, "i64": np.uint64, "f16": np.float16, "f32": np.float32
}  # fmt: skip
_THREADS, _WARP, _GAP = 128, 32, 1 << 12  # of a CTA, of a warp; bytes between arrays


class Value(NamedTuple):
    """One number of every thread."""

    x: np.ndarray
    type: str


def _value(x: Any, kind: str) -> Value:
    return Value(np.asarray(x).astype(_NUMPY[kind], copy=False), kind)


def _on(f: Any) -> Any:
    """The operation on two values of a type that f is on arrays."""
    return lambda a, b: _value(f(a.x, b.x), a.type)


def _constant(x: float, kind: str) -> Value:
    return _value(x if kind == "f32" else x & (1 << int(kind[1:])) - 1, kind)


def _halves(x: np.ndarray, kind: Any = np.float16) -> np.ndarray:
    return np.ascontiguousarray(x).view(kind).reshape(*x.shape, 2)


def _permuted(a: np.ndarray, b: np.ndarray, selector: Any) -> np.ndarray:
    both, out = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.uint64(0)
    for i in range(4):
        byte = (selector >> np.uint64(4 * i)) & np.uint64(7)
        out = out | (both >> (byte * np.uint64(8)) & np.uint64(255)) << np.uint64(8 * i)
    return out


def _e4m3(x: np.ndarray, kind: Any = np.uint16) -> np.ndarray:
    """Numbers in e4m3, as many in a row as a number of that kind has bytes."""
    fp8 = np.clip(x.astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return np.ascontiguousarray(fp8).view(kind)[..., 0]


def _float16(x: np.ndarray) -> np.ndarray:
    """Numbers in float16; a NaN has the bits that GPUs give it."""
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(x.astype(np.float16))
    return np.where(np.isnan(half), np.uint16(0x7FFF).view(np.float16), half)


def _half_below(x: np.ndarray) -> np.ndarray:
    half = _float16(x)
    return np.where(half > x, np.nextafter(half, np.float16(-np.inf)), half).view(np.uint16)


def _garbage(x: Any) -> np.ndarray:
    return np.full(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize, 0x5A, np.uint8)


class Machine:
    """Runs the kernels that decode, and the one that groups queries, while it is installed.

    Attributes:
        reads, writes: the most words of one bank of shared memory that a warp asked for at once.
    """

    def __init__(self) -> None:
        self.reads = self.writes = 0

    def install(self, monkeypatch: Any) -> None:
        dimension = SimpleNamespace(x=0, y=1)
        thread = lambda _: Value(self.thread, "i64")  # noqa: E731
        pallas = SimpleNamespace(
            kernel=self._kernel, RefType=object, SMEM=lambda shape, dtype: shape,
            inline_mgpu=lambda arg_types: lambda f: lambda *refs: f(None, *refs),
            CompilerParams=plgpu.CompilerParams, LoweringSemantics=plgpu.LoweringSemantics,
        )  # fmt: skip
        for module, name, fake in (
            (lanes, "_type", str),
            (lanes, "utils", self._utils()),
            (lanes, "arith", self._arith()),
            (lanes, "gpu", SimpleNamespace(
                Dimension=dimension, thread_id=thread, block_id=lambda i: self.cta[i]
            )),
            (lanes, "llvm", SimpleNamespace(ptrtoint=lambda t, p: _constant(p, t))),
            (mosaic_gpu, "utils", self._utils()),
            (mosaic_gpu, "plgpu", pallas),
            (queries, "plgpu", pallas),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, fake)

    @staticmethod
    def _arith() -> SimpleNamespace:
        cast = lambda kind, x: _value(x.x, str(kind))  # noqa: E731
        return SimpleNamespace(
            addi=_on(np.add), addf=_on(np.add), subi=_on(np.subtract), subf=_on(np.subtract),
            muli=_on(np.multiply), mulf=_on(np.multiply), divui=_on(np.floor_divide),
            remui=_on(np.remainder), andi=_on(np.bitwise_and), ori=_on(np.bitwise_or),
            xori=_on(np.bitwise_xor), shli=_on(np.left_shift), shrui=_on(np.right_shift),
            maxui=_on(np.maximum),
            cmpi=lambda _, a, b: Value(a.x.view(np.int32) < b.x.view(np.int32), "i1"),
            bitcast=lambda kind, a: Value(a.x.view(_NUMPY[kind]), kind),
            select=lambda c, a, b: Value(np.where(c.x, a.x, b.x), a.type),
            extui=cast, index_castui=cast, trunci=cast, extf=cast,
        )  # fmt: skip

    def _utils(self) -> SimpleNamespace:
        return SimpleNamespace(
            c=_constant, memref_ptr=lambda ref: ref, warpgroup_barrier=lambda: None,
            inline_ptx=self._ptx, when=self._when,
        )  # fmt: skip

    @contextlib.contextmanager
    def _when(self, condition: Value) -> Any:
        before, self.active = self.active, self.active & condition.x
        yield
        self.active = before

    def one_cta(self) -> None:
        """The threads of one CTA, for functions of lanes outside of a kernel."""
        self.thread = np.arange(_THREADS, dtype=np.uint64)
        self.active = np.ones(_THREADS, bool)

    def _kernel(self, body: Any, *, out_type: Any, grid: Any, scratch_types: Any = (), **_: Any):
        """A kernel that runs here; outputs begin as garbage, and references begin as they are."""
        alone = not isinstance(out_type, list | tuple)
        out_types = [out_type] if alone else list(out_type)

        def run(*operands: Any) -> Any:
            refs = [x for x in operands if isinstance(x, jax.Ref)]
            contents = [np.asarray(x[...] if isinstance(x, jax.Ref) else x) for x in operands]
            contents += [_garbage(x) for x in out_types]
            self._lay_out(contents)
            self.inputs = self.places[: len(operands) - len(refs)]
            self.outputs = self.places[len(self.inputs) :]
            ctas = int(np.prod(grid))
            shared = 4 * int(np.prod(scratch_types[0])) if scratch_types else 0
            self.shared = np.full((ctas, shared), 0xAA, np.uint8)
            self.owner, self.thread = np.divmod(
                np.arange(ctas * _THREADS, dtype=np.uint64), np.uint64(_THREADS)
            )
            y, x = np.divmod(self.owner, np.uint64(grid[-1]))
            self.cta, self.active = [Value(x, "i64"), Value(y, "i64")], np.ones(x.shape, bool)
            body(*(start for start, _ in self.places), *(0 for _ in scratch_types))
            results = [
                jnp.asarray(self.memory[start:end].view(x.dtype).reshape(x.shape))
                for (start, end), x in zip(self.outputs, [*refs, *out_types], strict=True)
            ]
            for ref, x in zip(refs, results, strict=False):
                ref[...] = x
            results = results[len(refs) :]
            return results[0] if alone else results

        return run

    def _lay_out(self, arrays: list[np.ndarray]) -> None:
        self.places, size = [], _GAP
        for x in arrays:
            self.places.append((size, size + x.nbytes))
            size += -(-x.nbytes // 256) * 256 + _GAP
        self.memory, self.written = np.zeros(size, np.uint8), np.zeros(size, bool)
        for (start, end), x in zip(self.places, arrays, strict=True):
            self.memory[start:end] = np.frombuffer(x.tobytes(), np.uint8)

    def _bytes(self, address: Value, nbytes: int, where: np.ndarray, ends: Any) -> np.ndarray:
        """The bytes (threads, nbytes) that the threads of `where` access."""
        at = np.broadcast_to(address.x, self.thread.shape)[where].astype(np.int64)
        inside = np.zeros(at.shape, bool)
        for start, end in ends:
            inside |= (at >= start) & (at + nbytes <= end)
        assert inside.all(), f"{nbytes} bytes at {at[~inside][:4]} are in none of {ends}"
        assert not (at % nbytes).any(), f"{nbytes} bytes at {at[at % nbytes > 0][:4]}"
        return at[:, None] + np.arange(nbytes)

    def _ptx(self, asm: str, *operands: Value, result_types: Any = None, **_: Any) -> Any:
        x = [o.x for o in operands]
        name = asm.split()[0]
        if name.startswith("ld.global"):
            words, kind = (re.search(p, name) for p in (r"\.v(\d)", r"\.([a-z]\d+)$"))
            count, nbytes = int(words[1]) if words else 1, int(kind[1][1:]) // 8
            out = np.zeros((*self.thread.shape, count * nbytes), np.uint8)
            out[self.active] = self.memory[
                self._bytes(operands[0], count * nbytes, self.active, self.inputs)
            ]
            kinds = result_types if isinstance(result_types, list) else [result_types]
            out = out.view(np.uint16 if nbytes == 2 else np.uint32 if nbytes == 4 else np.uint8)
            values = [_value(out[:, i], kind) for i, kind in enumerate(kinds)]
            return values if isinstance(result_types, list) else values[0]
        if "st.global" in asm:
            return self._store(asm, operands)
        if "shared" in name:
            return self._share(operands)
        if name == "shfl.sync.bfly.b32":
            return self._shuffled(operands[0], int(operands[1].x))
        if name.startswith("prmt"):
            given = re.search(r"(0x[0-9a-f]+|\d+);$", asm) if len(x) == 2 else None
            selector = np.uint64(int(given[1], 0)) if given else x[2].astype(np.uint64)
            return _value(_permuted(x[0], x[1], selector), "i32")
        if name.startswith("cvt.rn.satfinite.e4m3x2"):
            return _value(_e4m3(_halves(x[0])), "i16")
        if "e4m3x2.f32" in asm:
            return _value(_e4m3(np.stack(np.broadcast_arrays(*x), -1), np.uint32), "i32")
        if name == "cvt.rm.f16.f32":
            return _value(_half_below(x[0]), "i16")
        if name == "lop3.b32":
            keep, add = (np.uint32(int(n, 0)) for n in re.findall(r"0x[0-9a-f]+", asm)[:2])
            return _value((x[0] & keep) | add, "i32")
        if name.startswith("cvt.rn"):
            pair = np.stack(np.broadcast_arrays(x[1], x[0]), -1)
            pair = pair.astype(ml_dtypes.bfloat16) if "bf16x2" in name else _float16(pair)
            return _value(pair.view(np.uint32)[..., 0], "i32")
        wide = [(_halves(v) if "f16x2" in name else v).astype(np.float64) for v in x]
        done = {
            "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
            "fma": lambda a, b, c: a * b + c, "rcp": lambda a: 1 / a, "max": np.maximum, "ex2": np.exp2,
        }[name[:3]](*wide)  # fmt: skip
        if "relu" in name:
            done = np.maximum(done, 0)
        if "f16x2" not in name:
            return _value(done, "f32")
        return _value(_float16(done).view(np.uint32)[..., 0], "i32")

    def _store(self, asm: str, operands: Any) -> None:
        words = int((re.search(r"\.v(\d)", asm) or (0, 1))[1])
        where = self.active
        if "setp" in asm:
            where = where & (operands[-1].x != 0)
        at = self._bytes(operands[0], 4 * words, where, self.outputs)
        assert not self.written[at].any() and np.unique(at).size == at.size, "written twice"
        self.written[at] = True
        data = [np.broadcast_to(o.x, self.thread.shape)[where] for o in operands[1 : 1 + words]]
        self.memory[at] = np.stack(data, -1).view(np.uint8).reshape(at.shape)

    def _shuffled(self, a: Value, apart: int) -> Value:
        """The number of the thread of the same warp whose index differs in the bit `apart`."""
        there = self.active.reshape(-1, _WARP)
        assert (there.all(1) == there.any(1)).all(), "threads are waited for that are elsewhere"
        lane = np.arange(_WARP)
        warps = np.broadcast_to(a.x, self.thread.shape).reshape(-1, _WARP)
        return Value(warps[:, lane ^ apart].reshape(-1), a.type)

    def _share(self, operands: Any) -> Any:
        at = self._bytes(operands[0], 4, self.active, [(0, self.shared.shape[1])])
        owner = self.owner[self.active][:, None].astype(np.int64)
        bank = (at[:, 0] // 4 % 32).reshape(-1, _WARP)
        most = max((np.bincount(b).max() for b in bank), default=0)
        if len(operands) == 2:
            self.writes = max(self.writes, most)
            word = np.broadcast_to(operands[1].x, self.thread.shape)[self.active]
            self.shared[owner, at] = word[:, None].view(np.uint8)
            return None
        self.reads = max(self.reads, most)
        out = np.zeros(self.thread.shape, np.uint32)
        out[self.active] = self.shared[owner, at].view(np.uint32)[:, 0]
        return Value(out, "i32")
