"""LingBot-World as settings of what there is: sizes, few-step schedules, memories of its launches."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from models.self_forcing.history import History
from qvg_jax.codecs import presets


@dataclass(frozen=True, kw_only=True)
class LingBotConfig(SelfForcingConfig):
    """Sizes of a causal Wan transformer that is also told an image and a camera.

    Attributes:
        condition_channels: channels beside the noisy latents: 4 of a mask, 16 of the image's latent.
        camera_channels: numbers for each pixel of the camera map: origin and direction of its ray.
        fold: side of the square of pixels whose numbers become channels of a latent pixel.

    Source: LingBot-World, the few-step transformers of versions 1 and 2.
    """

    condition_channels: int = 20
    camera_channels: int = 6
    fold: int = 8

    @property
    def control_width(self) -> int:
        """Channels of the camera map at one token."""
        rows, columns = self.patch
        return self.camera_channels * self.fold**2 * rows * columns

    @classmethod
    def world_14b(cls, version: int = 2, *, dtype: DTypeLike = jnp.bfloat16) -> "LingBotConfig":
        """The released sizes; blocks are 3 latent frames in version 1 and 4 in version 2.

        Version 1 with the camera, not its variant for keys (7 numbers for each pixel), whose map is
        not known well enough to be built.
        """
        return cls(
            layers=40,
            width=5120,
            heads=40,
            ffn_width=13824,
            frames_per_block=_of(version, 3, 4),
            dtype=dtype,
        )


def sampler(version: int = 2, *, shift: float = 10.0) -> SamplerConfig:
    """The few-step schedule: rungs 0, 179, 358, 679 of a thousand in version 1, quarters in 2."""
    steps = _of(version, (1000, 821, 642, 321), (1000, 750, 500, 250))
    return SamplerConfig(steps=steps, shift=shift, top=0.999, whole_timesteps=True)


def history(version: int = 2, *, compressed: bool = True) -> History:
    """What the launches remember.

    Version 1: all frames, at 2 bits in spans of 8 blocks, two stages. Version 2: 68 frames in sight,
    the block itself and 6 of sink included, at 4 bits in spans of one block, the newest block left
    alone. There the last 2 frames of the sink are compressed too; here all 6 stay as they are.
    """
    if version == 1:
        codec = presets.qvg(bits=2, group=16, stages=2, iters=4)
        return History.qvg(codec, span_frames=24) if compressed else History()
    bounds = dict(window_frames=68, sink_frames=_of(version, 0, 6))
    if not compressed:
        return History(**bounds)
    return History.qvg(presets.qvg(bits=4, group=64), span_frames=4, keep_recent=4, **bounds)


def _of(version: int, first, second):
    if version not in (1, 2):
        raise ValueError(f"version={version!r} is not known; accepted: 1 or 2")
    return first if version == 1 else second
