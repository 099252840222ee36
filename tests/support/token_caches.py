"""Small caches with blocks of any size, and what they should give, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import qvg_jax as qvg
from qvg_jax.attention.cudnn import Workspaces, attend_cudnn

F32, BLOCK, B, H, D = qvg.identity("f32"), 4, 2, 2, 8
ROPE = qvg.axial_rope([qvg.frequency_ladder(D)])
append, compress = jax.jit(qvg.append), jax.jit(qvg.compress)


def make(**settings):
    sizes = dict(layers=2, batch=B, heads=H, head_dim=D, block_tokens=BLOCK, span_blocks=2)
    sizes |= dict(max_spans=2, keep_recent=1, pos_dims=0, blocks="partial", dtype=jnp.float32)
    return qvg.KVCache.create(**(sizes | dict(key_codec=F32, value_codec=F32) | settings))


def tokens(count, seed=0, layers=2):
    rng = np.random.default_rng(seed)
    shape = (2, layers, B, count, H, D)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnames="by")
def read(cache, q, by="xla", layer=1):
    """Attention to the cache alone, so that only what it holds is seen."""
    if by == "xla":
        return qvg.attend(q, cache, None, None, layer=layer, rope=False)
    none = jnp.zeros((B, 0, H, D))
    call = (q, cache.view(rope=False), none, none, jnp.int32(layer), jnp.float32(D**-0.5))
    sizes = Workspaces(dense_bytes=1024, span_bytes=1536, parts=3)
    return attend_cudnn(*call, backend="xla", workspaces=sizes)[0]


QUERY = jnp.asarray(np.random.default_rng(9).normal(size=(B, 3, H, D)), jnp.float32)


def dense(kv, counts=None, layer=1):
    """Attention to some tokens, in float64."""
    k, v = (np.asarray(x[layer], np.float64) for x in kv)
    s = np.einsum("bqhd,bkhd->bhqk", np.asarray(QUERY, np.float64), k) / D**0.5
    if counts is not None:
        s = np.where(counts[:, None, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", p / p.sum(-1, keepdims=True), v)


def filled(cache, kv, sizes, lengths=None, **more):
    begin = 0
    for i, size in enumerate(sizes):
        new = kv[:, :, :, begin : begin + size]
        here = {} if lengths is None else dict(lengths=jnp.asarray(lengths[i]))
        cache = compress(append(cache, *new, **here, **more))
        begin += size
    return cache


# 29 tokens: sink, two spans of 8, and a window that is not full.
SIZES = [3, 1, 4, 1, 4, 4, 4, 1, 3, 4]
