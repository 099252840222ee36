"""The same history in a cache on one device and in caches spread by plans."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

import qvg_jax as qvg
from qvg_jax.cache.devices import spread
from tests.support.cache_model import coarse

LAYERS, BATCH, HEADS, GROUP, DIM, TOKENS = 2, 2, 8, 2, 8, 8
SIZES = dict(
    layers=LAYERS, batch=BATCH, heads=HEADS, head_dim=DIM, block_tokens=TOKENS, sink_blocks=1,
    span_blocks=2, max_spans=8, keep_recent=1, pos_dims=1, dtype=jnp.float32,
)  # fmt: skip
ROPE = qvg.axial_rope([qvg.frequency_ladder(DIM)])
CODECS = dict(key_codec=coarse(), value_codec=coarse(7))
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def block(i, tokens=TOKENS, heads=HEADS):
    """K, V and positions of block i."""
    k, v = normal((i, 1), 2, LAYERS, BATCH, tokens, heads, DIM)
    positions = np.broadcast_to(
        np.arange(i * TOKENS, i * TOKENS + tokens)[None, :, None], (BATCH, tokens, 1)
    )
    return k, v, positions.astype(np.float32)


def queries(tokens=TOKENS, batch=BATCH):
    return normal((7, batch), batch, tokens, HEADS * GROUP, DIM)


@functools.partial(jax.jit, donate_argnums=0)
def step(cache, k, v, positions):
    return qvg.compress(qvg.append(cache, k, v, positions))


def grown(plan, blocks, *, evicted=0, **changes):
    """A cache after so many blocks, and then without its oldest spans."""
    cache = qvg.KVCache.create(**SIZES | CODECS | changes, sharding=plan)
    for i in range(blocks):
        cache = step(cache, *block(i))
    return qvg.evict(cache, evicted) if evicted else cache


def on_one_device(cache):
    return spread(cache, None)


def collectives(program):
    """How many collectives of each kind a compiled program has."""
    text = program.as_text()
    found = {name: len(re.findall(rf"= .* {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {name: count for name, count in found.items() if count}
