"""Outlier channels for pocket world: other weights for the same function, with K and V as large models have them."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.pocket_world.modeling import PocketWorld

__all__ = ["with_outliers"]


def with_outliers(
    model: PocketWorld, factor: float = 8.0, channels: int = 4, seed: int = 0
) -> PocketWorld:
    """Returns the model with some channels of K and V `factor` times as large, and the same output.

    In every layer, `channels` channels of K (pairs that RoPE turns together, in all heads, because heads share the
    scale behind the norm) grow and those of Q shrink, so that logits stay; in every head, as many channels
    of V grow and the rows of the output projection that read them shrink. With a power of two no
    rounding changes anywhere, so frames are equal to the last bit while K and V are stored exactly.

    Args:
        model: stays as it is.
        factor: of the outlier channels, above 0.
        channels: outlier channels of a head, an even number up to the head dim.
        seed: of the choice.

    Raises:
        ValueError: an argument outside its range.
    """
    cfg = model.cfg
    if not factor > 0:
        raise ValueError(f"factor={factor} is not accepted: give more than 0")
    if channels % 2 or not 0 <= channels <= cfg.head_dim:
        raise ValueError(f"channels={channels} is not accepted: give 0, 2, ... {cfg.head_dim}")
    rng = np.random.default_rng(seed)
    half, width = cfg.head_dim // 2, cfg.heads * cfg.head_dim
    key_LD = np.ones((cfg.layers, cfg.head_dim), np.float32)
    value_LHD = np.ones((cfg.layers, cfg.heads, cfg.head_dim), np.float32)
    for layer in range(cfg.layers):
        first = rng.choice(half, channels // 2, replace=False)
        key_LD[layer, np.r_[first, first + half]] = factor  # channel j turns with j + D/2
        for head in range(cfg.heads):
            value_LHD[layer, head, rng.choice(cfg.head_dim, channels, replace=False)] = factor
    value_LA = jnp.asarray(value_LHD.reshape(cfg.layers, width))
    graph, state = nnx.split(model)
    weights = nnx.to_pure_dict(state)
    blocks = weights["blocks"]
    blocks["k_scale"] = blocks["k_scale"] * key_LD
    blocks["q_scale"] = blocks["q_scale"] / key_LD
    blocks["qkv"]["kernel"] = _scaled_values(blocks["qkv"]["kernel"], value_LA)
    blocks["out"]["kernel"] = blocks["out"]["kernel"] / value_LA[:, :, None]
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)


def _scaled_values(
    kernel_LCX: Float[Array, "L C X"], value_LA: Float[Array, "L A"]
) -> Float[Array, "L C X"]:
    """Returns the projection to Q, K and V, one after the other, with the columns of V multiplied."""
    factor_LX = jnp.concatenate([jnp.ones_like(value_LA)] * 2 + [value_LA], axis=1)
    return kernel_LCX * factor_LX[:, None]
