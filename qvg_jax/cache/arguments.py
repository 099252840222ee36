"""Checks of the kinds of arguments: what is no cache or no codec is named with what is accepted."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from qvg_jax.cache.state import KVCache
from qvg_jax.cache.view import CacheView
from qvg_jax.codecs.base import Codec
from qvg_jax.errors import wrong_kind

__all__ = ["check_cache", "check_codec", "whole_numbers"]


def check_cache(value: Any, name: str = "cache", *, or_view: bool = False) -> None:
    """Raises TypeError unless a value is a `KVCache`, or, with `or_view`, a view of one."""
    if isinstance(value, (KVCache, CacheView) if or_view else KVCache):
        return
    accepted = "a KVCache, as KVCache.create makes it"
    if or_view:
        accepted += ", or cache.view(...)"
    elif isinstance(value, CacheView):
        accepted += "; this is a view, whose cache is view.cache"
    raise wrong_kind(name, value, accepted)


def check_codec(value: Any, name: str) -> None:
    """Raises TypeError unless a value is a codec."""
    if not isinstance(value, Codec):
        raise wrong_kind(name, value, "a Codec, such as those of qvg.presets.pair(NAME)")


def whole_numbers(name: str, values: Any) -> list[int]:
    """The integers of a list or an array; raises TypeError for anything else."""
    listed = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else None
    if listed is None or not all(
        isinstance(i, Integral) and not isinstance(i, bool) for i in listed
    ):
        raise wrong_kind(name, values, "a list of integers")
    return [int(i) for i in listed]
