"""The cache as a value: which arrays it has, what they mean, and how an empty one is made.

Sink and window share one dense buffer: its first `sink_blocks` blocks are the sink, the rest is
the window, and valid blocks are always a prefix. Compressed spans sit in a ring of slots, so that
evicting one moves a counter and no bytes. Softmax does not care about the order of keys: each
token carries its own position.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qvg_jax.cache.devices import create_on
from qvg_jax.cache.head_history import HeadHistory, history_of
from qvg_jax.cache.key_bias import KeyBias
from qvg_jax.cache.layer_codecs import of_layers
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.own_window import dense_shape, near_shape
from qvg_jax.cache.plan import Plan
from qvg_jax.cache.relative import RelativeTime
from qvg_jax.cache.rope import Encodings, Rope, Table
from qvg_jax.cache.slots import empty_slots
from qvg_jax.cache.view import CacheView, view_of
from qvg_jax.codecs.base import Codec, Packed, State, identity
from qvg_jax.errors import wrong_kind

__all__ = ["KVCache"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """K and V of all layers: uncompressed sink and window, compressed spans between them.

    Axes: L layers, N span slots, B batch, H heads, T tokens, D head dim, P position components.
    """

    dense_k: Array  # [L, B, H, T, D] before RoPE; T = (sink_blocks + window_blocks) * block_tokens
    dense_v: Array  # [L, B, H, T, D]
    dense_pos: Array  # [B, T, P] float32
    span_k: (
        Packed  # packed spans of the key codec, leaves [L, N, ...] (see slots.py); None if N = 0
    )
    span_v: Packed  # packed spans of the value codec
    span_pos: Array  # [N, B, T, P] float32; T = span_blocks * block_tokens
    state_k: State  # what the key codec hands from span to span, leaves [L, ...]
    state_v: State
    dense_blocks: Array  # int32, valid blocks of the dense buffer: sink first, then window
    first_span: Array  # int32, slot of the oldest span
    num_spans: Array  # int32, valid spans: slots first_span, first_span + 1, ... modulo N
    seen_blocks: Array  # int32, calls of append
    dropped_blocks: Array  # int32, blocks that were stored and are gone (evict, overflow="drop")
    rejected_blocks: Array  # int32, blocks that found no room (overflow="error")
    nonfinite: Array  # int32, NaN and Inf among all appended values; stops at 2**31 - 1
    first_bad_block: Array  # int32, number of the first block that had one; -1 if none
    filled: Array | None = None  # int32, tokens of the block behind the valid ones; None if whole
    dense_valid: Array | None = None  # bool [B, T], False for padding; None unless blocks="padded"
    span_valid: Array | None = None  # bool [N, B, T]
    dense_table: Table = (
        None  # rope table of sink and window, leaves [B, T, ...]; None without `rope`
    )
    span_table: Table = None  # rope tables of the spans, leaves [N, B, T, ...]
    near_k: Array | None = None  # of local heads with a window of their own (own_window.py)
    near_v: Array | None = None
    near_pos: Array | None = None  # [B, T, P] float32
    layout: Layout = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def create(
        cls,
        *,
        layers: int = 1,
        batch: int = 1,
        heads: int,
        head_dim: int,
        block_tokens: int,
        sink_blocks: int = 1,
        span_blocks: int = 16,
        max_spans: int = 8,
        keep_recent: int = 2,
        window_blocks: int | None = None,
        pos_dims: int = 3,
        key_codec: Codec | list[Codec] | None = None,
        value_codec: Codec | list[Codec] | None = None,
        key_bias: KeyBias | None = None,
        overflow: str = "error",
        blocks: str = "whole",
        rope: Rope | None = None,
        history: HeadHistory | None = None,
        sharding: Plan | None = None,
        dtype: Any = jnp.bfloat16,
    ) -> "KVCache":
        """An empty cache.

        A sliding window without memory is `max_spans=0, window_blocks=W, overflow="drop"`.

        Args:
            layers, batch, heads, head_dim: sizes of K and V; `heads` are key-value heads.
            block_tokens: tokens of a block: what one `append` adds, or adds at most (`blocks`).
            sink_blocks: first blocks of the video, kept uncompressed for good.
            span_blocks: blocks that `compress` encodes together.
            max_spans: slots for compressed spans; 0 keeps everything in the window.
            keep_recent: newest blocks that `compress` leaves alone.
            window_blocks: capacity of the window; None is span_blocks + keep_recent + 1.
            pos_dims: components of a token's position; 0 for a model without RoPE.
            key_codec, value_codec: compressors of K and V; None is `identity(dtype)`, the plain
                cache. A list has a codec for each layer.
            key_bias: what attention adds to the logits of compressed keys; None for nothing.
            overflow: what happens when a block finds no room. "error": it is not stored, counted
                in `rejected_blocks`, and `raise_if_bad` raises. "drop": bounded context; the
                oldest span is replaced or, without slots, the oldest block of the window.
            blocks: which tokens one `append` takes. "whole": `block_tokens` of them. "partial": up to
                `block_tokens`, so that a prompt and single tokens fill blocks one after another; a
                window with overflow="drop" and no slots then slides by tokens. "padded": the same, and
                each row of the batch says how many of them count.
            rope: rotation whose tables of all stored tokens the cache keeps, so that a view makes
                those of new tokens only. None makes all of them for each view.
            history: which heads have a history; the others read the sink and the newest blocks
                only, and no span of them is stored. None is all heads.
            sharding: the plan by which the cache is spread over devices; None is one device.
            dtype: floating dtype of sink and window.

        Returns:
            A cache with zeros in all buffers.

        Raises:
            ValueError: a size or name that is not accepted, or a codec that refuses the span's
                shape (head_dim not divisible by its group, more centroids than tokens), or a plan that
                does not divide the cache or fit the devices.
        """
        if window_blocks is None:
            window_blocks = span_blocks + keep_recent + 1
        if sharding is not None and not isinstance(sharding, Plan):
            raise wrong_kind("sharding", sharding, "a Plan, such as Plan(spans=2), or None")
        dtype = jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype={dtype.name} is not accepted: give a floating point dtype")
        plain = identity(dtype)
        lay = Layout(
            layers=layers,
            batch=batch,
            heads=heads,
            head_dim=head_dim,
            block_tokens=block_tokens,
            sink_blocks=sink_blocks,
            span_blocks=span_blocks,
            max_spans=max_spans,
            keep_recent=keep_recent,
            window_blocks=window_blocks,
            pos_dims=pos_dims,
            overflow=overflow,
            key_codec=plain if key_codec is None else of_layers("key_codec", key_codec, layers),
            value_codec=plain
            if value_codec is None
            else of_layers("value_codec", value_codec, layers),
            key_bias=key_bias,
            blocks=blocks,
            rope=rope,
            history=history_of(history, layers, heads),
            plan=None if sharding is None or sharding.devices == 1 else sharding,
        )
        make = lambda: cls._empty(lay, dtype)  # noqa: E731
        return make() if lay.plan is None else create_on(lay.plan, make)

    @classmethod
    def _empty(cls, lay: Layout, dtype: Any) -> "KVCache":
        """A cache of this layout with zeros in all buffers."""
        batch = lay.batch
        tokens = lay.dense_blocks * lay.block_tokens
        span_k, state_k = empty_slots(lay, lay.key_codec, dtype)
        span_v, state_v = empty_slots(lay, lay.value_codec, dtype)
        # One array per counter: donation refuses a buffer that appears twice.
        counters = ("dense_blocks", "first_span", "num_spans", "seen_blocks", "dropped_blocks")
        counters += ("rejected_blocks", "nonfinite")
        counters += () if lay.blocks == "whole" else ("filled",)
        pos = dict(
            dense=jnp.zeros((batch, tokens, lay.pos_dims), jnp.float32),
            span=jnp.zeros((lay.max_spans, batch, lay.span_tokens, lay.pos_dims), jnp.float32),
        )
        more = {}
        if lay.own_window:
            shape = near_shape(lay)
            more |= {name: jnp.zeros(shape, dtype) for name in ("near_k", "near_v")}
            more["near_pos"] = jnp.zeros((batch, shape[3], lay.pos_dims), jnp.float32)
        for name, pos_xP in pos.items():
            if lay.blocks == "padded":
                more[f"{name}_valid"] = jnp.zeros(pos_xP.shape[:-1], bool)
            if lay.rope is not None:
                table = jax.eval_shape(lay.rope.table, pos_xP)
                more[f"{name}_table"] = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), table)
        return cls(
            dense_k=jnp.zeros(dense_shape(lay), dtype),
            dense_v=jnp.zeros(dense_shape(lay), dtype),
            dense_pos=pos["dense"],
            span_k=span_k,
            span_v=span_v,
            span_pos=pos["span"],
            state_k=state_k,
            state_v=state_v,
            first_bad_block=jnp.full((), -1, jnp.int32),
            layout=lay,
            **{name: jnp.zeros((), jnp.int32) for name in counters},
            **more,
        )

    def view(
        self,
        positions_BTP: Float[Array, "B T P"] | None = None,
        rope: Rope | Encodings | Literal[False] | None = None,
        *,
        precompute: bool = True,
        relative: RelativeTime | None = None,
    ) -> CacheView:
        """What `attend` reads; with the rope tables of all tokens, made once for all layers.

            view = cache.view(positions_BTP, rope)
            def layer(h, xs):
                w, i = xs
                q, k, v = ...
                return h + attend(q, view, k, v, layer=i), (k, v)
            h, (k_LBTHD, v_LBTHD) = lax.scan(layer, h, (params, jnp.arange(L)))

        It stays valid until the cache changes: the denoising steps of a block can share one.

        Args:
            positions_BTP: positions of the new tokens; none with `Encodings`.
            rope: rotation of Q and K, or encodings of stored K and V. None is the cache's own, or
                none where the cache has no positions; False is none, on purpose.
            precompute: whether to make the tables of all stored tokens now. They cost memory in
                proportion to the capacity; False makes one span's table at a time, in each layer.
                Tables that the cache keeps (`create(rope=...)`) are taken as they are.
            relative: how times count back from the new tokens, with a horizon, for videos without end.
                None reads the times that are stored. With it, tables that the cache keeps are made anew.

        Returns:
            A pytree that refers to this cache's buffers and copies none.

        Raises:
            ValueError: `rope` without positions, positions without `rope` or of another shape, no
                rope for a cache with positions, `relative` without a Rope, or a horizon shorter than the
                block where positions are known.
        """
        return view_of(self, positions_BTP, rope, precompute, relative)

    def __repr__(self) -> str:
        lay = self.layout
        codecs = dict.fromkeys(str(codec) for codec in (lay.key_codec, lay.value_codec))

        def count(x: Any) -> str:
            known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and not x.ndim
            return str(int(x)) if known else "?"

        spans, dense = count(self.num_spans), count(self.dense_blocks)
        return (
            f"KVCache({lay.layers} layers x {lay.batch} x {lay.heads} heads x {lay.head_dim}, blocks of "
            f"{lay.block_tokens} tokens: {dense} of {lay.dense_blocks} dense, {spans} of {lay.max_spans} "
            f"spans of {lay.span_blocks} blocks, {' | '.join(codecs)})"
        )

    @property
    def dense_tokens(self) -> Int[Array, ""]:
        """Tokens that sink and window hold, the first ones of the dense buffer."""
        lay = self.layout
        tokens = self.dense_blocks * lay.block_tokens
        if self.filled is None:
            return tokens
        # A ring that is full overwrites tokens one by one, and all of them stay valid.
        return jnp.minimum(tokens + self.filled, lay.dense_blocks * lay.block_tokens)

    @property
    def encoded_blocks(self) -> Int[Array, ""]:
        """Blocks that were compressed so far, those that are gone again included."""
        if self.filled is None:
            return self.seen_blocks - self.rejected_blocks - self.dense_blocks
        return self.num_spans * self.layout.span_blocks + self.dropped_blocks

    @property
    def row_tokens(self) -> Int[Array, " B"]:
        """Valid tokens of each batch row, without padding."""
        lay = self.layout
        if self.dense_valid is None:
            return jnp.broadcast_to(self.tokens, (lay.batch,))
        here_T = jnp.arange(self.dense_valid.shape[1]) < self.dense_tokens
        count_B = (self.dense_valid & here_T[None]).sum(1, dtype=jnp.int32)
        if lay.max_spans:
            age_N = (jnp.arange(lay.max_spans) - self.first_span) % lay.max_spans
            here_N = (age_N < self.num_spans)[:, None, None]
            count_B += (self.span_valid & here_N).sum((0, 2), dtype=jnp.int32)
        return count_B

    @property
    def tokens(self) -> Int[Array, ""]:
        """Tokens of one layer and batch row, in all regions, padding included."""
        lay = self.layout
        if self.filled is not None:
            return self.dense_tokens + self.num_spans * lay.span_tokens
        return (self.dense_blocks + self.num_spans * lay.span_blocks) * lay.block_tokens
