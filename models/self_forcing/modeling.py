"""The causal Wan2.1 diffusion transformer: latents and timesteps in, flow and fresh K/V out.

Letters in array names: B batch, F latent frames, Z latent channels, Y and X latent rows and
columns, T tokens (frame slowest, then row, then column), M model width, H heads, D head dim,
L layers, U text slots, E text width, P position components (frame, row, column).

Everything runs in the dtype of the weights, as the released bfloat16 pipeline does, except for the
islands that the pipeline keeps in higher precision: statistics of the norms, softmax, RoPE and the
sinusoid of the timestep.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.common.attention import fused_attention
from models.common.patches import from_patches, to_patches
from models.common.wan_layers import (
    AffineLayerNorm,
    FeedForward,
    Projections,
    layer_norm,
    linear,
    modulate,
    modulation,
    per_frame,
)
from models.common.wan_text import TextConditioned, TextKV
from models.runs.devices import whole_on_all
from models.self_forcing.config import SelfForcingConfig
from models.self_forcing.layers import Head, TimeEmbedding
from qvg_jax.cache.plan import Plan
from qvg_jax.sharding import by_tokens


class Output(NamedTuple):
    """One forward pass: the flow (noise - x0), and K before RoPE and V of all layers, or None."""

    flow_BFZYX: Float[Array, "B F Z Y X"]
    k_LBTHD: Float[Array, "L B T H D"] | None
    v_LBTHD: Float[Array, "L B T H D"] | None


class Block(nnx.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; modulated frame by frame."""

    def __init__(self, config: SelfForcingConfig, *, rngs: nnx.Rngs):
        self.eps, self.implementation = config.eps, config.cross_attention
        self.modulation = modulation(6, config, rngs)
        self.self_attn = Projections(config, rngs=rngs)
        self.cross_norm = AffineLayerNorm(config)
        self.cross_attn = Projections(config, rngs=rngs)
        self.ffn = FeedForward(config.width, config.ffn_width, config, rngs=rngs)

    def __call__(
        self,
        x_BTM: Float[Array, "B T M"],
        e_BF6M: Float[Array, "B F 6 M"],
        text_kv: tuple[Float[Array, "B U H D"], Float[Array, "B U H D"]],
        attention: Callable[..., Array],
        between: Callable[[Array], Array] = lambda x_BTM: x_BTM,
        plan: Plan | None = None,
    ) -> tuple[Float[Array, "B T M"], tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]]:
        """One layer.

        Args:
            x_BTM: residual stream.
            e_BF6M: what the timestep adds to this layer's modulation.
            text_kv: this layer's (k_BUHD, v_BUHD) of the prompt.
            attention: (q_BTHD, k_BTHD, v_BTHD) -> o_BTHD; it rotates q and k and decides what
                else the queries see.
            between: what becomes of the residual stream before cross-attention, in models that
                change it there.
            plan: of the devices that have the tokens, each some of them; None for one device.

        Returns:
            The residual stream and this layer's (k_BTHD, v_BTHD), k before RoPE.
        """
        m_BF6M = self.modulation[...][None, None] + e_BF6M
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(m_BF6M, 2, 0)
        tokens = x_BTM.shape[1]

        y_BTM = modulate(layer_norm(x_BTM, self.eps), shift1, scale1)
        q_BTHD, (k_BTHD, v_BTHD) = self.self_attn.query(y_BTM), self.self_attn.key_value(y_BTM)
        y_BTM = self.self_attn.output(attention(q_BTHD, k_BTHD, v_BTHD))
        x_BTM = between(x_BTM + y_BTM * per_frame(gate1, tokens))

        x_BTM = x_BTM + self.cross_attention(self.cross_norm(x_BTM), text_kv, plan)

        y_BTM = self.ffn(modulate(layer_norm(x_BTM, self.eps), shift2, scale2))
        return x_BTM + y_BTM * per_frame(gate2, tokens), (k_BTHD, v_BTHD)

    def cross_attention(
        self,
        x_BTM: Float[Array, "B T M"],
        text_kv: tuple[Float[Array, "B U H D"], Float[Array, "B U H D"]],
        plan: Plan | None = None,
    ) -> Float[Array, "B T M"]:
        """Every token reads every text slot: padding is attended, as in training."""
        k_BUHD, v_BUHD = text_kv
        q_BTHD = self.cross_attn.query(x_BTM)
        attention = functools.partial(fused_attention, implementation=self.implementation)
        return self.cross_attn.output(by_tokens(attention, plan)(q_BTHD, k_BUHD, v_BUHD))


class SelfForcingDiT(TextConditioned):
    """The whole network; the layers are stacked and run by one scan."""

    def __init__(self, config: SelfForcingConfig, *, rngs: nnx.Rngs):
        self.config = config
        rows, columns = config.patch
        self.patch = linear(rows * columns * config.latent_channels, config.width, config, rngs)
        self.text = FeedForward(config.text_width, config.width, config, rngs=rngs)
        self.time = TimeEmbedding(config, rngs=rngs)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.head = Head(config, rngs=rngs)

    def patchify(self, x_BFZYX: Float[Array, "B F Z Y X"]) -> Float[Array, "B T M"]:
        """One token per patch of each latent frame."""
        self.config.grid(*x_BFZYX.shape[3:])
        return self.patch(to_patches(x_BFZYX.astype(self.config.dtype), self.config.patch))

    def __call__(
        self,
        x_BFZYX: Float[Array, "B F Z Y X"],
        t: Float[Array, "..."],
        text_kv: TextKV,
        attention: Callable[..., Array],
        *,
        keep_kv: bool = False,
        plan: Plan | None = None,
    ) -> Output:
        """Predicts the flow of a few latent frames.

        Args:
            x_BFZYX: noisy latents.
            t: timesteps, 0..1000, float32: [B, F], one per latent frame, or [B], one per video, or
                either with axes of 1.
            text_kv: from `text_kv`.
            attention: (q_BTHD, k_BTHD, v_BTHD, layer) -> o_BTHD, layer a traced index; it rotates
                q and k and decides what the frames see besides themselves.
            keep_kv: also return K and V of the frames, for the cache.
            plan: of the devices that run the network together; None for one.
        """
        B, F, Z = x_BFZYX.shape[:3]
        if self.config.latent_channels != Z:
            raise ValueError(f"x_BFZYX has {Z} channels; accepted: {self.config.latent_channels}")
        t = t[:, None] if t.ndim == 1 else t
        e_BFM, e_BF6M = self.time(jnp.broadcast_to(t.astype(jnp.float32), (B, F)))
        graphdef, stacked = nnx.split(self.blocks)

        def one_layer(x_BTM, layer):
            state, text, index = layer
            # Weights that devices share are gathered here, one layer at a time.
            state = jax.tree.map(lambda x: whole_on_all(x, plan), state)
            block = nnx.merge(graphdef, state)
            x_BTM, kv = block(
                x_BTM, e_BF6M, text, lambda q, k, v: attention(q, k, v, index), plan=plan
            )
            return x_BTM, kv if keep_kv else (None, None)

        layers = (stacked, text_kv, jnp.arange(self.config.layers))
        x_BTM, kv = jax.lax.scan(one_layer, self.patchify(x_BFZYX), layers)
        y_BTO = self.head(x_BTM, e_BFM)
        return Output(from_patches(y_BTO, self.config.patch, x_BFZYX.shape[3:]), *kv)
