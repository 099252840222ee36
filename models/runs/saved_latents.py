"""Latents on disk, block by block, from which an interrupted run goes on."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from qvg_jax.app.saved_blocks import SavedBlocks

__all__ = ["SavedLatents"]

FOLDER = "latents"


class SavedLatents:
    """The clean latents of every block that was generated; a minute of 480 x 832 video is 48 MB.

    Args:
        out: folder of the run; the files are in its folder `latents`.
        request, shape, dtype, resume, restart: see `SavedBlocks`; the shape is (B, F, Z, Y, X).

    Raises:
        UserError: see `SavedBlocks`.
    """

    def __init__(self, out: str | Path, request, shape, dtype, *, resume=False, restart=False):
        self._blocks = SavedBlocks(
            Path(out) / FOLDER, request, shape, dtype, resume=resume, restart=restart
        )
        self.add = self._blocks.add
        self.finish = self._blocks.finish
        self.missing = self._blocks.missing

    def read(self, arm: str) -> Float[np.ndarray, "B F Z Y X"]:
        """The latents that an earlier run has left; no frames if there are none."""
        stored = self._blocks.read(arm)
        blocks, B, F, *frame = stored.shape
        return np.swapaxes(stored, 0, 1).reshape(B, blocks * F, *frame)
