"""What of the past a block can read: the layout of the model's KV cache.

The cache's unit is one latent frame, so blocks of 1 and 3 frames, windows that end inside a block
and sinks of any length need nothing special.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.common.tokens import token_positions
from models.self_forcing.averaged_sink import absorb_oldest
from models.self_forcing.config import SelfForcingConfig
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.cache.operations import KVCache, append
from qvg_jax.cache.plan import Plan
from qvg_jax.cache.rope import Rope
from qvg_jax.cache.slots import read_slot
from qvg_jax.codecs.base import Codec, identity


@dataclass(frozen=True, kw_only=True)
class History:
    """How much is remembered, and how.

    Three kinds: everything in the model's dtype (`History()`); a sliding window
    (`History(window_frames=21, sink_frames=3)`); compressed spans (`History.qvg(codec)`), bounded
    or not.

    Attributes:
        window_frames: latent frames in sight, those of the block itself and the sink included;
            None for all. With codecs it is rounded down to whole spans.
        sink_frames: first frames of the video, always in sight and never compressed.
        sink_average: share of the sink that stays when a frame leaves the window and is averaged into
            it (`averaged_sink`); None keeps the first frames as they are.
        key_codec, value_codec: compressors of old K and V; both None for none.
        span_frames: frames compressed together.
        keep_recent: newest frames before the block that are never compressed.
        heads: which heads have compressed spans, and how many newest frames the others read; None for all.
        plan: by which the cache is spread over devices; None for one.
    """

    window_frames: int | None = None
    sink_frames: int = 0
    sink_average: float | None = None
    key_codec: Codec | None = None
    value_codec: Codec | None = None
    span_frames: int = 24
    keep_recent: int = 0
    heads: HeadHistory | None = None
    plan: Plan | None = None

    def __post_init__(self):
        for name, low in (("sink_frames", 0), ("keep_recent", 0), ("span_frames", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        if (self.key_codec is None) != (self.value_codec is None):
            raise ValueError("give both key_codec and value_codec, or neither")
        if self.sink_average is None:
            return
        if not 0 <= self.sink_average <= 1:
            raise ValueError(f"sink_average={self.sink_average} is not accepted: give 0 to 1")
        if not self.sink_frames or self.window_frames is None or self.compressed or self.plan:
            raise ValueError(
                f"sink_average={self.sink_average} needs a sink and a window, without codecs and on "
                "one device"
            )

    @classmethod
    def qvg(cls, codec: Codec, **changes) -> "History":
        """The paper's schedule: before every eighth block, the last eight become one span.

        Source: Quant VideoGen (arXiv 2602.02958), the released Self-Forcing schedule.
        """
        return cls(**(dict(key_codec=codec, value_codec=codec) | changes))

    @property
    def compressed(self) -> bool:
        """Whether old frames are encoded."""
        return self.key_codec is not None


def make_cache(
    config: SelfForcingConfig,
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
        frames: longest video; a bounded history does not grow with it.
        latent_height, latent_width: size of the latent frames.
        batch: videos generated together.

    Raises:
        ValueError: a window that cannot hold what it must.
    """
    n, sink = config.frames_per_block, history.sink_frames
    rows, columns = config.grid(latent_height, latent_width)
    bound = frames if history.window_frames is None else min(history.window_frames, frames)
    least = sink + n + 1
    if history.window_frames is not None and history.window_frames < least:
        raise ValueError(
            f"window_frames={history.window_frames} must be at least {least}: "
            f"sink_frames={sink}, a block of {n}, and a frame between"
        )
    bounded = bound < frames
    if history.compressed and history.span_frames < n:
        raise ValueError(
            f"span_frames={history.span_frames} must be at least {n}: a block brings {n} frames, "
            "and compresses one span"
        )
    # What can wait in the window for its turn to be compressed, with the newest block on top.
    waiting = history.span_frames + history.keep_recent + n - 1
    slots = (
        bound - sink - (waiting if bounded else history.keep_recent + n)
    ) // history.span_frames
    if history.compressed and bounded and slots < 1:
        raise ValueError(
            f"window_frames={history.window_frames} must be at least "
            f"{sink + waiting + history.span_frames}: sink_frames={sink}, one compressed span of "
            f"{history.span_frames} and {waiting} frames that wait to be compressed"
        )
    part = None if history.plan is None else history.plan.part
    if part is not None and not bounded:
        slots = -(-slots // part.devices) * part.devices  # more than the video needs stay empty
    if history.compressed and slots > 0:
        layout = dict(
            span_blocks=history.span_frames,
            max_spans=slots,
            keep_recent=history.keep_recent,
            window_blocks=waiting,
            key_codec=history.key_codec,
            value_codec=history.value_codec,
            history=history.heads,
        )
    else:
        # The block itself is not stored while it runs, so a sliding window keeps n frames less.
        kept = bound - sink - (n if bounded else 0)
        plain = identity(config.dtype)
        layout = dict(span_blocks=1, max_spans=0, keep_recent=0, window_blocks=max(kept, 1))
        layout |= dict(key_codec=plain, value_codec=plain)
    return KVCache.create(
        layers=config.layers,
        batch=batch,
        heads=config.heads,
        head_dim=config.head_dim,
        block_tokens=rows * columns,
        sink_blocks=sink,
        pos_dims=3,
        overflow="drop" if bounded else "error",
        sharding=history.plan,
        dtype=config.dtype,
        **layout,
    )


def block_positions(
    config: SelfForcingConfig, cache: KVCache, shape: tuple[int, ...]
) -> Float[Array, "B T 3"]:
    """Positions of the tokens of the block that comes next.

    Args:
        config: gives the patch.
        cache: its count of frames is where the block starts.
        shape: (B, F, Z, Y, X) of the block's latents.
    """
    B, F, _, Y, X = shape
    frames_F = cache.seen_blocks + jnp.arange(F, dtype=jnp.int32)
    positions_TP = token_positions(frames_F, *config.grid(Y, X)).astype(jnp.float32)
    return jnp.broadcast_to(positions_TP[None], (B, *positions_TP.shape))


def append_frames(
    cache: KVCache,
    k_LBTHD: Float[Array, "L B T H D"],
    v_LBTHD: Float[Array, "L B T H D"],
    positions_BTP: Float[Array, "B T 3"],
    sink_average: float | None = None,
) -> KVCache:
    """Appends the clean K and V of a block, frame by frame; the sink averages what leaves if it does that."""
    size = cache.layout.block_tokens
    for start in range(0, k_LBTHD.shape[2], size):
        frame = slice(start, start + size)
        if sink_average is not None and cache.layout.is_ring:
            cache = absorb_oldest(cache, sink_average)
        cache = append(cache, k_LBTHD[:, :, frame], v_LBTHD[:, :, frame], positions_BTP[:, frame])
    return cache


def recall(
    cache: KVCache, rope: Rope | None = None
) -> tuple[Float[np.ndarray, "T"], Float[np.ndarray, "L B T H D"], Float[np.ndarray, "L B T H D"]]:
    """Everything in the cache, decoded and in order of frames: to look at, not to run on.

    Outside jit, and as large as the uncompressed history.

    Args:
        cache: the cache.
        rope: if given, K is returned as attention sees it, rotated.

    Returns:
        The latent frame of each token, K and V, on the host, in the dtype of the dense buffer.

    Raises:
        NotImplementedError: a cache that has not all heads of a span.
    """
    lay = cache.layout
    if lay.history is not None:
        raise NotImplementedError(
            f"recall: the cache has a {lay.history}; accepted: a cache whose heads all have a history"
        )
    dense = _seen(cache.dense_k, cache.dense_v, cache.dense_pos, rope)
    valid = int(cache.dense_blocks) * lay.block_tokens
    regions = [tuple(x[..., :valid, :] for x in dense)]
    for i in range(int(cache.num_spans)):
        slot = (int(cache.first_span) + i) % lay.max_spans
        regions.append(_seen(*_decoded(cache, slot), cache.span_pos[slot], rope))
    pos_BTP, k_LBHTD, v_LBHTD = (np.concatenate(x, axis=-2) for x in zip(*regions, strict=True))
    # Frames are whole, so a stable sort by frame keeps the tokens of each in raster order.
    frame_T = pos_BTP[0, :, 0]
    order = np.argsort(frame_T, stable=True)
    k, v = (np.swapaxes(x[:, :, :, order], 2, 3) for x in (k_LBHTD, v_LBHTD))
    return frame_T[order], k, v


@functools.partial(jax.jit, static_argnames="rope")
def _rotated(k_LBHTD, pos_BTP, rope):
    table = rope.table(pos_BTP)
    return jax.lax.map(lambda k_BHTD: rope.rotate(k_BHTD, table), k_LBHTD)


def _seen(k_LBHTD, v_LBHTD, pos_BTP, rope):
    k_LBHTD = k_LBHTD if rope is None else _rotated(k_LBHTD, pos_BTP, rope)
    return np.asarray(pos_BTP), np.asarray(k_LBHTD), np.asarray(v_LBHTD)


@jax.jit
def _decoded(cache, slot):
    """K and V of one span of all layers, as attention decodes them."""
    lay = cache.layout

    def decoded(codec, slots):
        def one_layer(layer):
            return codec.decode(read_slot(slots, layer, slot), cache.dense_k.dtype)

        return jax.lax.map(one_layer, jnp.arange(lay.layers))

    return decoded(lay.key_codec, cache.span_k), decoded(lay.value_codec, cache.span_v)
