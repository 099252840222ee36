"""The parts of the transformer that are its own: how timesteps enter, and the head.

Letters as in `modeling.py`; the parts shared with other models are in `common/wan_layers.py`.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.common.numerics import silu
from models.common.wan_layers import layer_norm, linear, modulate, modulation
from models.self_forcing.config import SelfForcingConfig


def sinusoid(t: Float[Array, "..."], width: int) -> Float[Array, "... width"]:
    """[cos(t w_j), sin(t w_j)] with w_j = 10000^(-j / half), half = width / 2, float32.

    The whole part of t is looked up in a float64 host table and the fraction, where float32 angles
    are exact enough, turns the result; sin and cos of t w_j itself would be off by 3e-5.

    Args:
        t: timesteps, 0..1000, float32.
        width: even number of channels.
    """
    frequency = 10000.0 ** (-np.arange(width // 2) / (width // 2))
    angle = np.arange(1001)[:, None] * frequency
    whole = jnp.floor(t)
    row = whole.astype(jnp.int32)
    cos_a, sin_a = (jnp.asarray(f(angle), jnp.float32)[row] for f in (np.cos, np.sin))
    small = jnp.multiply.outer(t - whole, jnp.asarray(frequency, jnp.float32))
    cos_b, sin_b = jnp.cos(small), jnp.sin(small)
    return jnp.concatenate([cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b], axis=-1)


class TimeEmbedding(nnx.Module):
    """e = W2 silu(W1 sinusoid(t) + b1) + b2 for the head; Wp silu(e) + bp, in six, for blocks."""

    def __init__(self, config: SelfForcingConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.up = linear(config.time_width, config.width, config, rngs)
        self.down = linear(config.width, config.width, config, rngs)
        self.project = linear(config.width, 6 * config.width, config, rngs)

    def __call__(
        self, t_BF: Float[Array, "B F"]
    ) -> tuple[Float[Array, "B F M"], Float[Array, "B F 6 M"]]:
        waves = sinusoid(t_BF, self.config.time_width).astype(self.config.dtype)
        e_BFM = self.down(silu(self.up(waves)))
        return e_BFM, self.project(silu(e_BFM)).reshape(*t_BF.shape, 6, -1)


class Head(nnx.Module):
    """W (layer_norm(x) (1 + scale) + shift) + b: the pixels of each token's patch."""

    def __init__(self, config: SelfForcingConfig, *, rngs: nnx.Rngs):
        self.eps = config.eps
        self.modulation = modulation(2, config, rngs)
        out = config.patch[0] * config.patch[1] * config.out_channels
        self.project = linear(config.width, out, config, rngs)

    def __call__(
        self, x_BTM: Float[Array, "B T M"], e_BFM: Float[Array, "B F M"]
    ) -> Float[Array, "B T O"]:
        shift, scale = (m[None, None] + e_BFM for m in self.modulation[...])
        return self.project(modulate(layer_norm(x_BTM, self.eps), shift, scale))
