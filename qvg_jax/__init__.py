"""Quant VideoGen in JAX: a KV cache at two bits for long auto-regressive video generation.

Letters in array names: B batch, L layers, T tokens, H heads, D head dim, K centroids, G groups,
C code bytes, S stages, F latent frames, N spans, P position components.

A name is imported when it is used first, so that the `qvg` command answers before JAX is there.
"""

import importlib
import importlib.metadata
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvg_jax import sharding
    from qvg_jax.attention.api import attend
    from qvg_jax.attention.choice import explain
    from qvg_jax.cache.devices import spread
    from qvg_jax.cache.edits import reset, take_rows, truncate
    from qvg_jax.cache.head_history import HeadHistory
    from qvg_jax.cache.health import (
        CacheFullError,
        NonFiniteError,
        cache_bytes,
        raise_if_bad,
        raise_if_not_finite,
    )
    from qvg_jax.cache.key_bias import KeyBias
    from qvg_jax.cache.mean_keys import MeanKeys
    from qvg_jax.cache.operations import KVCache, append, compress, evict
    from qvg_jax.cache.plan import Plan
    from qvg_jax.cache.recall import recall
    from qvg_jax.cache.recode import recode
    from qvg_jax.cache.relative import RelativeTime
    from qvg_jax.cache.rope import Rope, axial_rope, frequency_ladder
    from qvg_jax.cache.saved import from_saved, to_saved
    from qvg_jax.cache.store import SpanStore
    from qvg_jax.cache.summary import summary
    from qvg_jax.codecs import presets
    from qvg_jax.codecs.accounting import bits_per_element, compression_ratio, packed_bytes
    from qvg_jax.codecs.base import Codec, identity
    from qvg_jax.codecs.compose import chain, encoded_by
    from qvg_jax.codecs.quantize.grid import grid_quantize
    from qvg_jax.codecs.quantize.integer import residual_quantize
    from qvg_jax.codecs.smoothing.kmeans import kmeans_smoothing
    from qvg_jax.loop import rollout, stream

__version__ = "0.1.0"
JAX_RANGE = ">=0.8,<0.13"  # of the versions that the tests ran on

_MODULES = {
    "attend": "attention.api",
    "explain": "attention.choice",
    "reset": "cache.edits",
    "take_rows": "cache.edits",
    "truncate": "cache.edits",
    "HeadHistory": "cache.head_history",
    "CacheFullError": "cache.health",
    "NonFiniteError": "cache.health",
    "cache_bytes": "cache.health",
    "raise_if_bad": "cache.health",
    "raise_if_not_finite": "cache.health",
    "from_saved": "cache.saved",
    "to_saved": "cache.saved",
    "KeyBias": "cache.key_bias",
    "MeanKeys": "cache.mean_keys",
    "KVCache": "cache.operations",
    "append": "cache.operations",
    "compress": "cache.operations",
    "evict": "cache.operations",
    "Plan": "cache.plan",
    "recall": "cache.recall",
    "recode": "cache.recode",
    "spread": "cache.devices",
    "RelativeTime": "cache.relative",
    "Rope": "cache.rope",
    "axial_rope": "cache.rope",
    "frequency_ladder": "cache.rope",
    "SpanStore": "cache.store",
    "summary": "cache.summary",
    "sharding": "sharding",
    "presets": "codecs.presets",
    "bits_per_element": "codecs.accounting",
    "compression_ratio": "codecs.accounting",
    "packed_bytes": "codecs.accounting",
    "Codec": "codecs.base",
    "identity": "codecs.base",
    "chain": "codecs.compose",
    "encoded_by": "codecs.compose",
    "grid_quantize": "codecs.quantize.grid",
    "residual_quantize": "codecs.quantize.integer",
    "kmeans_smoothing": "codecs.smoothing.kmeans",
    "rollout": "loop",
    "stream": "loop",
}
_WHOLE_MODULES = ("presets", "sharding")  # modules that are public names themselves

__all__ = [
    "CacheFullError",
    "Codec",
    "HeadHistory",
    "KVCache",
    "KeyBias",
    "MeanKeys",
    "NonFiniteError",
    "Plan",
    "RelativeTime",
    "Rope",
    "SpanStore",
    "append",
    "attend",
    "axial_rope",
    "bits_per_element",
    "cache_bytes",
    "chain",
    "compress",
    "compression_ratio",
    "encoded_by",
    "evict",
    "explain",
    "frequency_ladder",
    "from_saved",
    "grid_quantize",
    "identity",
    "kmeans_smoothing",
    "packed_bytes",
    "presets",
    "raise_if_bad",
    "raise_if_not_finite",
    "recall",
    "recode",
    "reset",
    "residual_quantize",
    "rollout",
    "sharding",
    "spread",
    "stream",
    "summary",
    "take_rows",
    "to_saved",
    "truncate",
]


def _warn_of_an_untried_jax() -> None:
    """Warns of a JAX outside of `JAX_RANGE`, by its metadata: JAX is not imported for it."""
    if "jax" in sys.modules:
        found = getattr(sys.modules["jax"], "__version__", "")
    else:
        try:
            found = importlib.metadata.version("jax")
        except importlib.metadata.PackageNotFoundError:
            found = ""
    oldest, end = (bound.lstrip(">=<") for bound in JAX_RANGE.split(","))
    if found and not _numbers(oldest) <= _numbers(found) < _numbers(end):
        warnings.warn(
            f"qvg_jax {__version__} was tested with jax{JAX_RANGE}, and jax {found} is installed; "
            f"`pip install 'jax{JAX_RANGE}'` brings one that was",
            RuntimeWarning,
            stacklevel=3,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, which order JAX's releases."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])


_warn_of_an_untried_jax()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    value = module if name in _WHOLE_MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
