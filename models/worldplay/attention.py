"""Both attentions of a pass: over its own frames, and over everything a cache holds.

Two forms of cache are read, and told apart by their number of heads (`history.py`): *packed* K and
V are encoded already and go through `qvg_jax.attend` as they are; *single* k and v are encoded when
they are read, frame by frame, and each frame's keys are merged into a running softmax.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
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
    here,
    model_places,
)
from models.worldplay.prope import Camera
from qvg_jax.attention import attend
from qvg_jax.cache import KVCache
from qvg_jax.slots import read_slot
from qvg_jax.view import CacheView


class Sight(NamedTuple):
    """What the frames of a pass see: themselves, and a cache. All passes over a block share it."""

    view: CacheView
    here: Here


def is_packed(config: WorldPlayConfig, cache: KVCache) -> bool:
    """Whether the cache holds encoded K and V, two per head, and not one k and v."""
    return cache.layout.heads == 2 * config.heads


def look(
    config: WorldPlayConfig,
    cache: KVCache,
    positions_BTP: Float[Array, "B T 15"],
    camera_BF44: Camera,
) -> Sight:
    """Prepares a pass over new frames that also sees the cache.

    Args:
        config: sizes of the model.
        cache: from `history.make_cache`.
        positions_BTP: from `encoding.positions`, of the new frames.
        camera_BF44: matrices of the new frames.
    """
    at = here(config, positions_BTP, camera_BF44)
    if is_packed(config, cache):
        return Sight(cache.view(), at)
    return Sight(cache.view(positions_BTP, model_places(config)), at)


def cached_attention(config: WorldPlayConfig, sight: Sight) -> Callable:
    """The `attention` of a pass whose queries see the cache and, both ways, the pass's frames."""
    packed = is_packed(config, sight.view.cache)

    def attention(q_BTHD, k_BTHD, v_BTHD, layer):
        q, k, v = _encoded(q_BTHD, k_BTHD, v_BTHD, sight.here)
        if packed:
            q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
            o_BCTD = jnp.swapaxes(attend(q, sight.view, k, v, layer=layer), 1, 2)
        else:
            o_BCTD = _attend_single(config, q, k, v, sight.view, layer)
        return _decoded(o_BCTD, sight.here)

    return attention


def dense_branches(at: Here) -> Callable:
    """The `attention` of a pass whose frames see each other and nothing else."""

    def attention(q_BTHD, k_BTHD, v_BTHD, _):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in _encoded(q_BTHD, k_BTHD, v_BTHD, at))
        return _decoded(jnp.swapaxes(fused_attention(q, k, v), 1, 2), at)

    return attention


def _encoded(q_BTHD, k_BTHD, v_BTHD, at: Here):
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    return encode_queries(q, at), encode_keys(k, at.place), encode_values(v, at.place)


def _decoded(o_BCTD, at: Here):
    return tuple(jnp.swapaxes(o, 1, 2) for o in decode_outputs(o_BCTD, at))


class Running(NamedTuple):
    """Softmax over the keys so far, float32: maximum, sum, and sum of weighted values."""

    max_BCT: Float[Array, "B C T"]
    sum_BCT: Float[Array, "B C T"]
    out_BCTD: Float[Array, "B C T D"]

    @classmethod
    def of(cls, q_BCTD: Float[Array, "B C T D"]) -> "Running":
        """Before the first key."""
        zero = jnp.zeros(q_BCTD.shape, jnp.float32)
        return cls(zero[..., 0] - jnp.inf, zero[..., 0], zero)

    def visit(self, q_BCTD: Array, k_BCUD: Array, v_BCUD: Array) -> "Running":
        """With more keys U, all of them visible."""
        f32 = jnp.float32
        s_BCTU = jnp.einsum("bctd,bcud->bctu", q_BCTD, k_BCUD, preferred_element_type=f32)
        s_BCTU = s_BCTU * (1 / math.sqrt(q_BCTD.shape[-1]))
        top = jnp.maximum(self.max_BCT, s_BCTU.max(-1))
        p_BCTU, fade = jnp.exp(s_BCTU - top[..., None]), jnp.exp(self.max_BCT - top)
        out = jnp.einsum(
            "bctu,bcud->bctd", p_BCTU.astype(v_BCUD.dtype), v_BCUD, preferred_element_type=f32
        )
        total = self.sum_BCT * fade + p_BCTU.sum(-1)
        return Running(top, total, self.out_BCTD * fade[..., None] + out)

    def result(self, dtype) -> Array:
        """softmax(q k / sqrt(D)) v."""
        return (self.out_BCTD / self.sum_BCT[..., None]).astype(dtype)


def _attend_single(
    config: WorldPlayConfig, q_BCTD: Array, k_BCTD: Array, v_BCTD: Array, view: CacheView, layer
) -> Array:
    """Attention to a cache of one k and v a head, both encodings applied as frames are read."""
    cache, lay, dtype = view.cache, view.cache.layout, q_BCTD.dtype
    frame = lay.block_tokens // config.frames_per_block  # tokens of one latent frame
    run = Running.of(q_BCTD).visit(q_BCTD, k_BCTD, v_BCTD)

    def visit(run, k_BHTD, v_BHTD, place):
        k_BHTD, v_BHTD = (x.astype(dtype) for x in (k_BHTD, v_BHTD))
        return run.visit(q_BCTD, encode_keys(k_BHTD, place), encode_values(v_BHTD, place))

    def dense(i, run):
        start = i * frame
        corner, form = (layer, 0, 0, start, 0), (1, lay.batch, lay.heads, frame, lay.head_dim)
        k, v = (jax.lax.dynamic_slice(x, corner, form)[0] for x in (cache.dense_k, cache.dense_v))
        return visit(run, k, v, view.dense_table(start, frame))

    def span(i, run):
        slot = (cache.first_span + i) % lay.max_spans
        packed_k, packed_v = (read_slot(x, layer, slot) for x in (cache.span_k, cache.span_v))
        k_BHTD = lay.key_codec.decode(packed_k, dtype)
        v_BHTD = lay.value_codec.decode(packed_v, dtype)
        table = view.span_table(slot)

        def one_frame(j, run):
            def cut(x, axis):
                return jax.lax.dynamic_slice_in_dim(x, j * frame, frame, axis)

            place = jax.tree.map(lambda x: cut(x, 1), table)
            return visit(run, cut(k_BHTD, 2), cut(v_BHTD, 2), place)

        return jax.lax.fori_loop(0, lay.span_tokens // frame, one_frame, run)

    run = jax.lax.fori_loop(0, cache.dense_blocks * config.frames_per_block, dense, run)
    if lay.max_spans:
        run = jax.lax.fori_loop(0, cache.num_spans, span, run)
    return run.result(dtype)
