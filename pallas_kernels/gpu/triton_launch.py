"""Launches of Triton kernels from JAX, and the packages that they need.

Triton compiles for the GPU that it finds, Ampere and later; jax_triton makes the kernel a call in an XLA
program. Neither is a dependency of this package: they are asked for when a Triton kernel is named.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

__all__ = ["Launch", "missing"]

_OLDEST_TRITON = (3, 7)  # jax_triton 0.4.1 imports with older ones, and fails when it compiles


@functools.cache
def missing() -> str | None:
    """A message that names the packages Triton kernels need and that are absent or too old, or None."""
    absent = [n for n in ("triton", "jax_triton") if importlib.util.find_spec(n) is None]
    if absent:
        return f"Triton kernels need {' and '.join(absent)}: pip install 'qvg-jax[gpu]'"
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # built in place
        return None
    parts = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if parts < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"triton is {found}; jax_triton needs {oldest} or newer: pip install -U triton"
    return None


@dataclasses.dataclass(frozen=True)
class Launch:
    """A Triton kernel with everything but its arrays.

    Attributes:
        kernel: a `triton.jit` function of pointers, inputs before outputs, and of constants.
        grid: programs along each axis.
        constants: values of its `tl.constexpr` arguments.
        warps: warps of a program, Triton's word for a CTA.
        stages: tiles in flight in loops that load.

    Products and sums are fused (fma), which Triton from 3.10 on no longer does unasked.
    """

    kernel: Any
    grid: tuple[int, ...]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """The options of the compiler."""
        return dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)

    def __call__(self, *operands: Any, out: Any) -> Any:
        """Runs the kernel; under `vmap` once for each element, one after the other.

        With references among the operands there is no `vmap`.

        Args:
            operands: arrays, or jax references, which the kernel may write.
            out: pytree of shapes and dtypes of the outputs.

        Raises:
            NotImplementedError: jax_triton is not installed.
        """
        if (why := missing()) is not None:
            raise NotImplementedError(f"implementation='triton': {why}")
        from jax_triton import triton_call

        run = functools.partial(
            triton_call,
            kernel=self.kernel,
            out_type=out,
            grid=self.grid,
            backend_options=self.options,
            **self.constants,
        )
        if all(isinstance(x, jax.Array | np.ndarray) for x in operands):  # no references
            run = jax.custom_batching.sequential_vmap(run)  # jax_triton has no rule of its own
        return run(*operands)
