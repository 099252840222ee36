"""Rounding that the compiler must not skip."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def round_to(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """The float32 values of x rounded to `dtype`.

    XLA may keep a float32 -> bfloat16 -> float32 round trip in float32; this one it may not, so
    chains of bfloat16 operations give the same bits on every backend.

    Args:
        x: any floating-point array.
        dtype: no wider than float32.
    """
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)
