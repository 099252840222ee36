"""Sizes of pocket world: frozen, hashable, one constructor per shipped checkpoint."""

import dataclasses
import math
from typing import Annotated

import numpy as np
from msgspec import Meta

from models.pocket_world.camera import FEATURES
from models.pocket_world.world import CLOCK, HEIGHT, WIDTH
from qvg_jax.cache.relative import RelativeTime
from qvg_jax.cache.rope import Rope, axial_rope

# Of walks without an end: as far back as training looked, and nearer by whole turns of the world's clock,
# so that what is older than that keeps the phase of its boats and beacons.
ENDLESS = RelativeTime(horizon=1024, period=CLOCK)


@dataclasses.dataclass(frozen=True)
class PocketWorldConfig:
    """Configuration of the chunk-causal diffusion transformer.

    Attributes:
        width: channels of the residual stream.
        layers, heads, head_dim: attention (head_dim is that of the large video models).
        mlp_ratio: hidden channels of the MLP over `width`.
        patch: pixels per token side.
        block_frames: frames that are denoised together.
        noise_channels: sinusoid width of the noise level's embedding.
        condition_width: channels of the per-frame condition.
    """

    width: Annotated[int, Meta(ge=1, le=2**14)] = 384
    layers: Annotated[int, Meta(ge=1, le=256)] = 6
    heads: Annotated[int, Meta(ge=1, le=256)] = 3
    head_dim: Annotated[int, Meta(ge=32, le=1024)] = 128
    mlp_ratio: Annotated[int, Meta(ge=1, le=64)] = 3
    patch: Annotated[int, Meta(ge=1, le=2**10)] = 16
    block_frames: Annotated[int, Meta(ge=1, le=64)] = 4
    noise_channels: Annotated[int, Meta(ge=2, le=2**14)] = 128
    condition_width: Annotated[int, Meta(ge=1, le=2**14)] = 256
    features: int = FEATURES

    def __post_init__(self):
        for name in ("head_dim", "noise_channels"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name}={getattr(self, name)} must be even: cosines and sines")
        if self.features != FEATURES:
            raise ValueError(f"features={self.features} is not accepted: a frame has {FEATURES}")
        for side, size in (("height", HEIGHT), ("width", WIDTH)):
            if size % self.patch:
                raise ValueError(f"patch={self.patch} must divide the frame {side} {size}")

    @classmethod
    def base(cls) -> "PocketWorldConfig":
        """The checkpoint in this repository."""
        return cls()

    @classmethod
    def smoke(cls) -> "PocketWorldConfig":
        """A few thousand parameters, for tests."""
        return cls(width=32, layers=2, heads=1, mlp_ratio=2, noise_channels=16, condition_width=16)

    @property
    def tokens_per_frame(self) -> int:
        return (HEIGHT // self.patch) * (WIDTH // self.patch)

    @property
    def block_tokens(self) -> int:
        return self.block_frames * self.tokens_per_frame

    @property
    def token_channels(self) -> int:
        return self.patch * self.patch * 3

    def rope(self) -> Rope:
        """Rotation by (frame, y, x, altitude)."""
        return _rope(self.head_dim // 2)


def _rope(half: int) -> Rope:
    """The rotation of a head: channels for time, altitude and the two axes of the ground.

    Time turns with the world clock's first two harmonics and eight slower or faster frequencies,
    places from half a patch to the extent of a long walk.
    """
    n_time, n_altitude = 10 * half // 64, 6 * half // 64
    n_place = (half - n_time - n_altitude) // 2
    clock = (2 * math.pi / CLOCK, 4 * math.pi / CLOCK)
    time = np.r_[clock, np.geomspace(0.5, 1 / 1500, n_time - 2)]
    place = np.geomspace(3.0, 0.04, n_place)
    altitude = np.linspace(0.25, 1.5, half - n_time - 2 * n_place)
    return axial_rope([ladder.tolist() for ladder in (time, place, place, altitude)])
