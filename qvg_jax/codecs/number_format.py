"""Short names of number formats: the one spelling of a dtype in settings, names and errors."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

__all__ = ["FormatLike", "dtype_of", "format_name"]

# What a setting such as `scale_dtype` accepts: "e4m3", "bf16", ... or what jax.numpy takes as a dtype.
type FormatLike = DTypeLike

_SHORT = {
    "float8_e4m3fn": "e4m3",
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
}
_LONG = {short: long for long, short in _SHORT.items()}


def format_name(dtype: Any) -> Any:
    """Returns the short name of a dtype: "e4m3", "bf16", "f16", "f32", or jax.numpy's name of another.

    What names no dtype comes back unchanged, so that whoever uses it can say what is accepted.
    """
    if isinstance(dtype, str) and dtype in _LONG:
        return dtype
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        return dtype
    return _SHORT.get(name, name)


def dtype_of(name: Any) -> jnp.dtype:
    """Returns the dtype of a short name, or of anything else that jax.numpy takes as a dtype.

    Raises:
        TypeError: there is no such dtype.
    """
    return jnp.dtype(_LONG.get(name, name) if isinstance(name, str) else name)
