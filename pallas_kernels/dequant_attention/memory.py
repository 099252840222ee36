"""What a block of the attention kernel finds in GPU memory, keeps in shared memory, and meets at."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dequant_attention.sizes import ROWS, Form

__all__ = ["Arrays", "Shared", "scratch"]


class Arrays(NamedTuple):
    """In GPU memory."""

    q: Any
    factor: Any  # of the logits of a query
    k: Any
    v: Any
    control: Any  # how many keys are valid
    k_unit: Any
    v_unit: Any
    acc: Any  # weighted values, their maxima and sums
    top: Any
    total: Any


class Shared(NamedTuple):
    """In shared memory, in the order in which it lies there: tiles in flight, queries, barriers."""

    k_empty: Any
    k_full: Any
    k: Any
    q_empty: Any
    q_full: Any
    q: Any  # of two warpgroups
    turn: Any  # of the two warpgroups at the matrix units
    v_empty: Any
    v_full: Any
    v: Any


def scratch(form: Form) -> Shared:
    """What is in shared memory; in e4m3 values have their tokens in a row."""
    stages, tile, d = form.stages, form.tile, form.head_dim

    def array(*shape: int) -> Any:
        # Lines of 128 bytes, or of a row if it is shorter: 64 channels in e4m3.
        size = jnp.dtype(form.dtype).itemsize
        line = min(128, shape[-1] * size)
        transforms = plgpu.TilingTransform((8, line // size)), plgpu.SwizzleTransform(line)
        return plgpu.SMEM(shape, form.dtype, transforms=transforms)

    return Shared(
        q=array(2, ROWS, d),
        k=array(stages, tile, d),
        v=array(stages, *((d, tile) if form.narrow else (tile, d))),
        q_full=plgpu.Barrier(num_barriers=2),
        q_empty=plgpu.Barrier(num_barriers=2),
        k_full=plgpu.Barrier(num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        k_empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=2),
    )
