"""Caches that are full of noise: a long history without generating it.

Noise and not zeros: a GPU multiplies zeros with less power, hence faster.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


def noise_of(form: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    """An array of this shape and dtype: normal numbers, or random codes if they are integers.

    Signed integers, which are exponents and tables, are small. It is made row by row of the first axis, so
    that float32 noise never exists as a whole, and where the shape's sharding says, if it has one.
    """

    def one(key):
        if jnp.issubdtype(form.dtype, jnp.floating):
            return jax.random.normal(key, form.shape[1:], jnp.bfloat16).astype(form.dtype)
        # Scales are bytes too: no NaN, and none above 2.
        bits = jax.random.bits(key, form.shape[1:], f"uint{8 * form.dtype.itemsize}") & 0x3F
        return (
            (bits & 3).astype(form.dtype) if jnp.issubdtype(form.dtype, jnp.signedinteger) else bits
        )

    keys = jax.random.split(jax.random.key(seed, impl="rbg"), form.shape[0])
    return jax.jit(lambda keys: jax.lax.map(one, keys), out_shardings=form.sharding)(keys)


def _placed(x: jax.Array) -> jax.sharding.Sharding | None:
    """Where an array of several devices lies; None for one that was left where JAX makes it.

    A sharding that is named would pin it, and a step, whose results are not pinned, is then compiled twice.
    """
    return x.sharding if x.committed else None


def filled(cache: Any, blocks: int, spans: int | None = None) -> Any:
    """The cache as after so many blocks, with noise in all of it.

    `spans` of them are compressed; None for as many as a rollout would have compressed by then.
    The given cache's arrays are deleted before their successors are made: two may not fit.
    """
    spans, made = _spans_after(cache.layout, blocks) if spans is None else spans, {}
    for name in ("dense_k", "dense_v", "near_k", "near_v", "span_k", "span_v"):
        leaves, tree = jax.tree.flatten(getattr(cache, name))
        forms = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_placed(x)) for x in leaves]
        for x in leaves:
            x.delete()
        made[name] = jax.tree.unflatten(tree, [noise_of(form, i) for i, form in enumerate(forms)])
    dense = blocks - spans * cache.layout.span_blocks
    count = dict(dense_blocks=dense, num_spans=spans, seen_blocks=blocks)
    count = {
        name: jax.device_put(jnp.asarray(n, jnp.int32), _placed(getattr(cache, name)))
        for name, n in count.items()
    }
    return dataclasses.replace(cache, **made, **count)


def _spans_after(lay: Any, blocks: int) -> int:
    """How many spans a cache has after so many blocks."""
    if not lay.max_spans:
        return 0
    old = max(0, blocks - lay.sink_blocks - lay.keep_recent - 1)
    spans = min(old // lay.span_blocks, lay.max_spans)
    while blocks - spans * lay.span_blocks > lay.dense_blocks:
        spans += 1
    return spans
