"""The static shape of a cache: how many blocks go where, decided once, part of the jit key."""

import dataclasses
from numbers import Integral

from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.cache.key_bias import KeyBias
from qvg_jax.cache.layer_codecs import LayerCodecs, codec_of, of_layers
from qvg_jax.cache.plan import Part, Plan
from qvg_jax.cache.rope import Rope
from qvg_jax.codecs.accounting import pair_bits
from qvg_jax.codecs.base import Codec

__all__ = ["BLOCKS", "Layout", "OVERFLOW"]

OVERFLOW = ("error", "drop")
BLOCKS = ("whole", "partial", "padded")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes, codecs and overflow rule of a `KVCache`; hashable, so that jit can key on it.

    All blocks have room for the same number of tokens. Blocks live in three regions:
    sink (the first `sink_blocks` of the video, never compressed), spans (`max_spans` slots of
    `span_blocks` blocks each, compressed) and window (`window_blocks`, the newest).

    Raises:
        ValueError: a size is out of range, `overflow` is unknown, or the window cannot hold a
            span beside the blocks that must stay recent.
    """

    layers: int
    batch: int
    heads: int
    head_dim: int
    block_tokens: int
    sink_blocks: int
    span_blocks: int
    max_spans: int
    keep_recent: int
    window_blocks: int
    pos_dims: int
    overflow: str
    key_codec: Codec | LayerCodecs
    value_codec: Codec | LayerCodecs
    key_bias: KeyBias | None = None
    blocks: str = "whole"
    rope: Rope | None = None
    history: HeadHistory | None = None  # None: every head has one
    plan: Plan | None = None  # of a cache on several devices
    part: Part | None = None  # of the arrays that one of them has

    def __post_init__(self):
        least = dict(layers=1, batch=1, heads=1, head_dim=1, block_tokens=1, window_blocks=1)
        least |= dict(sink_blocks=0, max_spans=0, keep_recent=0, pos_dims=0)
        least |= dict(span_blocks=1 if self.max_spans else 0)
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
                raise ValueError(f"{name}={value!r} is not accepted: give an integer >= {low}")
        if self.overflow not in OVERFLOW:
            raise ValueError(f"overflow={self.overflow!r} is not accepted: give one of {OVERFLOW}")
        if self.blocks not in BLOCKS:
            raise ValueError(f"blocks={self.blocks!r} is not accepted: give one of {BLOCKS}")
        if self.rope is not None and (not isinstance(self.rope, Rope) or not self.pos_dims):
            raise ValueError(
                f"rope={self.rope!r} with pos_dims={self.pos_dims}: a cache keeps the tables of a Rope "
                "for tokens that have positions; accepted: None, or a Rope and pos_dims >= 1"
            )
        for name in ("key_codec", "value_codec"):
            of_layers(name, getattr(self, name), self.layers)
        if self.key_bias is not None:
            if not isinstance(self.key_bias, KeyBias):
                raise ValueError(f"key_bias={self.key_bias!r} is not accepted: give a KeyBias")
            self.key_bias.check(self.key_codec)
        if self.history is not None:
            self.history.check(self)
        if self.max_spans and self.window_blocks < self.span_blocks + self.keep_recent:
            raise ValueError(
                f"window_blocks={self.window_blocks} is not accepted: a span is compressed when "
                f"the window holds span_blocks={self.span_blocks} + "
                f"keep_recent={self.keep_recent} blocks; give at least that"
            )

    @property
    def dense_blocks(self) -> int:
        """Blocks of the uncompressed buffer: sink, then window."""
        return self.sink_blocks + self.window_blocks

    @property
    def own_window(self) -> bool:
        """Whether local heads have a window of their own, see `HeadHistory`."""
        return self.history is not None and self.history.own_window

    @property
    def near_blocks(self) -> int:
        """Blocks of the buffer of local heads with a window of their own: sink, then the ring."""
        return self.sink_blocks + self.history.local_blocks if self.own_window else 0

    @property
    def span_tokens(self) -> int:
        """Tokens of one span, which is whole also where each device has a part of each block."""
        shares = self.part.devices if self.part is not None and self.part.splits_blocks else 1
        return self.span_blocks * self.block_tokens * shares

    @property
    def span_shape(self) -> tuple[int, int, int, int]:
        """(B, H, T, D) of one span of a layer whose heads all have a history, as codecs see it."""
        return self.batch, self.heads, self.span_tokens, self.head_dim

    @property
    def span_elements(self) -> int:
        """Elements that one slot holds of all layers, K and V together."""
        batch, heads, tokens, dim = self.span_shape
        rows = self.layers * heads if self.history is None else self.history.full
        return 2 * batch * rows * tokens * dim

    @property
    def span_bits(self) -> float:
        """Bits per element of a compressed span, K and V together, from the codecs' formats.

        The mean over elements where heads differ in their history; 0 where none has one.
        """
        if self.history is None:
            return pair_bits((self.key_codec, self.value_codec), self.span_shape)
        heads = self.history.counts
        bits = (n * self.layer_bits(l) for l, n in enumerate(heads) if n)
        return sum(bits) / max(1, self.history.full)

    def layer_bits(self, layer: int) -> float:
        """Bits per element of a compressed span of one layer, K and V together; 0 if it has none."""
        pair = tuple(codec_of(codec, layer) for codec in (self.key_codec, self.value_codec))
        batch, heads, tokens, dim = self.span_shape
        if self.history is not None:
            heads = self.history.counts[layer]
        return pair_bits(pair, (batch, heads, tokens, dim)) if heads else 0.0

    @property
    def capacity_blocks(self) -> int:
        """Blocks that sink, all slots and the window hold together."""
        return self.dense_blocks + self.max_spans * self.span_blocks

    @property
    def is_ring(self) -> bool:
        """Whether the window overwrites its oldest block instead of refusing a new one."""
        return self.overflow == "drop" and self.max_spans == 0
