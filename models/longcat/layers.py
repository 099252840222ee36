"""The parts of a LongCat block, each as small as its equation.

Weights and activations share one dtype, except in the float32 islands: the timestep embedding, the
projections that make shifts, scales and gates, the gated sums, and the last linear layer. Inside an
island weights are cast up and nothing is rounded. Letters as in `modeling.py`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.common.attention import dense_attention
from models.common.numerics import gelu, rms_norm, silu, standardise
from models.longcat.config import LongCatConfig
from models.longcat.sharding import whole


def linear(
    n_in: int, n_out: int, config: LongCatConfig, rngs: nnx.Rngs, *, bias: bool = True
) -> nnx.Linear:
    """A matrix, and a bias, in the model's dtype."""
    dtypes = dict(dtype=config.dtype, param_dtype=config.dtype)
    return nnx.Linear(n_in, n_out, use_bias=bias, rngs=rngs, **dtypes)


def side_by_side(
    n_in: int, parts: int, n_out: int, config: LongCatConfig, rngs: nnx.Rngs
) -> nnx.LinearGeneral:
    """Several matrices in one layer, [..., n_in] to [..., parts, n_out].

    The parts have an axis of their own, so that each can be divided by heads.
    """
    dtypes = dict(dtype=config.dtype, param_dtype=config.dtype)
    return nnx.LinearGeneral(n_in, (parts, n_out), rngs=rngs, **dtypes)


