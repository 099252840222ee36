"""The condition cache: K and V of the given frames, made once per segment.

One pass over the clean frames alone (timestep 0, no text) gives K (before RoPE) and V of all
layers. Each layer is compressed as soon as it is computed, as one span, so the uncompressed cache
never exists: at 480 x 832 and 73 given frames it would take 23 GB. Without compression the codec is
`identity`, and nothing else differs.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from models.longcat.config import LongCatConfig
from models.longcat.modeling import LongCatDiT
from models.longcat.passes import clip_forward
from models.longcat.rope import clip_positions, model_rope
from models.longcat.sharding import AXIS, devices, spread_out
from qvg_jax.attention.xla import DENSE_CHUNK_TOKENS
from qvg_jax.cache.operations import KVCache, append, compress
from qvg_jax.cache.view import CacheView
from qvg_jax.codecs.base import Codec, identity
from qvg_jax.sharding import head_shardings


@functools.partial(jax.jit, static_argnames=("key_codec", "value_codec"))
def build_condition(
    model: LongCatDiT,
    given_BFZYX: Float[Array, "B F Z Y X"],
    *,
    key_codec: Codec | None = None,
    value_codec: Codec | None = None,
    key: PRNGKeyArray | None = None,
) -> KVCache:
    """Runs the given frames through the network and keeps their K and V, layer by layer.

    Args:
        model: the transformer.
        given_BFZYX: clean latents of the given frames, one row per video.
        key_codec, value_codec: compressors of K and V; None keeps the model's dtype.
        key: randomness for codecs that want it, folded with the layer. It is no other stream than
            this one, so noise is the same whatever the codec.

    Returns:
        A cache of one span per layer, to be read with `view_condition`; `raise_if_bad` reports
        values that are not finite.

    Raises:
        ValueError: a codec that refuses the span (more centroids than tokens, a group that does
            not divide head_dim).
    """
    shape, codecs = given_BFZYX.shape, (key_codec, value_codec)
    one, positions_BTP = _one_layer(model.config, shape, *codecs)
    t = jnp.zeros((1, 1), jnp.float32)
    key = jax.random.key(0) if key is None else key
    encode = functools.partial(_encoded, one)
    if spread_out():
        encode = _by_heads(one, functools.partial(_one_layer, model.config, shape, *codecs))

    def keep(k_BTHD, v_BTHD, layer):
        return encode(k_BTHD, v_BTHD, positions_BTP, layer, key)

    kept = clip_forward(model, given_BFZYX, t, None, keep=keep).kept
    cache = _stacked(one, positions_BTP, kept)
    if spread_out():
        places = head_shardings(cache, jax.sharding.get_abstract_mesh(), AXIS)
        cache = jax.lax.with_sharding_constraint(cache, places)
    return cache


def _by_heads(one: KVCache, make: Callable[..., tuple]) -> Callable[..., tuple]:
    """`_encoded`, by each device for the heads that it has: codecs know no other."""
    places = head_shardings(one, jax.sharding.get_abstract_mesh(), AXIS)
    spans = jax.tree.map(lambda place: place.spec, (places.span_k, places.span_v))
    apart, everywhere, n = jax.P(None, None, AXIS), jax.P(), devices()

    def encode(*inputs):
        local, _ = make(share=n)
        span_k, span_v, bad = _encoded(local, *inputs)
        return span_k, span_v, jax.lax.psum(bad, AXIS)

    return jax.shard_map(
        encode,
        in_specs=(apart, apart, everywhere, everywhere, everywhere),
        out_specs=(*spans, everywhere),
        check_vma=False,  # kernels do not say on which axes their results vary
    )


@functools.partial(jax.jit, static_argnames=("config", "key_codec", "value_codec"))
def condition_of(
    config: LongCatConfig,
    k_LBTHD: Float[Array, "L B T H D"],
    v_LBTHD: Float[Array, "L B T H D"],
    given_BFZYX: Float[Array, "B F Z Y X"] | jax.ShapeDtypeStruct,
    *,
    key_codec: Codec | None = None,
    value_codec: Codec | None = None,
    key: PRNGKeyArray | None = None,
) -> KVCache:
    """The cache of K (before RoPE) and V that are there already; else as `build_condition`.

    Args:
        config: sizes of the model.
        k_LBTHD, v_LBTHD: K and V of all layers.
        given_BFZYX: the given frames; only their shape counts.
        key_codec, value_codec, key: as in `build_condition`.
    """
    one, positions_BTP = _one_layer(config, given_BFZYX.shape, key_codec, value_codec)

    def keep(kv):
        return _encoded(one, kv[0], kv[1], positions_BTP, kv[2], key)

    key = jax.random.key(0) if key is None else key
    kept = jax.lax.map(keep, (k_LBTHD, v_LBTHD, jnp.arange(config.layers)))
    return _stacked(one, positions_BTP, kept)


def view_condition(config: LongCatConfig, cache: KVCache, shape: tuple[int, ...]) -> CacheView:
    """What a cached pass reads.

    Args:
        config: sizes of the model.
        cache: from `build_condition`.
        shape: (B, F, Z, Y, X) of the noise latents, whose frames follow the given ones.

    Raises:
        ValueError: the cache is not made of whole frames of this size.
    """
    rows, columns = config.grid(*shape[-2:])
    given, rest = divmod(cache.layout.span_tokens, rows * columns)
    if rest:
        raise ValueError(
            f"the cache holds {cache.layout.span_tokens} tokens, which are no whole frames of "
            f"{rows} x {columns} tokens"
        )
    positions_BTP = clip_positions(config, given, (cache.layout.batch, *shape[1:]))
    return cache.view(positions_BTP, model_rope(config))


def _one_layer(config: LongCatConfig, shape: tuple[int, ...], key_codec, value_codec, share=1):
    """An empty cache of one layer with room for one span, and the positions of its tokens.

    `share` is the number of devices among which the heads are divided.
    """
    positions_BTP = clip_positions(config, 0, shape)
    plain = identity(config.dtype)
    cache = KVCache.create(
        batch=shape[0],
        heads=config.heads // share,
        head_dim=config.head_dim,
        block_tokens=positions_BTP.shape[1],
        sink_blocks=0,
        span_blocks=1,
        max_spans=1,
        keep_recent=0,
        window_blocks=1,
        key_codec=plain if key_codec is None else key_codec,
        value_codec=plain if value_codec is None else value_codec,
        dtype=config.dtype,
    )
    return cache, positions_BTP


def _encoded(one: KVCache, k_BTHD, v_BTHD, positions_BTP, layer, key) -> tuple:
    """One layer's packed K and V in the form of cache slots, and its count of bad values."""
    cache = append(one, k_BTHD, v_BTHD, positions_BTP)
    cache = compress(cache, jax.random.fold_in(key, layer))
    return cache.span_k, cache.span_v, cache.nonfinite


