"""What of the past is kept, and in what form: the layout of the model's KV cache.

The cache's block is the model's: the few latent frames that are denoised together.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp

from models.worldplay.config import WorldPlayConfig
from models.worldplay.encoding import POSITION, apart
from models.worldplay.retrieval import check_window
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.plan import Plan
from qvg_jax.codecs.base import Codec, identity
from qvg_jax.codecs.spec import factory


@dataclass(frozen=True, kw_only=True)
class History:
    """What is remembered, and how.

    Attributes:
        semantics: "append" keeps every frame; a context pass over all of them stores the newest
            block only, as the published 2-bit integration does. "recompute" is the original model:
            the context pass goes over retrieved frames and replaces the whole cache. The two agree
            for blocks 0 and 1 and differ from then on.
        storage: "packed" keeps both encodings of K and V, as published, and codecs see them side
            by side, 2 D channels a head. "single" keeps one k and one v, half the bytes, and
            encodes them whenever they are read.
        key_codec, value_codec: compressors of old K and V; both None for none.
        span_blocks: blocks compressed together.
        keep_recent: newest blocks that are never compressed.
        memory_frames, recent_frames: most frames of a recomputed context, and how many of them are
            the newest.
        plan: by which the cache is spread over devices; None for one.
        sight: most spans that a block reads, chosen by fields of view from all spans of the walk, which
            a store in host memory keeps; None reads all. A walk may then be longer than the RoPE table,
            and the device holds as much for a walk of any length.

    Raises:
        ValueError: an unknown name, one codec without the other, codecs with "recompute", which
            would encode the whole context anew for every block, a plan with it, or `sight` below 1 or
            with anything that a recalled span does not serve.
    """

    semantics: Literal["append", "recompute"] = "append"
    storage: Literal["packed", "single"] = "packed"
    key_codec: Codec | None = None
    value_codec: Codec | None = None
    span_blocks: int = 2
    keep_recent: int = 0
    memory_frames: int = 16
    recent_frames: int = 12
    plan: Plan | None = None
    sight: int | None = None

    def __post_init__(self):
        names = dict(semantics=("append", "recompute"), storage=("packed", "single"))
        for name, accepted in names.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r}; accepted: {accepted}")
        if (self.key_codec is None) != (self.value_codec is None):
            raise ValueError("give both key_codec and value_codec, or neither")
        if self.recomputes and self.compressed:
            raise ValueError(
                "codecs need semantics='append': with 'recompute' the whole context is made anew "
                "for every block, and compressing it would save nothing"
            )
        if self.recomputes and self.plan is not None:
            raise ValueError(
                f"plan {self.plan.axis}={self.plan.devices} needs semantics='append': with 'recompute' a "
                "block's context is made anew and has no history for devices to share; accepted: plan=None"
            )
        if self.span_blocks < 1 or self.keep_recent < 0:
            raise ValueError(
                f"span_blocks={self.span_blocks} must be at least 1 and "
                f"keep_recent={self.keep_recent} at least 0"
            )
        self._check_sight()

    def _check_sight(self) -> None:
        if self.sight is None:
            return
        asked = f"sight={self.sight!r}"
        if isinstance(self.sight, bool) or not isinstance(self.sight, int) or self.sight < 1:
            raise ValueError(
                f"{asked} has no room for a span; accepted: an integer above 0, or None"
            )
        if self.recomputes:
            raise ValueError(
                f"{asked} needs semantics='append': with 'recompute' the context of each block is made "
                "anew from chosen frames, and there are no spans to recall"
            )
        if self.storage != "single":
            raise ValueError(
                f"{asked} needs storage='single': packed keys are rotated to the place that they had, and "
                "a recalled span takes another"
            )
        if self.plan is not None:
            raise ValueError(
                f"{asked} and plan {self.plan.axis}={self.plan.devices}: spans are recalled on one device; "
                "accepted: plan=None"
            )

    @classmethod
    def qvg(cls, codec: Codec, **changes) -> "History":
        """The published schedule: before every second block, the last two become one span.

        Source: Quant VideoGen (arXiv 2602.02958), the released WorldPlay settings.
        """
        return cls(**(dict(key_codec=codec, value_codec=codec) | changes))

    @property
    def compressed(self) -> bool:
        """Whether old frames are encoded by codecs."""
        return self.key_codec is not None

    @property
    def recomputes(self) -> bool:
        """Whether the whole context is made anew for every block."""
        return self.semantics == "recompute"

    def context_frames(self, config: WorldPlayConfig, frames: int) -> int:
        """Most frames in the context of any block of a video of `frames` latent frames.

        With `sight` it is the same for videos of all lengths.

        Raises:
            ValueError: context and block together are longer than the RoPE table.
        """
        n = config.frames_per_block
        most = max(frames - n, 0)
        if self.recomputes:
            check_window(self.memory_frames, self.recent_frames, n)
            most = min(most, self.memory_frames)
        if self.sight is not None:
            most = ((self.sight + 1) * self.span_blocks + self.keep_recent - 1) * n
        if most + n > config.rope_frames:
            raise ValueError(
                f"a block of a video of {frames} frames sees {most + n} frames, more than the "
                f"rope_frames={config.rope_frames} rows of the model's RoPE table: positions "
                "beyond it were never defined"
            )
        return most

    def room_frames(self, config: WorldPlayConfig, frames: int) -> int:
        """Latent frames that the buffers of a video of `frames` are made for: with `sight`, of those alone."""
        if self.sight is None:
            return frames
        return self.context_frames(config, frames) + config.frames_per_block

    def spans_in_sight(self, blocks: int) -> tuple[int, int]:
        """What a block reads that has so many before it: old spans, and blocks behind the last span.

        The blocks are those of the window, and the newest one. If they make up a span, it is compressed
        before the block is denoised and then is one of the spans in sight.
        """
        waiting = self.span_blocks + self.keep_recent
        spans = max((blocks - 1 - self.keep_recent) // self.span_blocks, 0)
        behind = blocks - spans * self.span_blocks
        most = spans if self.sight is None else self.sight - (behind == waiting)
        return min(spans, most), behind


@factory
def side_by_side(codec: Codec) -> Codec:
    """A codec of packed K or V: both encodings of a head, [B, 2 H, T, D], as one [B, H, T, 2 D].

    Args:
        codec: compressor of vectors of 2 D channels.
    """

    def joined(shape):
        B, C, T, D = shape
        return B, C // 2, T, 2 * D

    def init(shape, dtype=jnp.bfloat16):
        return codec.init(joined(shape), dtype)

    def encode(x_BCTD, state, *, key=None):
        return codec.encode(jnp.concatenate(apart(x_BCTD), -1), state, key=key)

    def decode(packed, dtype=jnp.bfloat16):
        x = codec.decode(packed, dtype)
        B, H, T, E = x.shape
        return jnp.swapaxes(x.reshape(B, H, T, 2, E // 2), 2, 3).reshape(B, 2 * H, T, E // 2)

    storage = codec.storage and replace(codec.storage, heads=2 * codec.storage.heads)
    return replace(
        codec,
        init=init,
        encode=encode,
        decode=decode,
        storage=storage,
        bits_per_element=lambda shape: codec.bits_per_element(joined(shape)),
        nbytes=lambda shape: codec.nbytes(joined(shape)),
    )


def make_cache(
    config: WorldPlayConfig,
    history: History,
    *,
    frames: int,
    latent_height: int,
    latent_width: int,
    batch: int = 1,
) -> KVCache:
    """An empty cache for videos of up to `frames` latent frames.

    Args:
        config: sizes and dtype of the model.
        history: what to remember.
        frames: longest video; the newest block of a video is never in the cache.
        latent_height, latent_width: size of the latent frames.
        batch: videos generated together.

    Raises:
        ValueError: a video longer than the RoPE table, or a codec that does not fit.
    """
    rows, columns = config.grid(latent_height, latent_width)
    blocks = history.context_frames(config, frames) // config.frames_per_block
    packed = history.storage == "packed"
    spans = max(blocks - history.keep_recent, 0) // history.span_blocks
    if (history.compressed or history.sight) and spans:
        plain = identity(config.dtype)
        codecs = (history.key_codec or plain, history.value_codec or plain)
        waiting = history.span_blocks + history.keep_recent
    else:
        codecs, spans, waiting = (identity(config.dtype),) * 2, 0, blocks
    part = None if history.plan is None else history.plan.part
    if part is not None:
        spans = -(-spans // part.devices) * part.devices  # more than the video needs stay empty
    key_codec, value_codec = map(side_by_side, codecs) if packed and spans else codecs
    return KVCache.create(
        layers=config.layers,
        batch=batch,
        heads=config.heads * (2 if packed else 1),
        head_dim=config.head_dim,
        block_tokens=config.frames_per_block * rows * columns,
        sink_blocks=0,
        span_blocks=history.span_blocks,
        max_spans=spans,
        keep_recent=history.keep_recent,
        window_blocks=max(waiting, 1),
        pos_dims=POSITION,
        key_codec=key_codec,
        value_codec=value_codec,
        overflow="error" if history.sight is None else "drop",
        sharding=history.plan,
        dtype=config.dtype,
    )
