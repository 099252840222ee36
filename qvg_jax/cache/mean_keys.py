"""Spans chosen by what their keys say, for models whose tokens have no place in a world.

    means = MeanKeys(rope)                                   # beside a store
    for block in blocks:
        store = store.keep(cache)
        means = means.keep(store)                            # decodes each new span once
        ids = means.nearest(q_LBTHD, positions_BTP, count=7)  # queries of the block, before RoPE
        cache, store = recall(cache, store, ids)

The score of a span is the logit that the mean query of a block gives the mean key of the span, as a mean over
layers, batch rows and heads: what attention would look at if all tokens of a block asked as one. Keys and
queries are rotated before they are averaged, so a score knows of time as attention does.

Source: retrieval by mean keys of blocks is that of MoBA (arXiv 2502.13189); there each head and query chooses.
"""

import dataclasses
import functools
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qvg_jax.cache.layout import Layout
from qvg_jax.cache.memories import in_memory
from qvg_jax.cache.rope import Rope
from qvg_jax.cache.slots import decode_slot
from qvg_jax.cache.store import Span, SpanStore
from qvg_jax.errors import wrong_kind

__all__ = ["MeanKeys"]


@dataclasses.dataclass(frozen=True, eq=False)
class MeanKeys:
    """The mean keys of the spans in a store, to choose which of them a block reads; a value like the store.

    Attributes:
        rope: rotation of the model's keys and queries; None for one that rotates nothing.
        means: rotated mean key [L, B, H, D] of each span, float32, by the span's number.
    """

    rope: Rope | None = None
    means: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def keep(self, store: SpanStore) -> "MeanKeys":
        """The mean keys of the spans that the store keeps now. Each span is decoded once, on the device.

        Raises:
            TypeError: what is no store.
            NotImplementedError: a store of spans that have rows only for some heads.
        """
        if not isinstance(store, SpanStore):
            raise wrong_kind("store", store, "a SpanStore, as SpanStore.create makes it")
        lay = store.layout
        if lay.history is not None:
            raise NotImplementedError(
                f"a store with a {lay.history}: mean keys are those of all heads; accepted: history=None"
            )
        means = {
            number: self.means[number]
            if number in self.means
            else np.asarray(_mean_key(in_memory(store.span(number), "device"), lay, self.rope))
            for number in store.kept
        }
        return dataclasses.replace(self, means=means)

    def nearest(
        self,
        q_LBTHD: Float[Array, "L B T Hq D"],
        positions_BTP: Float[Array | np.ndarray, "B T P"] | None = None,
        *,
        count: int,
    ) -> tuple[int, ...]:
        """Numbers of the spans with the highest scores for a block, rising; at most `count`.

        Of equal ones the newer are taken.

        Args:
            q_LBTHD: queries of the block in all layers, before RoPE; Hq is a multiple of the heads of keys.
            positions_BTP: of its tokens; may be left out without a rope.
            count: how many.

        Raises:
            ValueError: queries that do not fit the keys or are not finite, a rope without positions, or a
                count below 1.
        """
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            raise ValueError(f"count={count!r} is not accepted: give an integer above 0")
        if self.rope is not None and positions_BTP is None:
            raise ValueError(
                "positions_BTP=None with a rope: queries are rotated by their positions"
            )
        if not self.means:
            return ()
        numbers = sorted(self.means, reverse=True)
        key_NLBHD = np.stack([self.means[i] for i in numbers])
        L, B, H, D = key_NLBHD.shape[1:]
        shape = q_LBTHD.shape
        if len(shape) != 5 or (*shape[:2], shape[4]) != (L, B, D) or shape[3] % H or not shape[2]:
            raise ValueError(
                f"q_LBTHD has shape {shape}; accepted: ({L}, {B}, T, n {H}, {D}) (L, B, T, Hq, D)"
            )
        query_LBHD = np.asarray(_mean_query(q_LBTHD, positions_BTP, H, self.rope))
        if not np.isfinite(query_LBHD).all():
            raise ValueError("q_LBTHD or its positions have NaN or Inf; accepted: finite numbers")
        score_N = np.einsum("nlbhd,lbhd->n", key_NLBHD, query_LBHD)
        best = np.argsort(-score_N, kind="stable")[:count]
        return tuple(sorted(numbers[i] for i in best))


@functools.partial(jax.jit, static_argnames=("lay", "rope"))
def _mean_key(span: Span, lay: Layout, rope: Rope | None) -> Float[Array, "L B H D"]:
    """The rotated mean key of a span, layer by layer, over the tokens that are no padding."""
    slots: Any = jax.tree.map(lambda x: x[:, None], span.k)
    table = None if rope is None else rope.table(span.pos)
    valid_BT = jnp.ones(span.pos.shape[:2]) if span.valid is None else span.valid
    share_BT = valid_BT / jnp.maximum(valid_BT.sum(1, keepdims=True), 1)

    def one(layer: Array) -> Array:
        k_BHTD = decode_slot(slots, lay.key_codec, lay, layer, jnp.int32(0), jnp.float32)
        k_BHTD = k_BHTD if rope is None else rope.rotate(k_BHTD, table)
        return jnp.einsum("bhtd,bt->bhd", k_BHTD, share_BT.astype(jnp.float32))

    return lax.map(one, jnp.arange(lay.layers))


@functools.partial(jax.jit, static_argnames=("heads", "rope"))
def _mean_query(
    q_LBTHD: Array, pos_BTP: Array | None, heads: int, rope: Rope | None
) -> Float[Array, "L B H D"]:
    """The rotated mean query of a block for each head of the keys."""
    q_LBHTD = jnp.swapaxes(q_LBTHD, 2, 3).astype(jnp.float32)
    if rope is not None:
        table = rope.table(jnp.asarray(pos_BTP))
        q_LBHTD = jax.vmap(lambda q_BHTD: rope.rotate(q_BHTD, table))(q_LBHTD)
    L, B, _, _, D = q_LBHTD.shape
    return q_LBHTD.mean(3).reshape(L, B, heads, -1, D).mean(3)
