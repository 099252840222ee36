"""The LongCat-Video diffusion transformer: latents and timesteps in, x0 - noise out.

Letters in array names: B batch (videos times guidance branches), F latent frames, Z latent
channels, Y and X latent rows and columns, T tokens (frame slowest, then row, then column), M model
width, H heads, D head dim, L layers, U text rows, E text width, C width of the timestep embedding,
P position components (frame, row, column).

Every latent frame has its own timestep, and with it its own shifts, scales and gates: frames that
are given have timestep 0 beside frames that are noise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.common.numerics import silu
from models.common.patches import from_patches, to_patches
from models.common.rounding import round_to
from models.longcat.config import LongCatConfig
from models.longcat.layers import (
    AffineLayerNorm,
    CrossAttention,
    FeedForward,
    Head,
    SelfAttention,
    TextEmbedding,
    TimeEmbedding,
    add_gated,
    island,
    linear,
    modulate,
)
from models.longcat.sharding import whole


class TextKV(NamedTuple):
    """Keys and values of the prompts for every layer's cross-attention: made once per prompt."""

    k_LBUHD: Float[Array, "L B U H D"]
    v_LBUHD: Float[Array, "L B U H D"]
    bias_BU: Float[Array, "B U"]  # added to the logits of each row: 0, ln(rows it stands for), -inf


class Output(NamedTuple):
    """One forward pass: x0 - noise in float32, and what `keep` returned, stacked over layers."""

    out_BFZYX: Float[Array, "B F Z Y X"]
    kept: Any


class Block(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; modulated frame by frame."""

    def __init__(self, config: LongCatConfig, *, rngs: nnx.Rngs):
        self.eps = config.eps
        self.modulation = island(config.condition_width, 6 * config.width, config, rngs)
        self.self_attn = SelfAttention(config, rngs=rngs)
        self.cross_norm = AffineLayerNorm(config)
        self.cross_attn = CrossAttention(config, rngs=rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x_BTM: Float[Array, "B T M"],
        c_BFC: Float[Array, "B F C"],
        text: tuple[Array, Array, Array] | None,
        attention: Callable[..., Array],
        silent: int = 0,
    ) -> tuple[Float[Array, "B T M"], tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]]:
        """One layer.

        Args:
            x_BTM: residual stream.
            c_BFC: silu of the timestep embedding.
            text: this layer's (k_BUHD, v_BUHD) and bias_BU; None leaves cross-attention out.
            attention: (q_BTHD, k_BTHD, v_BTHD) -> o_BTHD; it rotates q and k and decides what
                else the queries see.
            silent: the first tokens, which do not read the text.

        Returns:
            The residual stream and this layer's (k_BTHD, v_BTHD), k before RoPE.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            whole(self.modulation(c_BFC)), 6, axis=-1
        )
        q_BTHD, k_BTHD, v_BTHD = self.self_attn.split(modulate(x_BTM, shift1, scale1, self.eps))
        y_BTM = self.self_attn.join(attention(q_BTHD, k_BTHD, v_BTHD))
        x_BTM = add_gated(x_BTM, y_BTM, gate1)
        if text is not None:
            read = x_BTM[:, silent:]
            read = read + self.cross_attn(self.cross_norm(read), *text)
            x_BTM = jnp.concatenate([x_BTM[:, :silent], read], axis=1) if silent else read
        y_BTM = self.ffn(modulate(x_BTM, shift2, scale2, self.eps))
        return add_gated(x_BTM, y_BTM, gate2), (k_BTHD, v_BTHD)


