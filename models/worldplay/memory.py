"""Writing K and V of context passes into the cache, and looking at what is in it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.worldplay.attention import is_packed
from models.worldplay.config import WorldPlayConfig
from models.worldplay.context import ContextKV
from models.worldplay.encoding import apart, encode_keys, encode_values, model_encodings
from qvg_jax.cache.operations import KVCache, append, compress
from qvg_jax.cache.slots import read_slot


def remember_block(
    config: WorldPlayConfig, cache: KVCache, kv: ContextKV, positions_BTP: Float[Array, "B T 15"]
) -> KVCache:
    """The cache with one more block, and with a span compressed if one is due."""
    return compress(append(cache, *_storage_form(config, cache, kv, positions_BTP), positions_BTP))


def remember_all(
    config: WorldPlayConfig,
    cache: KVCache,
    kv: ContextKV,
    positions_BTP: Float[Array, "B T 15"],
    blocks: Int[Array, ""],
) -> KVCache:
    """The cache with the first `blocks` blocks of a context in the place of all it held."""
    size = cache.layout.block_tokens

    def one(i, cache):
        k, v, at = (
            jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)
            for x, axis in ((kv.k_LBTHD, 2), (kv.v_LBTHD, 2), (positions_BTP, 1))
        )
        return append(cache, *_storage_form(config, cache, ContextKV(k, v), at), at)

    dropped = cache.dropped_blocks + cache.dense_blocks
    none = jnp.zeros_like(cache.dense_blocks)
    empty = dataclasses.replace(cache, dense_blocks=none, dropped_blocks=dropped)
    return jax.lax.fori_loop(0, blocks, one, empty)


def _storage_form(config, cache, kv: ContextKV, positions_BTP):
    """K and V as the cache keeps them: encoded, or as they are."""
    if not is_packed(config, cache):
        return kv
    k_LBHTD, v_LBHTD = (jnp.swapaxes(x, 2, 3) for x in kv)
    encoded = encode_kv(config, k_LBHTD, v_LBHTD, positions_BTP)
    return tuple(jnp.swapaxes(x, 2, 3) for x in encoded)


def encode_kv(
    config: WorldPlayConfig,
    k_LBHTD: Float[Array, "L B H T D"],
    v_LBHTD: Float[Array, "L B H T D"],
    positions_BTP: Float[Array, "B T 15"],
) -> tuple[Float[Array, "L B C T D"], Float[Array, "L B C T D"]]:
    """Both encodings of k and v of all layers, one layer after another."""
    place = model_encodings(config).table(positions_BTP)

    def one_layer(kv):
        return encode_keys(kv[0], place), encode_values(kv[1], place)

    return jax.lax.map(one_layer, (k_LBHTD, v_LBHTD))


def recall(
    config: WorldPlayConfig, cache: KVCache
) -> tuple[Float[Array, "L B H T E"], Float[Array, "L B H T E"]]:
    """Everything in the cache, decoded, encoded and in order: to look at, not to run on.

    Outside jit, and as large as the uncompressed history.

    Args:
        config: sizes of the model.
        cache: from `make_cache`.

    Returns:
        [rope | prope] K and V, E = 2 D channels a head, whatever the storage.
    """
    lay = cache.layout
    valid = int(cache.dense_blocks) * lay.block_tokens
    slots = [(int(cache.first_span) + i) % lay.max_spans for i in range(int(cache.num_spans))]
    regions = [(*_decoded(cache, slot), cache.span_pos[slot]) for slot in slots]
    regions.append(
        tuple(x[..., :valid, :] for x in (cache.dense_k, cache.dense_v, cache.dense_pos))
    )
    k, v, positions_BTP = (jnp.concatenate(x, axis=-2) for x in zip(*regions, strict=True))
    if not is_packed(config, cache):
        k, v = jax.jit(encode_kv, static_argnums=0)(config, k, v, positions_BTP)
    return tuple(jnp.concatenate(jax.vmap(apart)(x), -1) for x in (k, v))


@jax.jit
def _decoded(cache, slot):
    """K and V of one span of all layers, as attention decodes them."""

    def decoded(codec, slots):
        def one_layer(layer):
            return codec.decode(read_slot(slots, layer, slot), dtype=cache.dense_k.dtype)

        return jax.lax.map(one_layer, jnp.arange(cache.layout.layers))

    lay = cache.layout
    return decoded(lay.key_codec, cache.span_k), decoded(lay.value_codec, cache.span_v)
