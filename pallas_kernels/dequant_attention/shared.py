"""What a block of the attention kernel keeps in shared memory, and the barriers it meets at."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["scratch"]


def scratch(rows: int, tile: int, stages: int, head_dim: int, dtype: Any) -> dict[str, Any]:
    """Queries of two warpgroups, tiles of keys and values in flight, and their barriers.

    Args:
        rows: queries of a warpgroup.
        tile: keys of a tile.
        stages: tiles of K and of V in flight.
        head_dim: channels.
        dtype: of queries, keys and values; in e4m3 values have their tokens in a row.
    """
    narrow = dtype != jnp.bfloat16

    def array(*shape: int) -> Any:
        # Lines of 128 bytes, or of a row if it is shorter: 64 channels in e4m3.
        size = jnp.dtype(dtype).itemsize
        line = min(128, shape[-1] * size)
        transforms = plgpu.TilingTransform((8, line // size)), plgpu.SwizzleTransform(line)
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    return dict(
        q_s=array(2, rows, head_dim),
        k_s=array(stages, tile, head_dim),
        v_s=array(stages, *((head_dim, tile) if narrow else (tile, head_dim))),
        q_full=plgpu.Barrier(num_barriers=2),
        q_empty=plgpu.Barrier(num_barriers=2),
        k_full=plgpu.Barrier(num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        k_empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=2),
    )
