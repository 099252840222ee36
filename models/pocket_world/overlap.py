"""Patches that overlap the model's own, so that seams of invented places show less.

The model predicts frames in patches. Where nothing is remembered, neighbouring patches are invented
at the same time and do not quite fit together: a seam shows every 16 pixels. So the last evaluation
reads the noisy frames in patches that are shifted by half a patch, down and to the right. Their
insides cover the model's borders, and both predictions are blended: a pixel far from the border of a
patch takes more of that patch. The network needs no training for it. Positions are places in the
world, and cameras move by half a patch a frame, so it has seen patches at such places before.
"""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from models.pocket_world import camera
from models.pocket_world.modeling import to_frames, to_tokens
from models.pocket_world.world import HEIGHT, WIDTH


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The grid of patches whose centres are the inner corners of the model's patches.

    Attributes:
        patch: pixels per token side; even.
    """

    patch: int

    @property
    def size(self) -> tuple[int, int]:
        """Pixels, down and across, in the middle of a frame that the grid covers."""
        return HEIGHT - self.patch, WIDTH - self.patch

    def positions(
        self, pose_BF3: Float[Array, "B F 3"], time_F: Int[Array, "F"]
    ) -> Float[Array, "B S 4"]:
        """The places of the grid's tokens in the world, as `camera.token_positions` gives them."""
        height, width = self.size
        one = functools.partial(
            camera.token_positions, patch=self.patch, height=height, width=width
        )
        return jax.vmap(one, (0, None))(pose_BF3, time_F)

    def cut(self, tokens: Float[Array, "B T C"]) -> Float[Array, "B S C"]:
        """The same pixels in patches of this grid, without half a patch along the frame's edges."""
        edge, (height, width) = self.patch // 2, self.size
        frames = to_frames(tokens, self.patch)
        return to_tokens(frames[:, :, edge : edge + height, edge : edge + width], self.patch)

    def blend(
        self, tokens: Float[Array, "B T C"], other: Float[Array, "B S C"]
    ) -> Float[Array, "B T C"]:
        """The model's patches `tokens` with the patches `other` of this grid blended in."""
        edge, (height, width) = self.patch // 2, self.size
        inner = (slice(None), slice(None), slice(edge, edge + height), slice(edge, edge + width))
        frames = to_frames(tokens, self.patch)
        change = to_frames(other, self.patch, height, width) - frames[inner]
        frames = frames.at[inner].add(change * self.weight()[None, None, :, :, None])
        return to_tokens(frames, self.patch)

    def weight(self) -> np.ndarray:
        """The share of this grid in each pixel that it covers, float32: b² / (a² + b²).

        a and b are the distances to the nearest border of the pixel's patch in the model's grid and in
        this one.
        """
        height, width = self.size
        y, x = np.arange(height) + 0.5, np.arange(width) + 0.5
        shift = self.patch / 2
        own = np.minimum.outer(self._to_border(y), self._to_border(x)) ** 2
        models = np.minimum.outer(self._to_border(y + shift), self._to_border(x + shift)) ** 2
        return (own / (own + models)).astype(np.float32)

    def _to_border(self, place):
        inside = place % self.patch
        return np.minimum(inside, self.patch - inside)