class LongCatDiT(nnx.Module):
    """The whole network; the layers are stacked and run by one scan."""

    def __init__(self, config: LongCatConfig, *, rngs: nnx.Rngs):
        self.config = config
        rows, columns = config.patch
        self.patch = linear(rows * columns * config.latent_channels, config.width, config, rngs)
        self.time = TimeEmbedding(config, rngs=rngs)
        self.text = TextEmbedding(config, rngs=rngs)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.head = Head(config, rngs=rngs)

    def layer(self, index: int) -> Block:
        """One layer taken out of the stack, to look at."""
        graphdef, stacked = nnx.split(self.blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], stacked))

    def text_kv(self, text_BUM: Float[Array, "B U M"], bias_BU: Float[Array, "B U"]) -> TextKV:
        """Cross-attention keys and values of embedded text for all layers; see `text.read_text`."""
        graphdef, stacked = nnx.split(self.blocks)

        def one_layer(_, state):
            return None, nnx.merge(graphdef, state).cross_attn.key_value(text_BUM)

        return TextKV(*jax.lax.scan(one_layer, None, stacked)[1], bias_BU)

    def tokens(self, x_BFZYX: Float[Array, "B F Z Y X"]) -> Float[Array, "B T M"]:
        """One token per patch of each latent frame."""
        self.config.grid(*x_BFZYX.shape[-2:])
        return self.patch(to_patches(x_BFZYX.astype(self.config.dtype), self.config.patch))

    def embed_time(
        self, t: Float[Array, "..."], batch: int, frames: int
    ) -> Float[Array, "batch frames C"]:
        """Embedding of the timesteps, which are first rounded to the model's dtype."""
        t = t[:, None] if t.ndim == 1 else t
        # 812.3 becomes 812 in bfloat16: the network was trained so, and leaving it out costs 4 %.
        t = round_to(t, self.config.dtype)
        return self.time(jnp.broadcast_to(t, (batch, frames)))

    def __call__(
        self,
        x_BFZYX: Float[Array, "B F Z Y X"],
        t: Float[Array, "..."],
        text_kv: TextKV | None,
        attention: Callable[..., Array],
        *,
        silent_frames: int = 0,
        keep: Callable[..., Any] | None = None,
    ) -> Output:
        """Predicts x0 - noise of a few latent frames.

        Args:
            x_BFZYX: noisy latents.
            t: timesteps, 0..1000: [B, F], one per latent frame, or [B], one per video, or either
                with axes of 1.
            text_kv: from `text.read_text`; None leaves cross-attention out.
            attention: (q_BTHD, k_BTHD, v_BTHD, layer) -> o_BTHD, layer a traced index; it rotates
                q and k and decides what the frames see besides themselves.
            silent_frames: the first frames, which do not read the text.
            keep: (k_BTHD, v_BTHD, layer) -> pytree of arrays to keep of each layer, k before RoPE.

        Raises:
            ValueError: a wrong number of channels, or a size that the patch does not divide.
        """
        B, F, Z, Y, X = x_BFZYX.shape
        if self.config.latent_channels != Z:
            raise ValueError(f"x_BFZYX has {Z} channels; accepted: {self.config.latent_channels}")
        x_BTM = self.tokens(x_BFZYX)
        c_BFC = whole(silu(self.embed_time(t, B, F)))
        silent = silent_frames * x_BTM.shape[1] // F
        graphdef, stacked = nnx.split(self.blocks)
        bias_BU = None if text_kv is None else text_kv.bias_BU
        text_LBUHD = None if text_kv is None else (text_kv.k_LBUHD, text_kv.v_LBUHD)

        def one_layer(x_BTM, layer):
            state, text, index = layer
            text = None if text is None else (*text, bias_BU)
            block = nnx.merge(graphdef, state)
            x_BTM, (k_BTHD, v_BTHD) = block(
                x_BTM, c_BFC, text, lambda q, k, v: attention(q, k, v, index), silent
            )
            return x_BTM, None if keep is None else keep(k_BTHD, v_BTHD, index)

        layers = (stacked, text_LBUHD, jnp.arange(self.config.layers))
        x_BTM, kept = jax.lax.scan(one_layer, x_BTM, layers)
        out_BFZYX = from_patches(self.head(x_BTM, c_BFC), self.config.patch, (Y, X))
        return Output(out_BFZYX, kept)
