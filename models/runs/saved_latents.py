"""Latents on disk, block by block, from which an interrupted run goes on."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from qvg_jax.errors import UserError

FOLDER, REQUEST = "latents", "request.json"


class SavedLatents:
    """The clean latents of every block that was generated, for each arm a file that grows.

    A block is bytes appended to `latents/ARM.bin`; one that was cut off by a crash is ignored and
    overwritten. `latents/request.json` holds the request, for a run may only go on from latents of
    its own. A minute of 480 x 832 video is 48 MB.

    Args:
        out: folder of the run.
        request: all that the latents depend on, as JSON types.
        shape: (B, F, Z, Y, X) of a block.
        dtype: of the latents.
        resume: whether to read what is there; if not, the first block replaces it.

    Raises:
        UserError: there is nothing to go on from, or it belongs to another request; the message
            says what differs.
    """

    def __init__(
        self,
        out: str | Path,
        request: dict[str, Any],
        shape: tuple[int, ...],
        dtype: DTypeLike,
        *,
        resume: bool,
    ):
        self._folder = Path(out) / FOLDER
        self._request, self._shape, self._dtype = request, shape, np.dtype(dtype)
        self._begun = resume
        if resume:
            self._compare()

    def read(self, arm: str) -> Float[np.ndarray, "B F Z Y X"]:
        """The latents that an earlier run has left; no frames if there are none."""
        B, F, *frame = self._shape
        file = self._file(arm)
        data = file.read_bytes() if self._begun and file.is_file() else b""
        blocks = len(data) // self._size
        stored = np.frombuffer(data[: blocks * self._size], self._dtype)
        stored = np.swapaxes(stored.reshape(blocks, *self._shape), 0, 1)
        return stored.reshape(B, blocks * F, *frame)

    def add(self, arm: str, number: int, latents_BFZYX: Float[np.ndarray, "B F Z Y X"]) -> None:
        """Writes block `number` (of the generated ones, from 0).

        Raises:
            OSError: it could not be written.
        """
        if not self._begun:
            self._begin()
        file = self._file(arm)
        with open(file, "r+b" if file.exists() else "w+b") as f:
            f.seek(number * self._size)
            f.truncate()
            f.write(np.ascontiguousarray(latents_BFZYX, self._dtype).tobytes())

    @property
    def _size(self) -> int:
        return int(np.prod(self._shape)) * self._dtype.itemsize

    def _file(self, arm: str) -> Path:
        return self._folder / f"{quote(arm, safe='=')}.bin"

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob("*.bin"):
            old.unlink()
        (self._folder / REQUEST).write_text(json.dumps(self._request, indent=2) + "\n")
        self._begun = True

    def _compare(self) -> None:
        path = self._folder / REQUEST
        try:
            stored = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"--resume: {path} is not there or not readable ({error}); leave out --resume to "
                "start anew"
            ) from error
        ours = json.loads(json.dumps(self._request))
        for key in sorted({*stored, *ours}):
            if stored.get(key) != ours.get(key):
                raise UserError(
                    f"--resume: {self._folder} was made with {key}={stored.get(key)!r}, now it is "
                    f"{ours.get(key)!r}; give the same, or leave out --resume to start anew"
                )
