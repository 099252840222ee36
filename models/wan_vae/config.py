"""Sizes and latent statistics of the Wan video VAE."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

# Mean and standard deviation of the released encoder's 16 latent channels.
# Source: Wan2.1 (arXiv 2503.20314), released VAE constants.
_WAN_2_1_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_WAN_2_1_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
    """Structure of the VAE.

    Args:
        width: channels at full resolution.
        multipliers: channels of each level, fine to coarse, in units of `width`.
        latent_channels: channels of a latent.
        res_blocks: residual blocks per encoder level; the decoder has one more.
        temporal: for each halving of the resolution, whether it halves the frame rate too.
        mean: per-channel mean of the raw latents.
        std: per-channel standard deviation of the raw latents.
        dtype: dtype of activations.
        param_dtype: dtype of parameters.
    """

    width: int
    multipliers: tuple[int, ...]
    latent_channels: int
    res_blocks: int
    temporal: tuple[bool, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: DTypeLike = jnp.bfloat16
    param_dtype: DTypeLike = jnp.bfloat16

    def __post_init__(self):
        if len(self.temporal) != len(self.multipliers) - 1:
            raise ValueError(
                f"temporal={self.temporal} must have one entry fewer than {self.multipliers=}"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values, {self.latent_channels=}"
                )

    @classmethod
    def wan_2_1(
        cls, *, dtype: DTypeLike = jnp.bfloat16, param_dtype: DTypeLike | None = None
    ) -> "WanVAEConfig":
        """The VAE released with Wan2.1: 126,892,531 parameters, 16 channels, 4 x 8 x 8."""
        return cls(
            width=96,
            multipliers=(1, 2, 4, 4),
            latent_channels=16,
            res_blocks=2,
            temporal=(False, True, True),
            mean=_WAN_2_1_MEAN,
            std=_WAN_2_1_STD,
            dtype=dtype,
            param_dtype=param_dtype or dtype,
        )

    @classmethod
    def from_json(
        cls,
        fields: Mapping[str, Any],
        *,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike | None = None,
    ) -> "WanVAEConfig":
        """Config from the original project's field names, with Wan2.1's latent statistics.

        Args:
            fields: `dim`, `dim_mult`, `z_dim`, `num_res_blocks`, `temperal_downsample` (sic) and
                `attn_scales`, which must be empty.

        Raises:
            ValueError: `attn_scales` is not empty, or sizes disagree.
        """
        if fields.get("attn_scales"):
            raise ValueError(
                f"attn_scales={fields['attn_scales']!r}; accepted: []. Attention exists in the "
                "middle block only, as in every released VAE"
            )
        return dataclasses.replace(
            cls.wan_2_1(dtype=dtype, param_dtype=param_dtype),
            width=fields["dim"],
            multipliers=tuple(fields["dim_mult"]),
            latent_channels=fields["z_dim"],
            res_blocks=fields["num_res_blocks"],
            temporal=tuple(fields["temperal_downsample"]),
        )

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent row or column."""
        return 2 ** len(self.temporal)

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame after the first, which stands for one video frame."""
        return 2 ** sum(self.temporal)

    def video_frames(self, latent_frames: int) -> int:
        """Video frames that `latent_frames` decode to."""
        return 1 + self.temporal_stride * (latent_frames - 1)

    def latent_frames(self, video_frames: int) -> int:
        """Latent frames that `video_frames` encode to; a ragged tail is dropped."""
        return 1 + (video_frames - 1) // self.temporal_stride
