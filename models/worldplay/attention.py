"""Both attentions of a pass: over its own frames, and over everything a cache holds.

Two forms of cache are read, and told apart by their number of heads (`history.py`): *packed* K and
V are encoded already; *single* k and v are encoded by `qvg_jax.attend` as it reads them, one span at
a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from models.common.attention import fused_attention
from models.worldplay.config import WorldPlayConfig
from models.worldplay.encoding import (
    Here,
    decode_outputs,
    encode_keys,
    encode_queries,
    encode_values,
    model_encodings,
)
from qvg_jax.attention.api import attend
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.view import CacheView


class Sight(NamedTuple):
    """What the frames of a pass see: themselves, and a cache. All passes over a block share it."""

    view: CacheView
    here: Here


def is_packed(config: WorldPlayConfig, cache: KVCache) -> bool:
    """Whether the cache holds encoded K and V, two per head, and not one k and v."""
    return cache.layout.heads == 2 * config.heads


def look(config: WorldPlayConfig, cache: KVCache, at: Here) -> Sight:
    """Prepares a pass over new frames, at `at`, that also sees the cache."""
    # What is packed was encoded before it was stored: nothing is left to rotate.
    rope = False if is_packed(config, cache) else model_encodings(config)
    return Sight(cache.view(rope=rope), at)


def cached_attention(config: WorldPlayConfig, sight: Sight) -> Callable:
    """The `attention` of a pass whose queries see the cache and, both ways, the pass's frames."""

    def attention(q_BTHD, k_BTHD, v_BTHD, layer):
        q, k, v = encode_all(q_BTHD, k_BTHD, v_BTHD, sight.here)
        way = dict(implementation=config.attention, precision=config.precision)
        o_BTCD = attend(q, sight.view, k, v, layer=layer, **way)
        return decode_all(o_BTCD, sight.here)

    return attention


def dense_branches(at: Here) -> Callable:
    """The `attention` of a pass whose frames see each other and nothing else."""

    def attention(q_BTHD, k_BTHD, v_BTHD, _):
        return decode_all(fused_attention(*encode_all(q_BTHD, k_BTHD, v_BTHD, at)), at)

    return attention


def encode_all(
    q_BTHD: Float[Array, "B T H D"],
    k_BTHD: Float[Array, "B T H D"],
    v_BTHD: Float[Array, "B T H D"],
    at: Here,
) -> tuple[Float[Array, "B T C D"], Float[Array, "B T C D"], Float[Array, "B T C D"]]:
    """q, k and v of a pass as attention takes them; both encodings of a head are two heads."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    encoded = encode_queries(q, at), encode_keys(k, at.place), encode_values(v, at.place)
    return tuple(jnp.swapaxes(x, 1, 2) for x in encoded)


def decode_all(
    o_BTCD: Float[Array, "B T C D"], at: Here
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]:
    """The results of both branches from what attention gave."""
    branches = decode_outputs(jnp.swapaxes(o_BTCD, 1, 2), at)
    return tuple(jnp.swapaxes(o, 1, 2) for o in branches)
