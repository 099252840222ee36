"""Triton kernels without a GPU: compiled for any GPU, or interpreted on NumPy arrays."""

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

# Compute capability: bytes of shared memory that a program may have (CUDA programming guide,
# technical specifications per compute capability).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
SHARED = {cc: kib * 1024 for cc, kib in SHARED.items()}

_TYPES = {
    "bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32", "uint8": "*u8", "int8": "*i8",
}  # fmt: skip


class Usage(NamedTuple):
    """Registers and bytes of spills of a thread, and bytes of shared memory of a program."""

    registers: int
    spills: int
    shared: int


def compiled(launch: Any, operands: Any, out: Any, cc: int) -> Any:
    """The kernel compiled for compute capability cc, e.g. 86, as jax_triton would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arrays = [_TYPES[x.dtype.name] for x in (*operands, *jax.tree.leaves(out))]
    names = launch.kernel.arg_names
    assert len(names) == len(arrays) + len(launch.constants)
    signature = dict(zip(names, arrays, strict=False)) | dict.fromkeys(
        launch.constants, "constexpr"
    )
    source = ASTSource(
        fn=launch.kernel,
        signature={n: signature[n] for n in names},
        constexprs={(names.index(n),): v for n, v in launch.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(arrays))},
    )
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=launch.options)


def usage(kernel: Any) -> Usage:
    """Registers and spills from the binary; local memory is nothing but spills in these kernels."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], kernel.metadata.shared)


class _Tensor:
    """A tensor for Triton's interpreter over the memory of a NumPy array."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Tensor":
        return self

    cpu = untyped_storage

    def new_empty(self, *_: Any, **__: Any) -> "_Tensor":
        return _Tensor(self.array)

    def set_(self, storage: "_Tensor", *_: Any) -> None:
        self.array = storage.array

    def copy_(self, _: Any) -> None:
        """Nothing to do: the kernel worked on the array itself."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    stride = size


def run_interpreted(launch: Any, *operands: Any, out: Any) -> Any:
    """Runs a launch in Triton's interpreter; the results are NumPy arrays.

    References among the operands are updated as on a GPU.
    """
    from triton.runtime.interpreter import InterpretedFunction

    refs = [isinstance(x, jax.Ref) for x in operands]
    arrays = [np.array(x[...] if is_ref else x) for x, is_ref in zip(operands, refs, strict=True)]
    # Every output starts as NaN or 255, so that what is not written shows.
    outs = jax.tree.map(
        lambda s: np.full(s.shape, 255 if np.issubdtype(s.dtype, np.integer) else np.nan, s.dtype),
        out,
    )
    tensors = [_Tensor(x) for x in (*arrays, *jax.tree.leaves(outs))]
    InterpretedFunction(launch.kernel.fn)[launch.grid](*tensors, **launch.constants)
    for x, array, is_ref in zip(operands, arrays, refs, strict=True):
        if is_ref:
            x[...] = array
    return outs


@contextlib.contextmanager
def interpreted(*modules: Any) -> Iterator[None]:
    """Kernels of these modules are interpreted, and need not be compiled."""
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang
    from triton.runtime.jit import JITFunction

    def call(function: Any, *args: Any, **named: Any) -> Any:
        """One kernel calls another; unlike Triton's own, it leaves the language as it was."""
        scope = _patch_lang(function.fn)
        try:
            return InterpretedFunction(function.fn).rewrite()(*args, **named)
        finally:
            scope.restore()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__call__", call)
        for module in modules:
            own = type("Interpreted", (module.Launch,), {"__call__": run_interpreted})
            patch.setattr(module, "Launch", own)
        yield
