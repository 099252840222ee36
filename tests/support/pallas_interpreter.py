"""Pallas's interpreter of GPU kernels: everything that the tests take from JAX's private modules.

The interpreter has no products with an operand in registers, no accumulators and no operations on the
registers of a thread. So accumulators become plain arrays, products become dot products of the operands, and
columns are folded as slices of arrays. The rest is as on a GPU: warpgroups that wait for each other at
barriers, tiles that are loaded and released, the state in place.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    params,
    shared_memory,
)
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dequant_attention import probabilities, warpgroups
from pallas_kernels.dequantize.reference import key_row_of_token
from pallas_kernels.kmeans import mosaic_gpu as kmeans
from pallas_kernels.quantize_pack import levels
from tests.support.kernel_cases import E4M3

__all__ = ["interpreted_attention", "interpreted_encoding"]


class _Accumulator:
    def __init__(self, x: Array):
        self.x = x

    def __getitem__(self, _: Any) -> Array:
        return self.x

    def add(self, left: Any, right: Any) -> None:
        """Operands are references, which hold an array, or arrays."""
        left, right = (x[...].astype(jnp.float32) for x in (left, right))
        # Tensor cores read as copies write, and need no fence between; loads, which are here, do.
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


class _Shape:
    """In place of `plgpu.ACC`: the shape of an accumulator, or the array that it begins with."""

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


def _multiply_into(acc: Array, left: Array, right: Any) -> Array:
    return acc + jnp.dot(left.astype(jnp.float32), right[...].astype(jnp.float32))


def _fold(x: Array, op: Any, width: int) -> Array:
    while (half := x.shape[1] // 2) >= width:
        x = op(x[:, :half], x[:, half:])
    return x


def _probabilities(s: Array, m: Array, scale: Array) -> tuple[Array, Array]:
    """Probabilities in e4m3 by their definition, and the new m; two numbers a word."""
    m_new = jnp.maximum(m, s.max(axis=1) * scale - probabilities.SHIFT)
    return _words(jnp.exp2(s * scale[:, None] - m_new[:, None])), m_new


def _words(p: Array) -> Array:
    """Words of four columns in e4m3, as on a GPU, but of neighbours."""
    return lax.bitcast_convert_type(p.astype(E4M3).reshape(p.shape[0], -1, 4), jnp.int32)


def _in_tokens(words: Array, dtype: Any) -> Array:
    """Probabilities, whose columns are rows of keys, in the order of the values."""
    p = lax.bitcast_convert_type(words, dtype).reshape(words.shape[0], -1)
    return jnp.take(p, key_row_of_token(p.shape[1]), axis=1)


def _let_go(barrier: Any) -> None:
    """Ends a barrier as the interpreter does, also in a phase for which nobody waits."""
    with barrier.cv:
        barrier.ref_count -= 1


@contextlib.contextmanager
def interpreted_attention(monkeypatch: Any) -> Iterator[None]:
    """The attention kernel runs in the interpreter, which must find no race in any call."""
    calls, state_of = [], gpu_callbacks.GPURaceDetectionState

    def noted(*args: Any, **more: Any) -> Any:
        calls.append(state_of(*args, **more))
        return calls[-1]

    pl, gpu = (SimpleNamespace(**vars(m)) for m in (warpgroups.pl, warpgroups.plgpu))
    pl.run_scoped, pl.run_state = _Accumulator.scoped, _Accumulator.state
    gpu.wgmma, gpu.ACC = _Accumulator.add, _Shape
    with monkeypatch.context() as patch:
        for name, fake in dict(
            pl=pl,
            plgpu=gpu,
            product=_product,
            fold=_fold,
            probabilities=_probabilities,
            columns=lambda x, start, stop: x[:, start:stop],
            left_operand=_in_tokens,
        ).items():
            patch.setattr(warpgroups, name, fake)
        patch.setattr(shared_memory.Barrier, "deallocate", _let_go)
        patch.setattr(gpu_callbacks, "GPURaceDetectionState", noted)
        with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
            yield
            jax.effects_barrier()  # calls may still run
    assert calls and not any(c.races_found for c in calls)


@contextlib.contextmanager
def interpreted_encoding(monkeypatch: Any) -> Iterator[None]:
    """The encoding kernels run in the interpreter, which must find no race in the last call."""
    with monkeypatch.context() as patch:
        patch.setattr(kmeans, "multiply_into", _multiply_into)
        for module in (kmeans, levels):
            patch.setattr(module, "fold", _fold)
        with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
            yield
            assert not interpret_pallas_call.get_races().races_found
