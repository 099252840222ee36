"""The world model's transformer: latents, timesteps, actions and cameras in, velocity out.

Letters in array names: B batch, F latent frames, Z latent channels, Y and X latent rows and
columns, T tokens (frame slowest, then row, then column), M model width, H heads, D head dim,
L layers, U text slots, E text width.

A block asks for attention twice over the same q, k and v: once with rotary positions, once with
camera matrices. Both, and what of the past is seen, belong to the `attention` that is passed in
(`attention.py`); the network itself knows neither positions nor cameras nor caches.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from models.common.attention import fused_attention
from models.common.numerics import silu
from models.common.patches import from_patches, to_patches
from models.common.wan_layers import (
    AffineLayerNorm,
    FeedForward,
    Projections,
    linear,
    modulation,
    per_frame,
)
from models.common.wan_text import TextConditioned, TextKV
from models.runs.devices import whole_on_all
from models.worldplay.config import WorldPlayConfig
from models.worldplay.layers import Head, ScalarEmbedding, modulated_norm
from qvg_jax.cache.plan import Plan
from qvg_jax.sharding import by_tokens

type HeadsBTHD = Float[Array, "B T H D"]
type Branches = tuple[HeadsBTHD, HeadsBTHD]  # of the rotary and of the camera attention


class Output(NamedTuple):
    """One forward pass: the velocity (noise - data), and K and V of all layers or None.

    K is after its norm, and K and V before any positional transform.
    """

    velocity_BFZYX: Float[Array, "B F Z Y X"]
    k_LBTHD: Float[Array, "L B T H D"] | None
    v_LBTHD: Float[Array, "L B T H D"] | None


class Block(nnx.Module):
    """Self-attention of two branches, cross-attention to the prompt, feed-forward."""

    def __init__(self, config: WorldPlayConfig, *, rngs: nnx.Rngs):
        self.eps = config.eps
        self.modulation = modulation(6, config, rngs)
        self.self_attn = Projections(config, rngs=rngs)
        self.prope_out = linear(config.width, config.width, config, rngs)
        self.cross_norm = AffineLayerNorm(config)
        self.cross_attn = Projections(config, rngs=rngs)
        self.ffn = FeedForward(config.width, config.ffn_width, config, rngs=rngs)

    def project(
        self, x_BTM: Float[Array, "B T M"], e_BF6M: Float[Array, "B F 6 M"]
    ) -> tuple[HeadsBTHD, HeadsBTHD, HeadsBTHD]:
        """q, k and v of self-attention, before any positional transform."""
        shift, scale, *_ = self._modulations(e_BF6M)
        y_BTM = modulated_norm(x_BTM, shift, scale, self.eps)
        return self.self_attn.query(y_BTM), *self.self_attn.key_value(y_BTM)

    def finish(
        self,
        x_BTM: Float[Array, "B T M"],
        e_BF6M: Float[Array, "B F 6 M"],
        branches: Branches,
        text_kv: tuple[Float[Array, "B U H D"], Float[Array, "B U H D"]],
        plan: Plan | None = None,
    ) -> Float[Array, "B T M"]:
        """The rest of the layer, from the results of both attentions.

        Args:
            x_BTM: residual stream that `project` saw.
            e_BF6M: what timestep and action add to this layer's modulation.
            branches: attention by rotary positions, and by cameras.
            text_kv: this layer's (k_BUHD, v_BUHD) of the prompt.
            plan: of the devices that have the tokens, each some of them; None for one device.
        """
        tokens = x_BTM.shape[1]
        _, _, gate1, shift2, scale2, gate2 = self._modulations(e_BF6M)
        o_BTHD, o_prope_BTHD = branches
        y_BTM = self.self_attn.output(o_BTHD)
        y_BTM = y_BTM + self.prope_out(o_prope_BTHD.reshape(y_BTM.shape))
        x_BTM = _add_gated(x_BTM, y_BTM, per_frame(gate1, tokens))

        q_BTHD = self.cross_attn.query(self.cross_norm(x_BTM))
        # Padding is attended, as in training.
        o_BTHD = by_tokens(fused_attention, plan)(q_BTHD, *text_kv)
        x_BTM = x_BTM + self.cross_attn.output(o_BTHD)

        y_BTM = self.ffn(modulated_norm(x_BTM, shift2, scale2, self.eps))
        return _add_gated(x_BTM, y_BTM, per_frame(gate2, tokens))

    def _modulations(self, e_BF6M):
        table = self.modulation[...].astype(jnp.float32)[None, None]
        return jnp.moveaxis(table + e_BF6M.astype(jnp.float32), 2, 0)


def _add_gated(x_BTM, y_BTM, gate_BTM):
    return (x_BTM.astype(jnp.float32) + y_BTM.astype(jnp.float32) * gate_BTM).astype(x_BTM.dtype)


class WorldPlayDiT(TextConditioned):
    """The whole network; the layers are stacked and run by one scan."""

    def __init__(self, config: WorldPlayConfig, *, rngs: nnx.Rngs):
        self.config = config
        rows, columns = config.patch
        self.patch = linear(rows * columns * config.latent_channels, config.width, config, rngs)
        self.text = FeedForward(config.text_width, config.width, config, rngs=rngs)
        self.time = ScalarEmbedding(config, rngs=rngs)
        self.action = ScalarEmbedding(config, rngs=rngs)
        self.project = linear(config.width, 6 * config.width, config, rngs)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.head = Head(config, rngs=rngs)

    def patchify(self, x_BFZYX: Float[Array, "B F Z Y X"]) -> Float[Array, "B T M"]:
        """One token per patch of each latent frame.

        Raises:
            ValueError: another number of channels, or a size that the patch does not divide.
        """
        Z, Y, X = x_BFZYX.shape[2:]
        if self.config.latent_channels != Z:
            raise ValueError(f"x_BFZYX has {Z} channels; accepted: {self.config.latent_channels}")
        self.config.grid(Y, X)
        return self.patch(to_patches(x_BFZYX.astype(self.config.dtype), self.config.patch))

    def condition(
        self, t_BF: Float[Array, "B F"], actions_BF: Num[Array, "B F"]
    ) -> tuple[Float[Array, "B F M"], Float[Array, "B F 6 M"]]:
        """What timestep and action say to the head and, in six parts, to all blocks.

        Args:
            t_BF: timesteps, 0..1000, float32.
            actions_BF: action ids, 0..80; they enter as numbers, through a sinusoid.
        """
        e_BFM = self.time(t_BF) + self.action(actions_BF)
        return e_BFM, self.project(silu(e_BFM)).reshape(*t_BF.shape, 6, -1)

    def __call__(
        self,
        x_BFZYX: Float[Array, "B F Z Y X"],
        t_BF: Float[Array, "B F"],
        actions_BF: Num[Array, "B F"],
        text_kv: TextKV,
        attention: Callable[..., Branches],
        *,
        keep_kv: bool = False,
        plan: Plan | None = None,
    ) -> Output:
        """Predicts the velocity of a few latent frames.

        Args:
            x_BFZYX: noisy latents.
            t_BF: timestep of each frame, 0..1000, float32.
            actions_BF: id of the motion that led into each frame.
            text_kv: from `text_kv`.
            attention: (q_BTHD, k_BTHD, v_BTHD, layer) -> the results of both branches, layer a
                traced index; from `attention.py`.
            keep_kv: also return K and V of the frames.
            plan: of the devices that run the network together; None for one.
        """
        e_BFM, e_BF6M = self.condition(t_BF, actions_BF)
        graphdef, stacked = nnx.split(self.blocks)

        def one_layer(x_BTM, layer):
            state, text, index = layer
            block = nnx.merge(graphdef, jax.tree.map(lambda x: whole_on_all(x, plan), state))
            q_BTHD, *kv = block.project(x_BTM, e_BF6M)
            x_BTM = block.finish(x_BTM, e_BF6M, attention(q_BTHD, *kv, index), text, plan)
            return x_BTM, kv if keep_kv else (None, None)

        layers = (stacked, text_kv, jnp.arange(self.config.layers))
        x_BTM, kv = jax.lax.scan(one_layer, self.patchify(x_BFZYX), layers)
        y_BTO = self.head(x_BTM, e_BFM)
        return Output(from_patches(y_BTO, self.config.patch, x_BFZYX.shape[3:]), *kv)
