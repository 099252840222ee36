"""Questions of the host to a cache: whether anything is wrong with it, and how many bytes it takes."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvg_jax.cache.arguments import check_cache
from qvg_jax.cache.state import KVCache
from qvg_jax.codecs.accounting import packed_bytes

__all__ = [
    "CacheBytes",
    "CacheFullError",
    "NonFiniteError",
    "Regions",
    "cache_bytes",
    "raise_if_bad",
    "raise_if_not_finite",
]


class NonFiniteError(ValueError):
    """K, V or positions with NaN or Inf were appended to a cache."""


class CacheFullError(ValueError):
    """A block was appended to a cache that had no room for it."""


def raise_if_bad(tree: Any) -> None:
    """Raises if any `KVCache` in `tree` was given NaN or Inf, or a block it could not hold.

    Reads a few scalars from the device, so it waits for them; call it once for each block or
    chunk, outside jit. Blocks are numbered from 0 in the order of `append`.

    Args:
        tree: a cache, or any pytree with caches in it, such as the state of a rollout.

    Raises:
        NonFiniteError: with the number of the first bad block and the count of bad values.
        CacheFullError: with the number of refused blocks and the capacity.
    """
    for cache in _caches(tree):
        counters = (cache.nonfinite, cache.first_bad_block, cache.rejected_blocks)
        counters = jax.device_get((*counters, cache.seen_blocks))
        nonfinite, bad_block, rejected, seen = (np.asarray(x).max() for x in counters)
        lay = cache.layout
        if nonfinite:
            raise NonFiniteError(
                f"{_what_is_bad(cache)} of block {bad_block} is not finite: {nonfinite} NaN or Inf values in {seen} "
                f"blocks{_layer_of_bad(cache)}; accepted: {_accepted(cache.dense_k.dtype)}"
            )
        if rejected:
            raise CacheFullError(
                f"{rejected} of {seen} blocks found no room: capacity is {lay.capacity_blocks} "
                f"blocks (sink {lay.sink_blocks}, {lay.max_spans} spans of {lay.span_blocks}, "
                f"window {lay.window_blocks}); give more max_spans, evict, or overflow='drop'"
            )


def raise_if_not_finite(what: str, tree: Any) -> None:
    """Raises if any array of `tree` has NaN or Inf: for latents, frames, queries and weights.

    Outside jit; it waits for the arrays.

    Args:
        what: what the tree is, for the message.
        tree: any pytree; arrays that are not floating point are left alone.

    Raises:
        NonFiniteError: with the path of every bad array (the first five) and the count.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    floating = [(path, x) for path, x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    counts = jax.device_get([_bad_values(x) for _, x in floating])
    bad = [
        f"{what}{jax.tree_util.keystr(path)} ({count} of {jnp.size(x)})"
        for (path, x), count in zip(floating, counts, strict=True)
        if count
    ]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise NonFiniteError(f"NaN or Inf in {', '.join(bad[:5])}{more}; accepted: finite values")


@jax.jit
def _bad_values(x: Any) -> jax.Array:
    return (~jnp.isfinite(x)).sum(dtype=jnp.int32)


@jax.jit
def _bad_layers(dense: Any) -> jax.Array:
    """Per layer, whether sink or window has NaN or Inf; axes before [L, B, H, T, D] are a vmap's."""
    layers = jnp.moveaxis(dense, -5, 0)
    return (~jnp.isfinite(layers)).any(tuple(range(1, layers.ndim)))


def _what_is_bad(cache: KVCache) -> str:
    """Says among what the bad values are: positions are kept as they came, K and V may be compressed."""
    bad = [np.asarray(_bad_values(x)).any() for x in (cache.dense_pos, cache.span_pos)]
    return "K, V or a position" if any(bad) else "K or V"


def _layer_of_bad(cache: KVCache) -> str:
    """Says where sink and window have the first bad value; nothing if it has been compressed."""
    bad = {name: np.asarray(_bad_layers(getattr(cache, f"dense_{name}"))) for name in ("k", "v")}
    if cache.layout.own_window:  # then a row is a head of a layer
        table = np.asarray(cache.layout.history.table)
        for name, found in bad.items():
            near = np.asarray(_bad_layers(getattr(cache, f"near_{name}")))
            of_rows = np.zeros(table.shape, bool)
            of_rows[table], of_rows[~table] = found, near
            bad[name] = of_rows.any(1)
    layers = np.flatnonzero(bad["k"] | bad["v"])
    if not layers.size:
        return ""
    names = " and ".join(name.upper() for name in ("k", "v") if bad[name][layers[0]])
    return f", first in {names} of layer {layers[0]}"


def _accepted(dtype: Any) -> str:
    """Says which values a cache of this dtype takes: small formats overflow to NaN or Inf."""
    largest = float(jnp.finfo(dtype).max)
    return (
        "finite values" if largest > 1e6 else f"values from -{largest:g} to {largest:g} ({dtype})"
    )


class Regions(NamedTuple):
    """Bytes of a cache by region, K and V of all layers together."""

    sink: int
    spans: int  # compressed: codes, scales, centroids
    window: int
    warm_start: int  # codec states
    positions: int  # positions of all tokens, and the counters

    @property
    def total(self) -> int:
        """All regions."""
        return sum(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheBytes:
    """Bytes of a cache: `cache_bytes` says what each number means."""

    allocated: Regions
    in_use: Regions | None
    bf16: int | None
    tokens: int | None


def cache_bytes(cache: KVCache) -> CacheBytes:
    """Bytes of the cache's buffers, of their valid part, and of plain bf16 for the same tokens.

    Outside jit. Buffer sizes are those the device reports, summed over devices. Caches that `vmap` or
    `stack` put into one count together. Of a cache of shapes only, as `jax.eval_shape` gives it, the
    buffers are known and how full they are is not.

    Args:
        cache: the cache, caches stacked along leading axes, or their shapes.

    Returns:
        `allocated`: bytes of the buffers by region; fixed from creation on.
        `in_use`: bytes of the regions' valid blocks and spans (and of the codec states once a
            span was encoded); None for shapes.
        `bf16`: 2 bytes x 2 (K and V) x layers x batch x heads x head_dim x valid tokens; None for
            shapes.
        `tokens`: valid tokens of one layer and batch row, added over stacked caches; None for shapes.
    """
    check_cache(cache)
    lay = cache.layout
    stacked = cache.dense_blocks.shape
    count = math.prod(stacked)

    def bytes_of(*names: str) -> int:
        return packed_bytes([getattr(cache, name) for name in names]) // count

    def of_tokens(region: str) -> list[str]:
        return [f"{region}_{name}" for name in ("pos", "valid", "table")]

    dense = bytes_of("dense_k", "dense_v") // lay.dense_blocks  # bytes of one block
    near = bytes_of("near_k", "near_v") // max(1, lay.near_blocks)
    span = bytes_of("span_k", "span_v") // max(1, lay.max_spans)
    state = bytes_of("state_k", "state_v")
    dense_pos = bytes_of(*of_tokens("dense")) // lay.dense_blocks
    near_pos = bytes_of("near_pos") // max(1, lay.near_blocks)
    span_pos = bytes_of(*of_tokens("span")) // max(1, lay.max_spans)
    scalars = packed_bytes([x for x in jax.tree.leaves(cache) if x.shape == stacked]) // count

    def regions(sink_blocks, spans, window_blocks, near_blocks, state, caches=count):
        pos = (sink_blocks + window_blocks) * dense_pos + spans * span_pos
        pos += (sink_blocks + near_blocks) * near_pos
        return Regions(
            sink=sink_blocks * (dense + near),
            spans=spans * span,
            window=window_blocks * dense + near_blocks * near,
            warm_start=state,
            positions=pos + scalars * caches,
        )

    ring = max(0, lay.near_blocks - lay.sink_blocks)  # of local heads with a window of their own
    full = (lay.sink_blocks, lay.max_spans, lay.window_blocks, ring, state)
    allocated = regions(*(count * n for n in full))
    if any(isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer) for x in jax.tree.leaves(cache)):
        return CacheBytes(allocated=allocated, in_use=None, bf16=None, tokens=None)
    dense_blocks, num_spans, encoded, filled = (
        np.asarray(jax.device_get(x)).reshape(-1)
        for x in (cache.dense_blocks, cache.num_spans, cache.encoded_blocks, cache.dense_tokens)
    )
    blocks = -(-filled // lay.block_tokens)  # a block that is filling up is in use
    sink_blocks = np.minimum(blocks, lay.sink_blocks)
    tokens = int((filled + num_spans * lay.span_tokens).sum())
    window = blocks - sink_blocks
    in_ring = np.minimum(window + encoded, ring)
    used = (sink_blocks, num_spans, window, in_ring, np.where(encoded > 0, state, 0))
    return CacheBytes(
        allocated=allocated,
        in_use=regions(*(int(x.sum()) for x in used)),
        bf16=2 * 2 * lay.layers * lay.batch * lay.heads * lay.head_dim * tokens,
        tokens=tokens,
    )


def _caches(tree: Any) -> list[KVCache]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, KVCache))
    return [x for x in leaves if isinstance(x, KVCache)]
