"""Blocks of a run on disk, from which an interrupted run goes on."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from qvg_jax.app.differences import difference
from qvg_jax.app.versions import versions
from qvg_jax.errors import UserError
from qvg_jax.files import replacing

__all__ = ["SavedBlocks"]

REQUEST = "request.json"
FORMAT = 2  # 1: records without checksums
CHECKSUM_BYTES = 16

log = logging.getLogger(__name__)


class SavedBlocks:
    """The generated blocks of a run, for each arm two files that grow with every block.

    `ARM.bin` has the bytes of the blocks, one after another, and `ARM.sums` a checksum for each:
    over its bytes, the request, the arm and the number of the block. A block that a crash has cut,
    that rotted, or that belongs to another run is found when it is read, and made again with all
    blocks after it. `request.json` holds the request, the versions that made the blocks, and
    whether the run was finished.

    Args:
        folder: where the files are; made when the first block is written.
        request: all that the blocks depend on, as JSON types.
        shape: of a block.
        dtype: of a block.
        resume: whether to read what is there; if nothing is, the run starts from the beginning.
        restart: whether the first block may replace an unfinished run.

    Raises:
        UserError: with `resume`, what is there belongs to another request; without, an unfinished
            run is there. The message says what differs and what to do.
    """

    def __init__(
        self,
        folder: str | Path,
        request: dict[str, Any],
        shape: tuple[int, ...],
        dtype: DTypeLike,
        *,
        resume: bool = False,
        restart: bool = False,
    ):
        self._folder = Path(folder)
        self._request = json.loads(json.dumps(request))
        self._shape, self._dtype = tuple(shape), np.dtype(dtype)
        self._begun = self._noted = False  # whether blocks are there; whether the request says so
        self._missing = False
        if resume and restart:
            raise UserError("--resume and --restart exclude each other; accepted: one of them")
        if resume and not (self._folder / REQUEST).exists():
            self._missing = True  # said when blocks are asked for: the whole run may be finished
        elif resume:
            self._check_same()
            self._begun = True
        elif not restart:
            self._refuse_unfinished()

    @property
    def missing(self) -> bool:
        """Whether a run should go on, and nothing of it is here."""
        return self._missing

    def read(self, arm: str) -> Shaped[np.ndarray, "blocks ..."]:
        """The blocks that an earlier run of the same request has left, the first axis counts them.

        A damaged block and the ones after it are left out, and said in the log.
        """
        if self._missing:
            log.info("--resume: nothing in %s to go on from; from the beginning", self._folder)
            self._missing = False
        stored: list[np.ndarray] = []
        file, sums = self._files(arm)
        if self._begun and file.is_file():
            checksums = sums.read_bytes() if sums.is_file() else b""
            with open(file, "rb") as f:
                while data := f.read(self._block_bytes):
                    begin = len(stored) * CHECKSUM_BYTES
                    checksum = checksums[begin : begin + CHECKSUM_BYTES]
                    if checksum != self._checksum(arm, len(stored), data):
                        log.warning(
                            "%s: block %d is cut off or damaged; it and what follows it are made "
                            "again", file, len(stored),
                        )  # fmt: skip
                        break
                    stored.append(np.frombuffer(data, self._dtype).reshape(self._shape))
        return np.stack(stored) if stored else np.zeros((0, *self._shape), self._dtype)

    def add(self, arm: str, number: int, block: Shaped[np.ndarray, "..."]) -> None:
        """Writes block `number` (of the generated ones, from 0); it is on the disk on return.

        Raises:
            OSError: it could not be written; the blocks before it can still be read.
        """
        if not self._begun:
            self._begin()
        if not self._noted:
            self._write_request(finished=False)
            self._noted = True
        data = np.ascontiguousarray(block, self._dtype).reshape(self._shape).tobytes()
        file, sums = self._files(arm)
        _write_at(file, number * self._block_bytes, data)
        _write_at(sums, number * CHECKSUM_BYTES, self._checksum(arm, number, data))

    def finish(self, *, keep: bool = True) -> None:
        """Notes that the run came to its end.

        Args:
            keep: whether the blocks stay, so that a longer video can go on from them.
        """
        if not self._begun:
            return
        if keep:
            self._write_request(finished=True)
            return
        (self._folder / REQUEST).unlink(missing_ok=True)
        self._remove_blocks()
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    @property
    def _block_bytes(self) -> int:
        return int(np.prod(self._shape)) * self._dtype.itemsize

    def _files(self, arm: str) -> tuple[Path, Path]:
        """The files of an arm: its blocks, and their checksums."""
        name = quote(arm, safe="=")
        return self._folder / f"{name}.bin", self._folder / f"{name}.sums"

    def _count(self, file: Path) -> int:
        """How many whole blocks an arm's file has, going by sizes."""
        sums = file.with_suffix(".sums")
        checksums = sums.stat().st_size // CHECKSUM_BYTES if sums.is_file() else 0
        return min(file.stat().st_size // self._block_bytes, checksums)

    def _remove_blocks(self) -> None:
        for pattern in ("*.bin", "*.sums"):
            for old in self._folder.glob(pattern):
                old.unlink()

    def _checksum(self, arm: str, number: int, data: bytes) -> bytes:
        request = json.dumps(self._request, sort_keys=True)
        digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
        digest.update(json.dumps([request, arm, number, self._shape, str(self._dtype)]).encode())
        digest.update(data)
        return digest.digest()

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / REQUEST).unlink(missing_ok=True)  # no request beside blocks of another
        self._remove_blocks()
        self._begun = True

    def _write_request(self, *, finished: bool) -> None:
        stored = {
            "format": FORMAT,
            "finished": finished,
            "versions": versions(),
            "request": self._request,
        }
        with replacing(self._folder / REQUEST) as partial:
            partial.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")

    def _stored(self) -> dict[str, Any]:
        """What request.json says.

        Raises:
            OSError, ValueError: it is not there, or it is not a request of this format.
        """
        stored = json.loads((self._folder / REQUEST).read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise ValueError(f'accepted: an object with "format": {FORMAT}')
        if not isinstance(stored.get("request"), dict):
            raise ValueError('accepted: an object under "request"')
        return stored

    def _difference(self, stored: dict[str, Any]) -> str | None:
        """The first setting in which the stored request is another one."""
        return difference(stored["request"], self._request)

    def _check_same(self) -> None:
        path = self._folder / REQUEST
        try:
            stored = self._stored()
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"--resume: {path} is not readable ({error}); accepted: --restart to start anew"
            ) from error
        if differs := self._difference(stored):
            raise UserError(
                f"--resume: {self._folder} was made with {differs}; give the same, or --restart "
                "to start anew"
            )
        if stored.get("versions") != versions():
            log.warning(
                "%s was made by %s, now it is %s: the blocks to come may differ in the last bits",
                self._folder, stored.get("versions"), versions(),
            )  # fmt: skip

    def _refuse_unfinished(self) -> None:
        try:
            stored = self._stored()
            blocks = max(map(self._count, self._folder.glob("*.bin")), default=0)
        except (OSError, ValueError, RecursionError):
            return  # nothing that one could go on from
        if stored.get("finished") is not False or not blocks:
            return
        if differs := self._difference(stored):
            raise UserError(
                f"--out: {self._folder} has an unfinished run, made with {differs}; accepted: "
                "--resume with its settings, --restart to replace it, or another --out"
            )
        raise UserError(
            f"--out: {self._folder} has the first {blocks} blocks of this run, interrupted; "
            "accepted: --resume to go on from them, --restart to start anew, or another --out"
        )


def _write_at(file: Path, offset: int, data: bytes) -> None:
    """Writes bytes at an offset as the end of a file; they are on the disk on return."""
    with open(file, "r+b" if file.exists() else "w+b") as f:
        f.seek(offset)
        f.truncate()
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
