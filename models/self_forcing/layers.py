"""The parts of a Wan transformer block, each as small as its equation.

Weights and activations share one dtype. Statistics of norms, the activation functions and the
softmax run in float32 and round once. Letters as in `modeling.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.self_forcing.config import SelfForcingConfig


def linear(n_in: int, n_out: int, config: SelfForcingConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """A matrix and a bias in the model's dtype."""
    return nnx.Linear(n_in, n_out, dtype=config.dtype, param_dtype=config.dtype, rngs=rngs)


def layer_norm(x: Float[Array, "*rows M"], eps: float) -> Float[Array, "*rows M"]:
    """(x - mean) / sqrt(var + eps) over the last axis; no parameters, float32 inside."""
    return _standardise(x, eps).astype(x.dtype)


def _standardise(x, eps):
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def per_frame(m_BFM: Float[Array, "B F M"], tokens: int) -> Float[Array, "B T M"]:
    """Gives every token the row of its frame."""
    return jnp.repeat(m_BFM, tokens // m_BFM.shape[1], axis=1)


def modulate(
    x_BTM: Float[Array, "B T M"], shift_BFM: Float[Array, "B F M"], scale_BFM: Float[Array, "B F M"]
) -> Float[Array, "B T M"]:
    """x (1 + scale) + shift, with one shift and one scale per latent frame."""
    tokens = x_BTM.shape[1]
    return x_BTM * (1 + per_frame(scale_BFM, tokens)) + per_frame(shift_BFM, tokens)


def _in_float32(f, x: Array) -> Array:
    return f(x.astype(jnp.float32)).astype(x.dtype)


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(x)."""
    return _in_float32(jax.nn.silu, x)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU in its tanh form."""
    return _in_float32(jax.nn.gelu, x)


def dense_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BUHD: Float[Array, "B U H D"],
    v_BUHD: Float[Array, "B U H D"],
    mask: Bool[Array, "1 1 T U"] | None = None,
) -> Float[Array, "B T H D"]:
    """softmax(q k / sqrt(D)) v; the softmax in float32."""
    # JAX's own function mixes dtypes inside and fails where promotion is set to strict.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q_BTHD, k_BUHD, v_BUHD, mask=mask)


class AffineLayerNorm(nnx.Module):
    """`layer_norm`, then a learned scale and bias."""

    def __init__(self, config: SelfForcingConfig):
        self.eps = config.eps
        self.scale = nnx.Param(jnp.ones((config.width,), config.dtype))
        self.bias = nnx.Param(jnp.zeros((config.width,), config.dtype))

    def __call__(self, x_BTM: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        scale, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.scale, self.bias))
        return (_standardise(x_BTM, self.eps) * scale + bias).astype(x_BTM.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) over the whole model width, rounded, then times the weight."""

    def __init__(self, config: SelfForcingConfig):
        self.eps = config.eps
        self.weight = nnx.Param(jnp.ones((config.width,), config.dtype))

    def __call__(self, x_BTM: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        x = x_BTM.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x.astype(x_BTM.dtype) * self.weight[...][None, None]


class Projections(nnx.Module):
    """The four matrices of an attention layer; q and k are normed before the head split."""

    def __init__(self, config: SelfForcingConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (
            linear(config.width, config.width, config, rngs) for _ in range(4)
        )
        self.norm_q, self.norm_k = RMSNorm(config), RMSNorm(config)

    def query(self, x_BTM: Float[Array, "B T M"]) -> Float[Array, "B T H D"]:
        """Queries, before RoPE."""
        return self._split(self.norm_q(self.q(x_BTM)))

    def key_value(
        self, x_BTM: Float[Array, "B T M"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]:
        """Keys, before RoPE, and values."""
        return self._split(self.norm_k(self.k(x_BTM))), self._split(self.v(x_BTM))

    def output(self, o_BTHD: Float[Array, "B T H D"]) -> Float[Array, "B T M"]:
        """Joins the heads and mixes them."""
        return self.o(o_BTHD.reshape(*o_BTHD.shape[:2], -1))

    def _split(self, x_BTM):
        return x_BTM.reshape(*x_BTM.shape[:2], self.heads, -1)


class FeedForward(nnx.Module):
    """W2 gelu(W1 x + b1) + b2."""

    def __init__(self, n_in: int, n_hidden: int, config: SelfForcingConfig, *, rngs: nnx.Rngs):
        self.up = linear(n_in, n_hidden, config, rngs)
        self.down = linear(n_hidden, config.width, config, rngs)

    def __call__(self, x: Float[Array, "B T n_in"]) -> Float[Array, "B T M"]:
        return self.down(gelu(self.up(x)))


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


def modulation(n: int, config: SelfForcingConfig, rngs: nnx.Rngs) -> nnx.Param:
    """A learned [n, M] table of shifts, scales and gates, to which the timestep adds."""
    table = jax.random.normal(rngs.params(), (n, config.width), jnp.float32) / config.width**0.5
    return nnx.Param(table.astype(config.dtype))
