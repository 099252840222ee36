"""Sizes and latent statistics of the Wan video VAEs."""

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

# The same for the 48 channels of Wan2.2's. Source: released VAE constants.
_WAN_2_2_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
_WAN_2_2_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
    """Structure of the VAE.

    Args:
        width: channels of the encoder at its finest level.
        decoder_width: the same of the decoder; None for `width`.
        multipliers: channels of each level, fine to coarse, in units of `width`.
        latent_channels: channels of a latent.
        res_blocks: residual blocks per encoder level; the decoder has one more.
        temporal: for each halving of the resolution, whether it halves the frame rate too.
        patch: side of the square of pixels that the finest level has for one.
        shortcuts: every level has a way around it that carries its input on without parameters
            (see `levels`); the decoder then halves no channels where it doubles the resolution.
        by_frame: runs layers that neither halve nor double frames one frame at a time. The results
            are the same; the finest layers then need a fraction of the memory.
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
    decoder_width: int | None = None
    patch: int = 1
    shortcuts: bool = False
    by_frame: bool = False
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
    def wan_2_2(
        cls, *, dtype: DTypeLike = jnp.bfloat16, param_dtype: DTypeLike | None = None
    ) -> "WanVAEConfig":
        """The VAE released with Wan2.2-TI2V-5B: 704,688,668 parameters, 48 channels, 4 x 16 x 16."""
        return cls(
            width=160,
            decoder_width=256,
            multipliers=(1, 2, 4, 4),
            latent_channels=48,
            res_blocks=2,
            temporal=(False, True, True),
            patch=2,
            shortcuts=True,
            by_frame=True,
            mean=_WAN_2_2_MEAN,
            std=_WAN_2_2_STD,
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
        """A VAE of Wan2.1's kind from the original's field names, with its latent statistics.

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
        return self.patch * 2 ** len(self.temporal)

    @property
    def pixel_channels(self) -> int:
        """Channels of the finest level's input and output: colours of a patch."""
        return 3 * self.patch**2

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
