"""The parts that transformers grown from Wan2.1 share, each as small as its equation.

Weights and activations share one dtype. Statistics of norms and the activation functions run in
float32 and round once. Letters: B batch, F latent frames, T tokens, M model width, H heads, D head
dim, U text slots.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.common.numerics import gelu, rms_norm, standardise


class Sizes(Protocol):
    """The sizes that the layers read from a model's configuration."""

    width: int
    heads: int
    eps: float
    dtype: DTypeLike


def linear(n_in: int, n_out: int, config: Sizes, rngs: nnx.Rngs) -> nnx.Linear:
    """A matrix and a bias in the model's dtype."""
    return nnx.Linear(n_in, n_out, dtype=config.dtype, param_dtype=config.dtype, rngs=rngs)


def layer_norm(x: Float[Array, "*rows M"], eps: float) -> Float[Array, "*rows M"]:
    """(x - mean) / sqrt(var + eps) over the last axis; no parameters, float32 inside."""
    return standardise(x, eps).astype(x.dtype)


def per_frame(m_BFM: Float[Array, "B F M"], tokens: int) -> Float[Array, "B T M"]:
    """Gives every token the row of its frame."""
    return jnp.repeat(m_BFM, tokens // m_BFM.shape[1], axis=1)


def modulate(
    x_BTM: Float[Array, "B T M"], shift_BFM: Float[Array, "B F M"], scale_BFM: Float[Array, "B F M"]
) -> Float[Array, "B T M"]:
    """x (1 + scale) + shift, with one shift and one scale per latent frame."""
    tokens = x_BTM.shape[1]
    return x_BTM * (1 + per_frame(scale_BFM, tokens)) + per_frame(shift_BFM, tokens)


class AffineLayerNorm(nnx.Module):
    """`layer_norm`, then a learned scale and bias."""

    def __init__(self, config: Sizes):
        self.eps = config.eps
        self.scale = nnx.Param(jnp.ones((config.width,), config.dtype))
        self.bias = nnx.Param(jnp.zeros((config.width,), config.dtype))

    def __call__(self, x_BTM: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        scale, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.scale, self.bias))
        return (standardise(x_BTM, self.eps) * scale + bias).astype(x_BTM.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) over the whole model width, rounded, then times the weight."""

    def __init__(self, config: Sizes):
        self.eps = config.eps
        self.weight = nnx.Param(jnp.ones((config.width,), config.dtype))

    def __call__(self, x_BTM: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        return rms_norm(x_BTM, self.weight[...], self.eps)


class Projections(nnx.Module):
    """The four matrices of an attention layer; q and k are normed before the head split."""

    def __init__(self, config: Sizes, *, rngs: nnx.Rngs):
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

    def __init__(self, n_in: int, n_hidden: int, config: Sizes, *, rngs: nnx.Rngs):
        self.up = linear(n_in, n_hidden, config, rngs)
        self.down = linear(n_hidden, config.width, config, rngs)

    def __call__(self, x: Float[Array, "B T n_in"]) -> Float[Array, "B T M"]:
        return self.down(gelu(self.up(x)))


def modulation(n: int, config: Sizes, rngs: nnx.Rngs) -> nnx.Param:
    """A learned [n, M] table of shifts, scales and gates, to which the timestep adds."""
    table = jax.random.normal(rngs.params(), (n, config.width), jnp.float32) / config.width**0.5
    return nnx.Param(table.astype(config.dtype))
