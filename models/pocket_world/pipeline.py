"""From a camera path to frames: the block step that `qvg_jax.loop` drives, and caches to run it with.

A block is either *given* (real frames of a tour: only the context pass runs) or generated (a few
denoising steps, then the context pass). Both end with the block's clean K and V in the cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from models.pocket_world import camera, world
from models.pocket_world.config import PocketWorldConfig
from models.pocket_world.modeling import PocketWorld, to_frames, to_tokens
from models.pocket_world.overlap import Overlap
from models.pocket_world.sampling import Sampler, second_order_step
from qvg_jax.attention.api import attend
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.cache.key_bias import KeyBias
from qvg_jax.cache.operations import KVCache, append, compress
from qvg_jax.cache.relative import RelativeTime
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import Codec
from qvg_jax.codecs.recipes import parse_recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WorldState:
    """What a generation carries from block to block: the cache and a noise key."""

    cache: KVCache
    key: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockInput:
    """One block of a path for B worlds; a scan's xs has a leading axis of blocks.

    Attributes:
        number: int32, counts blocks; noise depends on it and the state's key only.
        pose: [B, n, 3] camera poses of the block's n frames.
        before: [B, n, 3] the pose one frame earlier.
        time: [n] frame numbers.
        frames: [B, n, 64, 96, 3] frames in [-1, 1]; read where `given` or `made`.
        given: bool, whether the block is part of a tour.
        made: bool, whether `frames` are the model's own, made in an earlier run.
    """

    number: Int[Array, ""]
    pose: Float[Array, "B n 3"]
    before: Float[Array, "B n 3"]
    time: Int[Array, "n"]
    frames: Float[Array, "B n 64 96 3"]
    given: Array
    made: Array


def world_codec(name: str, **settings) -> tuple[Codec, Codec]:
    """The codecs for K and V of a preset, with the centroids that pay for themselves in pocket world's short spans.

    The published recipes use 256 centroids for spans of some 30,000 tokens; a span here has 768.

    Args:
        name: a preset.
        **settings: what to change in it.

    Raises:
        ValueError: an unknown name, with the known ones, or a setting that is not accepted.
    """
    clustered = ("qvg", "midrise", "trellis", "dither", "kmeans", "auto")
    defaults = dict(num_centroids=16) if name.startswith(clustered) else {}
    return presets.pair(name, **(defaults | settings))


def world_recipe(text: str) -> tuple[Codec, Codec]:
    """The codecs for K and V that a user writes: a recipe, or KEYS/VALUES with one for each.

    Args:
        text: such as "qvg", "midrise:num_centroids=32" or "bf16/midrise".

    Raises:
        ValueError: more than two parts, or what `world_codec` does not accept.
    """
    parts = [world_codec(name, **settings) for name, settings in map(parse_recipe, text.split("/"))]
    if len(parts) > 2:
        raise ValueError(f"codec={text!r} has {len(parts)} parts; accepted: one, or KEYS/VALUES")
    return parts[0][0], parts[-1][1]


def make_cache(
    cfg: PocketWorldConfig,
    codec: Codec | tuple[Codec, Codec],
    frames: int,
    *,
    batch: int = 1,
    span_blocks: int = 8,
    keep_recent: int = 2,
    key_bias: KeyBias | None = None,
    overflow: str = "error",
    history: HeadHistory | None = None,
    max_spans: int | None = None,
    dtype=jnp.bfloat16,
) -> KVCache:
    """A cache for `frames` frames of history; the first block is the sink.

    Args:
        codec: for K and V, or one for each.
        frames: tour and generated frames together.
        span_blocks, keep_recent, key_bias, overflow, history: as in `KVCache.create`.
        max_spans: slots; None is as many as the frames need.
    """
    key_codec, value_codec = codec if not isinstance(codec, Codec) else (codec, codec)
    blocks = -(-frames // cfg.block_frames)
    if max_spans is None:
        max_spans = max(1, -(-(blocks - 1 - keep_recent) // span_blocks))
    return KVCache.create(
        **_sizes(cfg, batch),
        sink_blocks=1,
        span_blocks=span_blocks,
        max_spans=max_spans,
        keep_recent=keep_recent,
        key_codec=key_codec,
        value_codec=value_codec,
        key_bias=key_bias,
        overflow=overflow,
        history=history,
        dtype=dtype,
    )


def make_window(
    cfg: PocketWorldConfig, frames: int, *, batch: int = 1, dtype=jnp.bfloat16
) -> KVCache:
    """A sliding window: the newest `frames` frames in bf16, everything older forgotten."""
    blocks = max(1, frames // cfg.block_frames)
    return KVCache.create(
        **_sizes(cfg, batch),
        sink_blocks=0,
        max_spans=0,
        window_blocks=blocks,
        overflow="drop",
        dtype=dtype,
    )


def _sizes(cfg, batch):
    return dict(
        layers=cfg.layers,
        batch=batch,
        heads=cfg.heads,
        head_dim=cfg.head_dim,
        block_tokens=cfg.block_tokens,
        pos_dims=4,
    )


def block_inputs(
    cfg: PocketWorldConfig,
    seed_B: Int[Array, "B"],
    path_BF3: Float[Array, "B F 3"],
    tour_frames: int,
) -> BlockInput:
    """Cuts paths into blocks and renders the frames of the tour.

    Args:
        seed_B: the worlds.
        path_BF3: all poses, tour first; F is a multiple of `cfg.block_frames`.
        tour_frames: how many of them are given; a multiple of `cfg.block_frames`.

    Returns:
        BlockInput with a leading axis of F // block_frames blocks.

    Raises:
        ValueError: a count that is not a multiple of `block_frames`.
    """
    n, (b, f) = cfg.block_frames, path_BF3.shape[:2]
    if f % n or tour_frames % n:
        raise ValueError(
            f"frames={f} and tour_frames={tour_frames} must be multiples of block_frames={n}"
        )
    blocks = f // n
    before = jnp.concatenate([path_BF3[:, :1], path_BF3[:, :-1]], 1)

    def cut(x_BF3):
        return jnp.moveaxis(x_BF3.reshape(b, blocks, n, 3), 1, 0)

    time = jnp.arange(f, dtype=jnp.int32).reshape(blocks, n)
    given = jnp.arange(blocks) < tour_frames // n
    truth = render_path(seed_B, path_BF3[:, :tour_frames])
    frames = jnp.zeros((blocks, b, n, world.HEIGHT, world.WIDTH, 3), jnp.float32)
    truth = jnp.moveaxis(truth.reshape(b, tour_frames // n, n, world.HEIGHT, world.WIDTH, 3), 1, 0)
    frames = frames.at[: tour_frames // n].set(truth)
    return BlockInput(
        number=jnp.arange(blocks, dtype=jnp.int32),
        pose=cut(path_BF3),
        before=cut(before),
        time=time,
        frames=frames,
        given=given,
        made=jnp.zeros(blocks, jnp.bool_),
    )


_render_block = jax.jit(jax.vmap(world.render, in_axes=(0, 0, None)))


def render_path(
    seed_B, path_BF3, *, chunk: int = 16, first_time: int = 0
) -> Float[Array, "B F 64 96 3"]:
    """Ground truth for every pose, rendered `chunk` frames at a time to bound memory."""
    b, f = path_BF3.shape[:2]
    parts = []
    for i in range(0, f, chunk):
        j = min(i, max(0, f - chunk))  # the last chunk moves back: one shape, one compilation
        pose = path_BF3[:, j : j + chunk]
        time = first_time + jnp.arange(j, j + pose.shape[1], dtype=jnp.int32)
        parts.append(_render_block(seed_B, pose, time)[:, i - j :])
    return jnp.concatenate(parts, 1) if parts else jnp.zeros((b, 0, world.HEIGHT, world.WIDTH, 3))


def make_step(
    model: PocketWorld,
    sampler: Sampler,
    relative: RelativeTime | None = None,
    precision: str | None = None,
):
    """The step `(state, BlockInput) -> (state, frames [B, n, 64, 96, 3])` for `qvg_jax.loop`.

    A `Partial`: the weights travel as arrays and are not baked into the program.

    Args:
        model: the network.
        sampler: how a block comes out of noise.
        relative: how frame numbers count back from each block; None for absolute ones.
        precision: of attention to the cache, see `qvg_jax.attend`.
    """
    graph, params = nnx.split(model)
    cfg, levels = model.cfg, sampler.levels()
    rope, n = cfg.rope(), cfg.block_frames
    grid = Overlap(cfg.patch)

    def step(params, state: WorldState, x: BlockInput):
        model = nnx.merge(graph, params)
        features = jax.vmap(camera.frame_features, (0, 0, None))(x.pose, x.before, x.time)
        positions = jax.vmap(camera.token_positions, (0, None, None))(x.pose, x.time, cfg.patch)
        batch = x.pose.shape[0]

        view = state.cache.view(positions, rope, relative=relative)
        # Outside of `denoise`, where the compiler merges the tables of stored tokens of both views.
        shifted = grid.positions(x.pose, x.time)
        between = state.cache.view(shifted, rope, relative=relative)
        cache = state.cache
        blocks = cache.seen_blocks - cache.dropped_blocks - cache.rejected_blocks
        scale = sampler.logit_scale(blocks, cfg.head_dim)

        def evaluate(tokens, level, view=view):
            return model(
                tokens,
                jnp.full((batch, n), level),
                features,
                lambda i, q, k, v: attend(q, view, k, v, layer=i, scale=scale, precision=precision),
                jnp.arange(cfg.layers),
            )

        def denoise():
            key = jax.random.fold_in(state.key, x.number)
            tokens = jax.random.normal(key, (batch, cfg.block_tokens, cfg.token_channels))

            def one(carry, pair):
                tokens, last, s_last = carry
                now, then = pair
                clean, _ = evaluate(tokens, now)
                # The first step has no slope to go by, and one to level 0 ends at the prediction.
                use = (s_last > now) & (then > 0)
                slope = jnp.where(use, (last - clean) / jnp.where(use, s_last - now, 1.0), 0.0)
                return (second_order_step(tokens, clean, slope, now, then), clean, now), None

            pairs = (jnp.array(levels[:-1]), jnp.array(levels[1:]))
            start = (tokens, tokens, jnp.float32(0))
            (tokens, clean, _), _ = jax.lax.scan(one, start, pairs)
            if sampler.overlapping:
                other, _ = evaluate(grid.cut(tokens), levels[-1], between)
                tokens = grid.blend(clean, other)
            return jnp.clip(tokens, -1.0, 1.0)

        tokens = jax.lax.cond(x.given | x.made, lambda: to_tokens(x.frames, cfg.patch), denoise)
        _, (k, v) = evaluate(tokens, jnp.where(x.given, 0.0, sampler.context_noise))
        cache = compress(append(state.cache, k, v, positions))
        return dataclasses.replace(state, cache=cache), to_frames(tokens, cfg.patch)

    return Partial(step, params)
