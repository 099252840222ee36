"""The parts of the transformer that are not those of Wan2.1.

Weights and activations share one dtype. Modulation and the residual sums around it are float32 and
round once, as in the released pipeline. Letters as in `modeling.py`.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.common.numerics import silu
from models.common.wan_layers import layer_norm, linear, modulate, modulation
from models.worldplay.config import WorldPlayConfig


def sinusoid(s: Float[Array, "B F"], width: int) -> Float[Array, "B F width"]:
    """[cos(s w_j), sin(s w_j)] with w_j = 10000^(-j / half), half = width / 2.

    Frequencies and angles are rounded to float32, as the released code does: at s = 1000 that is
    3e-5 off the exact waves, and the weights have only ever seen the rounded ones.

    Args:
        s: timesteps 0..1000, or action ids.
        width: even number of channels.
    """
    half = width // 2
    exponent = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = s.astype(jnp.float32)[..., None] * frequency.reshape((1,) * s.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class ScalarEmbedding(nnx.Module):
    """W2 silu(W1 sinusoid(s) + b1) + b2 of a number s: a timestep or the id of an action."""

    def __init__(self, config: WorldPlayConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.up = linear(config.time_width, config.width, config, rngs)
        self.down = linear(config.width, config.width, config, rngs)

    def __call__(self, s_BF: Float[Array, "B F"]) -> Float[Array, "B F M"]:
        waves = sinusoid(s_BF, self.config.time_width)
        return self.down(silu(self.up(waves.astype(self.config.dtype))))


def modulated_norm(
    x_BTM: Float[Array, "B T M"],
    shift_BFM: Float[Array, "B F M"],
    scale_BFM: Float[Array, "B F M"],
    eps: float,
) -> Float[Array, "B T M"]:
    """layer_norm(x) (1 + scale) + shift, float32 inside, in x's dtype."""
    y = layer_norm(x_BTM.astype(jnp.float32), eps)
    shift_BFM, scale_BFM = (m.astype(jnp.float32) for m in (shift_BFM, scale_BFM))
    return modulate(y, shift_BFM, scale_BFM).astype(x_BTM.dtype)


class Head(nnx.Module):
    """W (layer_norm(x) (1 + scale) + shift) + b: the pixels of each token's patch."""

    def __init__(self, config: WorldPlayConfig, *, rngs: nnx.Rngs):
        self.eps = config.eps
        self.modulation = modulation(2, config, rngs)
        out = config.patch[0] * config.patch[1] * config.out_channels
        self.project = linear(config.width, out, config, rngs)

    def __call__(
        self, x_BTM: Float[Array, "B T M"], e_BFM: Float[Array, "B F M"]
    ) -> Float[Array, "B T O"]:
        shift, scale = (m[None, None] + e_BFM for m in self.modulation[...])
        return self.project(modulated_norm(x_BTM, shift, scale, self.eps))
