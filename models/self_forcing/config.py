"""Sizes of the causal Wan2.1 transformer and the constants of its few-step sampler."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from msgspec import Meta, Struct

from qvg_jax.cache.relative import RelativeTime
from qvg_jax.reading.schema import Size, checked


class _WanFile(Struct, kw_only=True):
    """The fields of a Wan `config.json` that decide shapes or arithmetic."""

    num_layers: Annotated[int, Meta(ge=1, le=1024)]
    dim: Size
    num_heads: Annotated[int, Meta(ge=1, le=1024)]
    ffn_dim: Size
    in_dim: Size
    out_dim: Size
    freq_dim: Size
    text_len: Annotated[int, Meta(ge=1, le=2**16)]
    eps: Annotated[float, Meta(gt=0, le=1)]
    text_dim: Size = 4096
    patch_size: tuple[Size, Size, Size] = (1, 2, 2)
    head_dim: int | None = None
    model_type: str = "t2v"
    qk_norm: bool | str | None = True
    cross_attn_norm: bool | None = True


@dataclass(frozen=True, kw_only=True)
class SelfForcingConfig:
    """Everything that decides the shapes and the arithmetic of the transformer.

    The height and width of the video are not here: any grid that the patch divides works.

    Attributes:
        layers, width, heads, ffn_width: size of the transformer; head_dim = width / heads.
        latent_channels, out_channels: channels of the latent video, in and out.
        patch: (rows, columns) of latent pixels per token; one latent frame deep.
        time_width: width of the sinusoid of the timestep.
        text_width, text_slots: width of the text embedding; length it is zero-padded to.
        eps: added to the variance in every norm.
        rope_frames: rows of the RoPE table, hence the longest video in latent frames without a horizon.
        rope_theta: base of the RoPE frequencies.
        frames_per_block: latent frames that are denoised together.
        horizon: with a number, positions count back from each block, older history is read as so many
            latent frames old, and a video may be longer than the RoPE table. None is absolute positions.
        dtype: dtype of the weights and of the activations between the float32 islands.
        attention, precision: how attention to the cache is computed, see `qvg_jax.attend`.
        cross_attention: implementation of attention to the prompt, see `fused_attention`.

    Source: Self-Forcing (arXiv 2506.08009) on Wan2.1-T2V-1.3B (arXiv 2503.20314).
    """

    layers: int
    width: int
    heads: int
    ffn_width: int
    latent_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int] = (2, 2)
    time_width: int = 256
    text_width: int = 4096
    text_slots: int = 512
    eps: float = 1e-6
    rope_frames: int = 1024
    rope_theta: float = 10000.0
    frames_per_block: int = 3
    horizon: int | None = None
    dtype: DTypeLike = jnp.bfloat16
    attention: str | None = None
    precision: str | None = None
    cross_attention: str | None = None

    def __post_init__(self):
        if self.width % self.heads or self.head_dim % 2:
            raise ValueError(
                f"width={self.width} must be heads={self.heads} times an even head size"
            )
        if self.time_width % 2:
            raise ValueError(f"time_width={self.time_width} must be even: cosines and sines")
        if self.relative is not None:
            self.relative.check(self.frames_per_block)
            if self.horizon > self.last_horizon:
                raise ValueError(
                    f"horizon={self.horizon} is not accepted: with blocks of {self.frames_per_block} "
                    f"frames the {self.rope_frames} rows of the RoPE table serve at most "
                    f"{self.last_horizon}"
                )

    @property
    def last_horizon(self) -> int:
        """The longest horizon: what the RoPE table leaves beside a block."""
        return self.rope_frames - self.frames_per_block

    @property
    def relative(self) -> RelativeTime | None:
        """How positions count back from a block; None for absolute positions."""
        return None if self.horizon is None else RelativeTime(self.horizon)

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.width // self.heads

    @classmethod
    def wan_1_3b(cls, *, dtype: DTypeLike = jnp.bfloat16) -> "SelfForcingConfig":
        """The released Self-Forcing checkpoint: 1,418,996,800 parameters, 825 tensors."""
        return cls(layers=30, width=1536, heads=12, ffn_width=8960, dtype=dtype)

    @classmethod
    def wan_14b(cls, *, dtype: DTypeLike = jnp.bfloat16) -> "SelfForcingConfig":
        """The sizes of Wan2.1's 14B transformer, as Krea Realtime has them."""
        return cls(layers=40, width=5120, heads=40, ffn_width=13824, dtype=dtype)

    @classmethod
    def from_wan(
        cls,
        sizes: Mapping[str, Any],
        *,
        frames_per_block: int = 3,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> "SelfForcingConfig":
        """The configuration written with Wan2.1's own key names (`dim`, `ffn_dim`, ...).

        Args:
            sizes: the mapping found in a Wan `config.json`.
            frames_per_block: latent frames per auto-regressive block; Wan itself has no such thing.
            dtype: dtype of weights and activations.

        Raises:
            ValueError: for a variant whose arithmetic differs (image-to-video, no q/k norm, ...).
        """
        file = checked(sizes, _WanFile)
        wanted = {"model_type": "t2v", "qk_norm": True, "cross_attn_norm": True}
        for name, value in wanted.items():
            if getattr(file, name) != value:
                raise ValueError(f"{name}={getattr(file, name)!r} is not supported; need {value!r}")
        if file.patch_size[0] != 1:
            raise ValueError(
                f"patch_size={file.patch_size} is not supported; need (1, rows, columns)"
            )
        config = cls(
            layers=file.num_layers,
            width=file.dim,
            heads=file.num_heads,
            ffn_width=file.ffn_dim,
            latent_channels=file.in_dim,
            out_channels=file.out_dim,
            patch=file.patch_size[1:],
            time_width=file.freq_dim,
            text_width=file.text_dim,
            text_slots=file.text_len,
            eps=file.eps,
            frames_per_block=frames_per_block,
            dtype=dtype,
        )
        if file.head_dim not in (None, config.head_dim):
            raise ValueError(
                f"head_dim={file.head_dim} must be dim / num_heads = {config.head_dim}"
            )
        return config

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
    """The few-step schedule of the distilled model.

    Attributes:
        steps: noise levels visited, on the unshifted scale 0..train_steps, noisiest first.
        shift: how far the ladder of noise levels leans towards noise (1 = straight).
        train_steps: rungs of the ladder.
        top: noise level of the first rung before the shift.
        whole_timesteps: whether the network is told whole numbers, fractions cut off.
        warped: whether `steps` are warped onto the ladder; if not, they are timesteps themselves.
        context_timestep: timestep of the last pass, which writes the clean block to the cache.
        first_steps: noise levels of the first block of the video, where nothing is remembered yet; None
            is `steps`.
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    train_steps: int = 1000
    top: float = 1.0
    whole_timesteps: bool = False
    warped: bool = True
    context_timestep: float = 0.0
    first_steps: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("steps", "first_steps"):
            steps = getattr(self, name)
            if steps is None:
                continue
            if not steps or any(not 0 < s <= self.train_steps for s in steps):
                raise ValueError(f"{name}={steps} must lie in 1..train_steps={self.train_steps}")
            if any(a <= b for a, b in zip(steps, steps[1:], strict=False)):
                raise ValueError(f"{name}={steps} must fall from noisy to clean")

    def of_block(self, first_frame: int) -> "SamplerConfig":
        """The schedule of the block that begins at a frame, the same for all of its passes."""
        if self.first_steps is None:
            return self
        steps = self.steps if first_frame else self.first_steps
        return dataclasses.replace(self, steps=steps, first_steps=None)
