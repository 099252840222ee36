"""Sizes of the action- and camera-conditioned Wan2.2 transformer, and its few-step schedule."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


@dataclass(frozen=True, kw_only=True)
class WorldPlayConfig:
    """Everything that decides the shapes and the arithmetic of the transformer.

    The height and width of the video are not here: any grid that the patch divides works.

    Attributes:
        layers, width, heads, ffn_width: size of the transformer; head_dim = width / heads.
        latent_channels, out_channels: channels of the latent video, in and out.
        patch: (rows, columns) of latent pixels per token; one latent frame deep.
        time_width: width of the sinusoids of timestep and action.
        text_width, text_slots: width of the text embedding; length it is zero-padded to.
        eps: added to the variance in every norm.
        rope_frames: rows of the RoPE table, hence the most latent frames one pass can see.
        rope_theta: base of the RoPE frequencies.
        frames_per_block: latent frames that are denoised together.
        dtype: dtype of the weights and of the activations between the float32 islands.
        attention, precision: how attention to the cache is computed, see `qvg_jax.attend`.

    Source: HY-WorldPlay, the Wan2.2-TI2V-5B variant.
    """

    layers: int
    width: int
    heads: int
    ffn_width: int
    latent_channels: int = 48
    out_channels: int = 48
    patch: tuple[int, int] = (2, 2)
    time_width: int = 256
    text_width: int = 4096
    text_slots: int = 512
    eps: float = 1e-6
    rope_frames: int = 1024
    rope_theta: float = 10000.0
    frames_per_block: int = 4
    dtype: DTypeLike = jnp.bfloat16
    attention: str | None = None
    precision: str | None = None

    def __post_init__(self):
        if self.width % self.heads or self.head_dim % 4:
            raise ValueError(
                f"width={self.width} must be heads={self.heads} times a head size that is a "
                "multiple of 4: camera matrices act on groups of four channels"
            )
        if self.time_width % 2:
            raise ValueError(f"time_width={self.time_width} must be even: cosines and sines")
        if not 1 <= self.frames_per_block <= self.rope_frames:
            raise ValueError(
                f"frames_per_block={self.frames_per_block} must lie in "
                f"1..rope_frames={self.rope_frames}"
            )

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.width // self.heads

    @classmethod
    def wan_5b(cls, *, dtype: DTypeLike = jnp.bfloat16) -> "WorldPlayConfig":
        """The released 5B model: 5,293,225,152 parameters; 880 tokens a frame at 704 x 1280."""
        return cls(layers=30, width=3072, heads=24, ffn_width=14336, dtype=dtype)

    def grid(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Token rows and columns of one latent frame; raises if the patch does not divide it."""
        rows, columns = self.patch
        if latent_height % rows or latent_width % columns:
            raise ValueError(
                f"latent height x width {latent_height} x {latent_width} must be a multiple of "
                f"the patch {rows} x {columns}"
            )
        return latent_height // rows, latent_width // columns


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """The few-step schedule of the distilled model: noise levels sigma = timestep / 1000.

    Attributes:
        steps: timesteps of the denoising passes, noisiest first; after the last one sigma is 0.
        context_timestep: what the model is told about clean frames: those of the context pass,
            and a given first image.
    """

    steps: tuple[float, ...] = (1000.0, 960.0, 888.8889, 727.2728)
    context_timestep: float = 14.0

    def __post_init__(self):
        falling = all(a > b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or not falling or not 0 < self.steps[-1] <= self.steps[0] <= 1000:
            raise ValueError(f"steps={self.steps} must fall, within (0, 1000]")
        if not 0 <= self.context_timestep <= 1000:
            raise ValueError(f"context_timestep={self.context_timestep} must lie in 0..1000")

    @property
    def timesteps(self) -> np.ndarray:
        """Float32 [J + 1]: the steps, then 0."""
        return np.asarray([*self.steps, 0.0], np.float32)

    @property
    def sigmas(self) -> np.ndarray:
        """Float32 [J + 1]: the fraction of noise at each timestep."""
        return self.timesteps / np.float32(1000.0)