def _stacked(one: KVCache, positions_BTP: Array, encoded_L: tuple) -> KVCache:
    """The spans of all layers as one cache without a window."""
    span_k, span_v = (jax.tree.map(lambda x: x[:, 0], s) for s in encoded_L[:2])
    nonfinite_L = encoded_L[2]
    # The window has done its work. `attend` looks at valid blocks only, and there are none, but it
    # wants a buffer of the size of one look, which for long clips is a small part of one layer.
    tokens = min(one.layout.block_tokens, DENSE_CHUNK_TOKENS)
    form = (*one.dense_k.shape[:3], tokens, one.dense_k.shape[4])
    bad = nonfinite_L.sum()
    return dataclasses.replace(
        one,
        dense_k=jnp.zeros(form, one.dense_k.dtype),
        dense_v=jnp.zeros(form, one.dense_v.dtype),
        dense_pos=one.dense_pos[:, :tokens],
        span_k=span_k,
        span_v=span_v,
        span_pos=positions_BTP[None],
        num_spans=jnp.ones((), jnp.int32),
        seen_blocks=jnp.ones((), jnp.int32),
        nonfinite=bad,
        first_bad_block=jnp.where(bad > 0, 0, -1),
        layout=dataclasses.replace(one.layout, layers=len(nonfinite_L)),
    )
