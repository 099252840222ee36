"""Checks of the kinds of arguments: what is no cache, no array or no codec is named with what is accepted."""

from typing import Any

import numpy as np

from qvg_jax.cache.plan import Plan
from qvg_jax.cache.state import KVCache
from qvg_jax.cache.view import CacheView
from qvg_jax.codecs.base import Codec

__all__ = ["check_array", "check_cache", "check_codec", "check_plan"]


def check_cache(value: Any, name: str = "cache", *, or_view: bool = False) -> None:
    """Raises TypeError unless a value is a `KVCache`, or, with `or_view`, a view of one."""
    if isinstance(value, (KVCache, CacheView) if or_view else KVCache):
        return
    accepted = "a KVCache, as KVCache.create makes it"
    if or_view:
        accepted += ", or cache.view(...)"
    elif isinstance(value, CacheView):
        accepted += "; this is a view, whose cache is view.cache"
    raise _wrong(name, value, accepted)


def check_array(value: Any, name: str, axes: str) -> None:
    """Raises TypeError unless a value has a shape and a dtype, as arrays, tracers and `ShapeDtypeStruct` do.

    Args:
        value: the argument.
        name: of the argument.
        axes: for the message, such as "(B, T, Hq, D)".
    """
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise _wrong(name, value, f"an array {axes}")


def check_codec(value: Any, name: str) -> None:
    """Raises TypeError unless a value is a codec."""
    if not isinstance(value, Codec):
        raise _wrong(name, value, "a Codec, such as those of qvg.presets.pair(NAME)")


def check_plan(value: Any, name: str) -> None:
    """Raises TypeError unless a value is a `Plan` or None."""
    if value is not None and not isinstance(value, Plan):
        raise _wrong(name, value, "a Plan, such as Plan(spans=2), or None for one device")


def _wrong(name: str, value: Any, accepted: str) -> TypeError:
    shown = f"a {type(value).__name__}"
    if value is None or isinstance(value, str | int | float | np.generic):
        shown = repr(value)[:60]
    return TypeError(f"{name}={shown} is not accepted: give {accepted}")
