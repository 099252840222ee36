"""Compilation of a program's Mosaic kernels at the same time as that of the program.

XLA comes to the kernels of a program last, and compiles one after the other: eight seconds of an attention step's
thirty. Mosaic keeps compiled kernels in the process by their hash. So each kernel of a lowered program
is compiled by a small program of its own in a thread, while XLA does all else, and XLA finds it there.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir

__all__ = ["compiled_beside", "kernels_of"]

TARGET = "mosaic_gpu_v2"
THREADS = 4
# A program that JAX finds on disk is there within so many seconds, and then nothing is to be compiled.
WAIT = 2.0

_log = logging.getLogger(__name__)
_compiled: set[bytes] = set()  # hashes of kernels


def kernels_of(lowered: Any) -> dict[bytes, dict[str, Any]]:
    """Returns what Mosaic is told of each kernel of a program (`jax.stages.Lowered`), by the kernel's hash."""
    found: dict[bytes, dict[str, Any]] = {}

    def look(op: Any) -> ir.WalkResult:
        attributes = op.attributes
        if op.name == "stablehlo.custom_call" and attributes["call_target_name"].value == TARGET:
            told = {a.name: _python(a.attr) for a in attributes["mhlo.backend_config"]}
            found.setdefault(told["kernel_hash"], told)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(look)
    return found


def _python(attribute: Any) -> Any:
    return attribute.value_bytes if isinstance(attribute, ir.StringAttr) else attribute.value


def _alone(told: dict[str, Any]) -> Any:
    """Returns a jitted program of nothing but a kernel, to be compiled and never run: it has no operands."""
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((1,), jnp.float32), has_side_effect=True)
    return jax.jit(lambda: call(**told))


@contextlib.contextmanager
def compiled_beside(lowered: Any, *, wait: float = WAIT) -> Iterator[None]:
    """Compiles the kernels of a program in threads, while the body of the `with` compiles the program.

    A kernel that is compiled stays so in the process, and is not compiled again. If one fails, XLA meets the
    error again, and raises it. When the body ends kernels that have begun still end, as does the process.

    Args:
        lowered: the program, for a GPU.
        wait: seconds before the first kernel; if the body ends before, none is compiled.
    """
    kernels = {h: told for h, told in kernels_of(lowered).items() if h not in _compiled}
    done, start = threading.Event(), time.monotonic() + wait

    def one(key: bytes) -> None:
        if done.wait(max(0, start - time.monotonic())):
            return
        try:
            _alone(kernels[key]).lower().compile()
            _compiled.add(key)
        except Exception:
            _log.debug("a kernel did not compile by itself", exc_info=True)

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="kernels")
    for key in sorted(kernels, key=lambda key: -len(kernels[key]["module"])):  # the longest first
        pool.submit(one, key)
    try:
        yield
    finally:
        done.set()
        pool.shutdown(wait=False, cancel_futures=True)
