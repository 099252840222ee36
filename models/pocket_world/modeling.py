"""The whole network of pocket world, top to bottom.

A diffusion transformer over patches of frames. It predicts the clean frames (x-prediction) of a block
from noisy ones; every frame carries its own noise level, so clean context frames (noise 0) and noisy
ones go through the same weights. Attention is injected: training masks one long sequence,
generation reads a `KVCache`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.pocket_world.config import PocketWorldConfig
from models.pocket_world.world import HEIGHT, WIDTH

Attend = Callable[
    ..., Array
]  # (layer's extra input, q, k, v) -> attention output, all [B, T, H, D]


def to_tokens(frames: Float[Array, "B F Y X 3"], patch: int) -> Float[Array, "B T C"]:
    """Cuts frames into patches, row by row: T = F * rows * columns, C = patch * patch * 3."""
    b, f, height, width = frames.shape[:4]
    rows, columns = height // patch, width // patch
    x = frames.reshape(b, f, rows, patch, columns, patch, 3).swapaxes(3, 4)
    return x.reshape(b, f * rows * columns, patch * patch * 3)


def to_frames(
    tokens: Float[Array, "B T C"], patch: int, height: int = HEIGHT, width: int = WIDTH
) -> Float[Array, "B F Y X 3"]:
    """The inverse of `to_tokens`."""
    b = tokens.shape[0]
    rows, columns = height // patch, width // patch
    x = tokens.reshape(b, -1, rows, columns, patch, patch, 3).swapaxes(3, 4)
    return x.reshape(b, -1, height, width, 3)


def rms_norm(x, scale=None):
    """x / rms(x) over the last axis in float32, times `scale` where given."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x if scale is None else x * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def modulate(x_BTD, scale_BFD, shift_BFD=None):
    """x * scale + shift, where all tokens of a frame share the frame's scale and shift."""
    b, f, d = scale_BFD.shape
    x = x_BTD.reshape(b, f, -1, d) * scale_BFD[:, :, None]
    x = x if shift_BFD is None else x + shift_BFD[:, :, None]
    return x.reshape(x_BTD.shape)


def _linear(i, o, rngs, *, gain=1.0, dtype):
    init = nnx.initializers.variance_scaling(gain**2, "fan_in", "normal")
    return nnx.Linear(i, o, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """Self-attention and MLP, each modulated by the frame's condition."""

    def __init__(self, cfg: PocketWorldConfig, *, dtype, rngs: nnx.Rngs):
        d, a = cfg.width, cfg.heads * cfg.head_dim
        self.cfg = cfg
        self.qkv = _linear(d, 3 * a, rngs, dtype=dtype)
        self.out = _linear(a, d, rngs, gain=0.3, dtype=dtype)
        self.up = _linear(d, cfg.mlp_ratio * d, rngs, dtype=dtype)
        self.down = _linear(cfg.mlp_ratio * d, d, rngs, gain=0.3, dtype=dtype)
        self.q_scale = nnx.Param(jnp.ones(cfg.head_dim))
        self.k_scale = nnx.Param(jnp.ones(cfg.head_dim))
        self.modulation = nnx.Param(jnp.zeros((6, d)))

    def __call__(self, h_BTD, condition_BF6D, attend, extra):
        """Returns the residual stream and this layer's K (before RoPE) and V, [B, T, H, D]."""
        cfg = self.cfg
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.unstack(
            condition_BF6D + self.modulation[None, None], axis=2
        )
        x = modulate(rms_norm(h_BTD), 1 + scale1, shift1)
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, cfg.heads, cfg.head_dim)
        q = rms_norm(qkv[:, :, 0], self.q_scale[...]).astype(qkv.dtype)
        k = rms_norm(qkv[:, :, 1], self.k_scale[...]).astype(qkv.dtype)
        v = qkv[:, :, 2]
        o = attend(extra, q, k, v)
        h_BTD = h_BTD + modulate(self.out(o.reshape(*o.shape[:2], -1)), 1 + gate1)
        x = modulate(rms_norm(h_BTD), 1 + scale2, shift2)
        h_BTD = h_BTD + modulate(self.down(jax.nn.gelu(self.up(x))), 1 + gate2)
        return h_BTD, (k, v)


class PocketWorld(nnx.Module):
    """The diffusion transformer; layers are stacked and run by `lax.scan`."""

    def __init__(self, cfg: PocketWorldConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        d, c = cfg.width, cfg.condition_width
        self.cfg = cfg
        self.patch_in = _linear(cfg.token_channels, d, rngs, dtype=dtype)
        self.patch_out = _linear(d, cfg.token_channels, rngs, gain=0.1, dtype=dtype)
        self.noise_in = nnx.Linear(cfg.noise_channels, c, rngs=rngs)
        self.feature_in = nnx.Linear(cfg.features, c, rngs=rngs)
        self.condition_mid = nnx.Linear(c, c, rngs=rngs)
        self.condition_out = _linear(c, 8 * d, rngs, gain=0.1, dtype=jnp.float32)
        self.blocks = nnx.vmap(lambda r: Block(cfg, dtype=dtype, rngs=r))(rngs.split(cfg.layers))

    def __call__(
        self,
        x_BTC: Float[Array, "B T C"],
        noise_BF: Float[Array, "B F"],
        feature_BFE: Float[Array, "B F E"],
        attend: Attend,
        per_layer=None,
    ):
        """One denoising evaluation.

        Args:
            x_BTC: patches of noisy (or clean) frames in [-1, 1], frame by frame.
            noise_BF: noise level of each frame: x = (1 - noise) * clean + noise * normal.
            feature_BFE: `camera.frame_features` of each frame.
            attend: called as attend(extra, q, k, v) in each layer, q and k before RoPE.
            per_layer: pytree with leading layer axis; `extra` is its slice.

        Returns:
            Predicted clean patches [B, T, C] in float32, and (K, V) of all layers [L, B, T, H, D].
        """
        cfg = self.cfg
        angle = noise_BF[..., None] * jnp.geomspace(1.0, 300.0, cfg.noise_channels // 2)[None, None]
        sinusoid = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
        condition = jax.nn.silu(self.noise_in(sinusoid) + self.feature_in(feature_BFE))
        condition = self.condition_out(jax.nn.silu(self.condition_mid(condition)))
        condition = condition.reshape(*noise_BF.shape, 8, cfg.width)
        graph, stacked = nnx.split(self.blocks)

        def layer(h, xs):
            weights, extra = xs
            return nnx.merge(graph, weights)(h, condition[:, :, :6], attend, extra)

        h = self.patch_in(x_BTC).astype(jnp.float32)
        h, kv = jax.lax.scan(layer, h, (stacked, per_layer))
        h = modulate(rms_norm(h), 1 + condition[:, :, 6], condition[:, :, 7])
        return self.patch_out(h).astype(jnp.float32), kv
