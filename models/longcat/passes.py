"""The three ways to run the network on a clip.

Plain: all frames are noise. Joint: the first frames are given; they see only themselves, and the
rest sees everything. Cached: only the noise frames go through the network, and read the given ones
from a cache that was built once per clip (`condition.py`). Given frames have timestep 0 and do not
read the text, so joint and cached passes agree, whatever prompt, noise and step.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from models.common.attention import dense_attention
from models.longcat.config import LongCatConfig
from models.longcat.modeling import LongCatDiT, Output, TextKV
from models.longcat.rope import clip_positions, model_rope
from models.longcat.sharding import AXIS, by_heads, spread_out
from qvg_jax.attention.api import attend
from qvg_jax.attention.tiles import tile_attention
from qvg_jax.cache.view import CacheView
from qvg_jax.sharding import attend_by_heads


def clip_attention(
    config: LongCatConfig, shape: tuple[int, ...], given_frames: int = 0
) -> Callable[..., Array]:
    """Attention among the frames of a clip, as `LongCatDiT` takes it.

    With `config.tiles` it is block-sparse, the given frames among themselves and the rest with all keys, each
    with tiles of its own; a clip of one frame stays dense, as in the original.

    Args:
        config: sizes of the model.
        shape: (B, F, Z, Y, X) of the latents.
        given_frames: the first frames, which see only themselves.
    """
    grid = config.grid(*shape[-2:])
    rope = model_rope(config)
    positions_BTP = clip_positions(config, 0, (1, *shape[1:]))
    table, first = rope.table(positions_BTP), given_frames * positions_BTP.shape[1] // shape[1]

    def rotated(x_BTHD: Array) -> Array:
        return jnp.swapaxes(rope.rotate(jnp.swapaxes(x_BTHD, 1, 2), table), 1, 2)

    def attention(q_BTHD, k_BTHD, v_BTHD, _):
        return by_heads(among, rotated(q_BTHD), rotated(k_BTHD), v_BTHD)

    def among(q, k, v):
        if not first:
            return reading(q, k, v)
        given = reading(*(x[:, :first] for x in (q, k, v)))
        return jnp.concatenate([given, reading(q[:, first:], k, v)], axis=1)

    def reading(q, k, v):
        if config.tiles is None or shape[1] == 1:
            return dense_attention(q, k, v)
        of_q, of_k = ((x.shape[1] // math.prod(grid), *grid) for x in (q, k))
        return tile_attention(q, k, v, config.tiles, query_grid=of_q, key_grid=of_k)

    return attention


def clip_forward(
    model: LongCatDiT,
    x_BFZYX: Float[Array, "B F Z Y X"],
    t: Float[Array, "..."],
    text_kv: TextKV | None,
    *,
    given_frames: int = 0,
    keep: Callable[..., Any] | None = None,
) -> Output:
    """The plain pass, or with `given_frames` the joint pass.

    Args:
        model: the transformer.
        x_BFZYX: latents of the whole clip.
        t: timesteps, as the model takes them; those of given frames should be 0.
        text_kv: the prompts; None leaves cross-attention out.
        given_frames: the first frames, which see only themselves and do not read the text.
        keep: as the model takes it.

    Raises:
        ValueError: `given_frames` leaves no frame to predict, or the tiles of block-sparse attention do not
            divide the given or the other frames.
    """
    if not 0 <= given_frames < x_BFZYX.shape[1]:
        raise ValueError(
            f"given_frames={given_frames} must be 0 to {x_BFZYX.shape[1] - 1}: "
            f"the clip has {x_BFZYX.shape[1]} latent frames"
        )
    attention = clip_attention(model.config, x_BFZYX.shape, given_frames)
    return model(x_BFZYX, t, text_kv, attention, silent_frames=given_frames, keep=keep)


def cached_forward(
    model: LongCatDiT,
    x_BFZYX: Float[Array, "B F Z Y X"],
    t: Float[Array, "..."],
    text_kv: TextKV,
    view: CacheView,
) -> Output:
    """The cached pass: the given frames come from a cache, which stays as it is.

    The cache holds V videos; B is a multiple of V, and row r V + v of the batch reads video v. So
    the two branches of guidance share one cache, and a span is decoded once for both.

    Args:
        model: the transformer.
        x_BFZYX: latents of the noise frames only.
        t: their timesteps.
        text_kv: the prompts, B rows.
        view: from `condition.view_condition`.

    Raises:
        ValueError: B is not a multiple of the cache's batch, or a model with block-sparse attention.
    """
    if model.config.tiles is not None:
        raise ValueError(
            f"tiles={model.config.tiles} is not accepted in the cached pass: block-sparse attention does not "
            "read a compressed cache; accepted: None, or the joint pass"
        )
    videos = view.cache.layout.batch
    if x_BFZYX.shape[0] % videos:
        raise ValueError(
            f"x_BFZYX has batch {x_BFZYX.shape[0]}; accepted: a multiple of the cache's {videos}"
        )

    def attention(q_BTHD, k_BTHD, v_BTHD, layer):
        way = dict(implementation=model.config.attention, precision=model.config.precision)
        options = dict(layer=layer) | way
        if spread_out():
            return attend_by_heads(q_BTHD, view, k_BTHD, v_BTHD, axis=AXIS, **options)
        return attend(q_BTHD, view, k_BTHD, v_BTHD, **options)

    return model(x_BFZYX, t, text_kv, attention)