def island(n_in: int, n_out: int, config: LongCatConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """A matrix and a bias stored in the model's dtype, applied in true float32."""
    dtypes = dict(dtype=jnp.float32, param_dtype=config.dtype)
    return nnx.Linear(n_in, n_out, precision=jax.lax.Precision.HIGHEST, rngs=rngs, **dtypes)


def modulate(
    x_BTM: Float[Array, "B T M"],
    shift_BFM: Float[Array, "B F M"],
    scale_BFM: Float[Array, "B F M"],
    eps: float,
) -> Float[Array, "B T M"]:
    """layer_norm(x) (1 + scale) + shift, one shift and scale per latent frame; rounded once."""
    y_BFSM = _frames(standardise(x_BTM, eps), scale_BFM.shape[1])
    y_BFSM = y_BFSM * (1 + scale_BFM[:, :, None]) + shift_BFM[:, :, None]
    return y_BFSM.reshape(x_BTM.shape).astype(x_BTM.dtype)


def add_gated(
    x_BTM: Float[Array, "B T M"], y_BTM: Float[Array, "B T M"], gate_BFM: Float[Array, "B F M"]
) -> Float[Array, "B T M"]:
    """x + gate y, one gate per latent frame; product and sum in float32, rounded once."""
    x, y = (_frames(a.astype(jnp.float32), gate_BFM.shape[1]) for a in (x_BTM, y_BTM))
    return (x + gate_BFM[:, :, None] * y).reshape(x_BTM.shape).astype(x_BTM.dtype)


def _frames(x_BTM: Array, frames: int) -> Array:
    B, T, M = x_BTM.shape
    return x_BTM.reshape(B, frames, T // frames, M)


def sinusoid(t: Float[Array, "..."], width: int) -> Float[Array, "... width"]:
    """[cos(t w_j), sin(t w_j)] with w_j = 10000^(-j / half), half = width / 2, float32.

    Args:
        t: timesteps, 0..1000.
        width: even number of channels.
    """
    # All in float32 as in training: near t = 1000 the angles are off by up to 3e-5.
    j = np.arange(width // 2, dtype=np.float32)
    frequency = np.exp(np.float32(-math.log(10000)) * j / np.float32(width // 2))
    angle = jnp.multiply.outer(t.astype(jnp.float32), frequency)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(nnx.Module):
    """c = W2 silu(W1 sinusoid(t) + b1) + b2, float32."""

    def __init__(self, config: LongCatConfig, *, rngs: nnx.Rngs):
        self.width = config.time_width
        self.up = island(config.time_width, config.condition_width, config, rngs)
        self.down = island(config.condition_width, config.condition_width, config, rngs)

    def __call__(self, t_BF: Float[Array, "B F"]) -> Float[Array, "B F C"]:
        return self.down(silu(self.up(sinusoid(t_BF, self.width))))


class TextEmbedding(nnx.Module):
    """W2 gelu(W1 x + b1) + b2."""

    def __init__(self, config: LongCatConfig, *, rngs: nnx.Rngs):
        self.dtype = config.dtype
        self.up = linear(config.text_width, config.width, config, rngs)
        self.down = linear(config.width, config.width, config, rngs)

    def __call__(self, text_BUE: Float[Array, "B U E"]) -> Float[Array, "B U M"]:
        return whole(self.down(gelu(self.up(text_BUE.astype(self.dtype)))))


class HeadNorm(nnx.Module):
    """`rms_norm` over the channels of each head; all heads share the weight."""

    def __init__(self, config: LongCatConfig):
        self.eps = config.eps
        self.weight = nnx.Param(jnp.ones((config.head_dim,), config.dtype))

    def __call__(self, x_BTHD: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
        return rms_norm(x_BTHD, self.weight[...], self.eps)


class SelfAttention(nnx.Module):
    """Projections around self-attention; K leaves normed and before RoPE, as caches keep it."""

    def __init__(self, config: LongCatConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = side_by_side(config.width, 3, config.width, config, rngs)
        self.q_norm, self.k_norm = HeadNorm(config), HeadNorm(config)
        self.out = linear(config.width, config.width, config, rngs)

    def split(
        self, y_BTM: Float[Array, "B T M"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H D"]]:
        """Queries and keys before RoPE, and values."""
        B, T, _ = y_BTM.shape
        q, k, v = jnp.moveaxis(self.qkv(y_BTM).reshape(B, T, 3, self.heads, -1), 2, 0)
        return self.q_norm(q), self.k_norm(k), v

    def join(self, o_BTHD: Float[Array, "B T H D"]) -> Float[Array, "B T M"]:
        """Joins the heads and mixes them."""
        return whole(self.out(o_BTHD.reshape(*o_BTHD.shape[:2], -1)))


class CrossAttention(nnx.Module):
    """Every token reads the text; no RoPE."""

    def __init__(self, config: LongCatConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.q = linear(config.width, config.width, config, rngs)
        self.kv = side_by_side(config.width, 2, config.width, config, rngs)
        self.q_norm, self.k_norm = HeadNorm(config), HeadNorm(config)
        self.out = linear(config.width, config.width, config, rngs)

    def key_value(
        self, text_BUM: Float[Array, "B U M"]
    ) -> tuple[Float[Array, "B U H D"], Float[Array, "B U H D"]]:
        """Keys and values of the projected text."""
        B, U, _ = text_BUM.shape
        k, v = jnp.moveaxis(self.kv(text_BUM).reshape(B, U, 2, self.heads, -1), 2, 0)
        return self.k_norm(k), v

    def __call__(
        self,
        x_BTM: Float[Array, "B T M"],
        k_BUHD: Float[Array, "B U H D"],
        v_BUHD: Float[Array, "B U H D"],
        bias_BU: Float[Array, "B U"],
    ) -> Float[Array, "B T M"]:
        q_BTHD = self.q_norm(self.q(x_BTM).reshape(*x_BTM.shape[:2], self.heads, -1))
        o_BTHD = dense_attention(q_BTHD, k_BUHD, v_BUHD, bias_BU)
        return whole(self.out(o_BTHD.reshape(x_BTM.shape)))


class AffineLayerNorm(nnx.Module):
    """Layer norm with a learned scale and bias; float32 inside, rounded once."""

    def __init__(self, config: LongCatConfig):
        self.eps = config.eps
        self.scale = nnx.Param(jnp.ones((config.width,), config.dtype))
        self.bias = nnx.Param(jnp.zeros((config.width,), config.dtype))

    def __call__(self, x_BTM: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        scale, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.scale, self.bias))
        return (standardise(x_BTM, self.eps) * scale + bias).astype(x_BTM.dtype)


class FeedForward(nnx.Module):
    """SwiGLU without biases: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config: LongCatConfig, *, rngs: nnx.Rngs):
        M, N = config.width, config.ffn_width
        self.gate, self.up = (linear(M, N, config, rngs, bias=False) for _ in range(2))
        self.down = linear(N, M, config, rngs, bias=False)

    def __call__(self, x_BTM: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        return whole(self.down(silu(self.gate(x_BTM)) * self.up(x_BTM)))


class Head(nnx.Module):
    """W modulate(x) + b: the pixels of each token's patch, float32."""

    def __init__(self, config: LongCatConfig, *, rngs: nnx.Rngs):
        self.eps = config.eps
        self.modulation = island(config.condition_width, 2 * config.width, config, rngs)
        out = config.patch[0] * config.patch[1] * config.out_channels
        self.project = island(config.width, out, config, rngs)

    def __call__(
        self, x_BTM: Float[Array, "B T M"], c_BFC: Float[Array, "B F C"]
    ) -> Float[Array, "B T O"]:
        shift_BFM, scale_BFM = jnp.split(self.modulation(c_BFC), 2, axis=-1)
        return self.project(modulate(x_BTM, shift_BFM, scale_BFM, self.eps).astype(jnp.float32))
