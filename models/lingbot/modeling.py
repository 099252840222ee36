"""LingBot-World's transformer: Self-Forcing's, told an image by its input and a camera by its layers.

Letters as in `models/self_forcing/modeling.py`; C channels of the camera map.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.common.numerics import silu
from models.common.patches import from_patches, to_patches
from models.common.wan_layers import FeedForward, linear
from models.common.wan_text import TextConditioned, TextKV
from models.lingbot.config import LingBotConfig
from models.self_forcing.layers import Head, TimeEmbedding
from models.self_forcing.modeling import Block, Output
from qvg_jax.cache.plan import Plan


class Residual(nnx.Module):
    """c + W2 silu(W1 c + b1) + b2."""

    def __init__(self, config: LingBotConfig, *, rngs: nnx.Rngs):
        self.up, self.down = (linear(config.width, config.width, config, rngs) for _ in range(2))

    def __call__(self, c_BTM: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        return c_BTM + self.down(silu(self.up(c_BTM)))


class CameraBlock(Block):
    """A layer whose stream the camera scales and shifts between its two attentions."""

    def __init__(self, config: LingBotConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.camera = Residual(config, rngs=rngs)
        self.camera_scale, self.camera_shift = (
            linear(config.width, config.width, config, rngs) for _ in range(2)
        )

    def steer(
        self, x_BTM: Float[Array, "B T M"], c_BTM: Float[Array, "B T M"]
    ) -> Float[Array, "B T M"]:
        """(1 + scale(g)) x + shift(g) with g = c + W2 silu(W1 c)."""
        g_BTM = self.camera(c_BTM)
        return (1 + self.camera_scale(g_BTM)) * x_BTM + self.camera_shift(g_BTM)


class LingBotDiT(TextConditioned):
    """The whole network; the layers are stacked and run by one scan."""

    def __init__(self, config: LingBotConfig, *, rngs: nnx.Rngs):
        self.config = config
        rows, columns = config.patch
        channels = config.latent_channels + config.condition_channels
        self.patch = linear(rows * columns * channels, config.width, config, rngs)
        self.text = FeedForward(config.text_width, config.width, config, rngs=rngs)
        self.time = TimeEmbedding(config, rngs=rngs)
        self.camera_in = linear(config.control_width, config.width, config, rngs)
        self.camera = Residual(config, rngs=rngs)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return CameraBlock(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.head = Head(config, rngs=rngs)

    def embed_camera(self, map_BFCYX: Float[Array, "B F C Y X"]) -> Float[Array, "B T M"]:
        """What the camera says to all layers, once for all passes over a block.

        Args:
            map_BFCYX: from `camera_map`, a frame for each latent frame.
        """
        patches = to_patches(map_BFCYX.astype(self.config.dtype), self.config.patch)
        return self.camera(self.camera_in(patches))

    def __call__(
        self,
        x_BFZYX: Float[Array, "B F Z Y X"],
        t: Float[Array, "..."],
        text_kv: TextKV,
        attention: Callable[..., Array],
        *,
        condition_BFZYX: Float[Array, "B F Z Y X"],
        camera_BTM: Float[Array, "B T M"],
        keep_kv: bool = False,
        plan: Plan | None = None,
    ) -> Output:
        """Predicts the flow of a few latent frames; see `SelfForcingDiT`.

        Args:
            x_BFZYX: noisy latents.
            t: timesteps, 0..1000, float32, [B, F] or with axes of 1.
            text_kv: from `text_kv`.
            attention: as for `SelfForcingDiT`.
            condition_BFZYX: mask and latents of the image, of the same frames.
            camera_BTM: from `embed_camera`.
            keep_kv: also return K and V of the frames, for the cache.
            plan: of the devices that run the network together; None for one.

        Raises:
            ValueError: other numbers of channels.
        """
        config = self.config
        for name, x, want in (
            ("x_BFZYX", x_BFZYX, config.latent_channels),
            ("condition_BFZYX", condition_BFZYX, config.condition_channels),
        ):
            if x.shape[2] != want:
                raise ValueError(f"{name} has {x.shape[2]} channels; accepted: {want}")
        B, F = x_BFZYX.shape[:2]
        config.grid(*x_BFZYX.shape[3:])
        both = jnp.concatenate(
            [x_BFZYX.astype(config.dtype), condition_BFZYX.astype(config.dtype)], 2
        )
        e_BFM, e_BF6M = self.time(jnp.broadcast_to(t.astype(jnp.float32), (B, F)))
        graphdef, stacked = nnx.split(self.blocks)

        def one_layer(x_BTM, layer):
            state, text, index = layer
            block = nnx.merge(graphdef, state)
            x_BTM, kv = block(
                x_BTM,
                e_BF6M,
                text,
                lambda q, k, v: attention(q, k, v, index),
                lambda x: block.steer(x, camera_BTM),
                plan,
            )
            return x_BTM, kv if keep_kv else (None, None)

        layers = (stacked, text_kv, jnp.arange(config.layers))
        x_BTM, kv = jax.lax.scan(one_layer, self.patch(to_patches(both, config.patch)), layers)
        y_BTO = self.head(x_BTM, e_BFM)
        return Output(from_patches(y_BTO, config.patch, x_BFZYX.shape[3:]), *kv)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Steered:
    """The network over one block, image and camera given: called as Self-Forcing's roll-out does."""

    model: LingBotDiT
    condition_BFZYX: Float[Array, "B F Z Y X"]
    camera_BTM: Float[Array, "B T M"]

    @property
    def config(self) -> LingBotConfig:
        """That of the network."""
        return self.model.config

    def __call__(self, x_BFZYX, t, text_kv, attention, *, keep_kv=False, plan=None) -> Output:
        return self.model(
            x_BFZYX,
            t,
            text_kv,
            attention,
            condition_BFZYX=self.condition_BFZYX,
            camera_BTM=self.camera_BTM,
            keep_kv=keep_kv,
            plan=plan,
        )
