"""The attention kernel in Pallas's interpreter, with products that it can do.

Those with an operand in registers it cannot do. So accumulators become plain arrays, and products dot
products of what operands hold. The rest is as on a GPU: warpgroups that wait for each
other at barriers, tiles that are loaded and released, the state in place.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params, shared_memory
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dequant_attention import warpgroups
from pallas_kernels.dequantize.reference import key_row_of_token

__all__ = ["interpreted"]


class _Accumulator:
    def __init__(self, x: Array):
        self.x = x

    def __getitem__(self, _: Any) -> Array:
        return self.x

    def add(self, left: Any, right: Any) -> None:
        """Operands are references, which hold an array, or arrays."""
        left, right = (x[...].astype(jnp.float32) for x in (left, right))
        # A matrix unit reads as copies write, and needs no fence between; loads, which are here, do.
        plgpu.commit_smem()
        self.x += jnp.dot(left, right)

    @staticmethod
    def scoped(f: Any, shape: tuple[int, int]) -> Any:
        return f(_Accumulator(jnp.zeros(shape, jnp.float32)))

    @staticmethod
    def state(f: Any) -> Any:
        def run(x: Array) -> Array:
            acc = _Accumulator(x)
            f(acc)
            return acc.x

        return run


class _Form:
    """In place of `plgpu.ACC`: the shape of an accumulator, or what it begins with."""

    def __new__(cls, shape: tuple[int, int], dtype: Any) -> Any:
        del dtype
        return shape

    @staticmethod
    def init(x: Array) -> Array:
        return x


def _product(left: Any, right: Any, shape: tuple[int, int]) -> Array:
    acc = _Accumulator(jnp.zeros(shape, jnp.float32))
    acc.add(left, right)
    return acc.x


def _in_tokens(p: Array, dtype: Any) -> Array:
    """Probabilities, whose columns are rows of keys, in the order of the values."""
    del dtype
    return jnp.take(p, key_row_of_token(p.shape[1]), axis=1)


def _let_go(barrier: Any) -> None:
    """As the interpreter does, but some barriers end with a phase for which nobody waits."""
    with barrier.cv:
        barrier.ref_count -= 1


@contextlib.contextmanager
def interpreted(monkeypatch: Any) -> Iterator[None]:
    """The kernel inside runs in the interpreter, which must find no race in any call."""
    calls, state_of = [], gpu_callbacks.GPURaceDetectionState

    def noted(*args: Any, **more: Any) -> Any:
        calls.append(state_of(*args, **more))
        return calls[-1]

    pl, gpu = (SimpleNamespace(**vars(m)) for m in (warpgroups.pl, warpgroups.plgpu))
    pl.run_scoped, pl.run_state = _Accumulator.scoped, _Accumulator.state
    gpu.wgmma, gpu.ACC = _Accumulator.add, _Form
    with monkeypatch.context() as patch:
        for name, fake in dict(
            pl=pl, plgpu=gpu, product=_product, as_words=lambda p: p, left_operand=_in_tokens
        ).items():
            patch.setattr(warpgroups, name, fake)
        patch.setattr(shared_memory.Barrier, "deallocate", _let_go)
        patch.setattr(gpu_callbacks, "GPURaceDetectionState", noted)
        with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
            yield
            jax.effects_barrier()  # calls may still run
    assert calls and not any(c.races_found for c in calls)
