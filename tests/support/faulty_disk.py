"""A disk that fails at a chosen operation: an error, a process killed there, a power cut."""

import builtins
import contextlib
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import av
import pytest

__all__ = ["ERRORS", "FAULTS", "FaultyDisk", "Killed"]

NEVER = 10**9
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "read-only": errno.EROFS}
FAULTS = (*ERRORS, "kill", "power cut")


class Killed(BaseException):
    """Raised where the process would have ended; from then on nothing reaches the disk."""


class FaultyDisk:
    """Counts what the body does to files under a folder, and lets one operation fail.

        with FaultyDisk(folder, fails_at=7, fault="full") as disk:
            ...
        disk.operations  # what was done: ("write", "report.json.partial"), ...

    A write that fails has written half of its bytes. The faults:

    - full: what needs room fails from the operation on; files can still be removed.
    - broken: the operation fails, an fsync too; the ones after it do not.
    - read-only: every operation fails from there on.
    - kill: the process ends there. `Killed` is raised, and whatever handlers and finally-clauses
      still try has no effect, as they would not run.
    - power cut: a kill, after which files are as at their last fsync.

    It sees Python's own files and the ones that PyAV writes. The lock of a run, which is a call of
    the operating system, is not counted.
    """

    def __init__(self, folder: Path, *, fails_at: int = NEVER, fault: str = "kill"):
        self.operations: list[tuple[str, str]] = []
        self.failed = False
        self._folder, self._fails_at, self._fault = folder.resolve(), fails_at, fault
        self._synced: dict[Path, bytes] = {}  # content that a power cut leaves
        self._patch = pytest.MonkeyPatch()
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self._open = builtins.open
        for module in (builtins, io):
            self._patch.setattr(module, "open", self._opened)
        for name in ("unlink", "remove", "mkdir", "rmdir"):
            self._patch.setattr(os, name, self._named(name, getattr(os, name)))
        for name in ("replace", "rename"):
            self._patch.setattr(os, name, self._renaming(getattr(os, name)))
        self._patch.setattr(os, "fsync", self._fsync)
        self._patch.setattr(av, "open", self._video(av.open))
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()

    def step(self, kind: str, path: Path, half: Callable[[], Any] = lambda: None) -> None:
        """Counts an operation that is about to happen, and lets it fail if it is its turn.

        Args:
            kind: name of the operation.
            path: file it is done to.
            half: does half of it.
        """
        with self._lock:
            dead = self.failed and self._fault in ("kill", "power cut")
            if dead:
                raise Killed
            self.operations.append((kind, path.name))
            if len(self.operations) <= self._fails_at or not self._is_hit(kind):
                return
            self.failed = True
            half()
            if self._fault in ERRORS:
                number = ERRORS[self._fault]
                raise OSError(number, os.strerror(number), str(path))
            if self._fault == "power cut":
                self._forget()
            raise Killed

    def _is_hit(self, kind: str) -> bool:
        if self._fault == "full":
            return kind in ("open", "write", "mkdir")
        return self._fault != "broken" or not self.failed

    def _forget(self) -> None:
        for path, content in self._synced.items():
            with contextlib.suppress(FileNotFoundError), self._open(path, "r+b") as file:
                file.truncate(0)
                file.write(content)

    def _ours(self, path: Any) -> Path | None:
        """The path, if it is one under the folder."""
        if isinstance(path, int) or path is None:
            return None
        path = Path(os.path.abspath(os.fspath(path)))
        return path if self._folder in path.parents or path == self._folder else None

    def _opened(
        self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more
    ):
        path = self._ours(file)
        if path is None or more.get("opener") or not set(mode) & set("wax+"):
            return self._open(file, mode, buffering, encoding, errors, newline, **more)
        raw = _Raw(self, path, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def opening(self, path: Path) -> None:
        """Counts the opening of a file that will be written."""
        self.step("open", path)
        there = path.read_bytes() if path.is_file() else b""
        self._synced.setdefault(path, there)

    def _named(self, name: str, function: Callable) -> Callable:
        def call(path, *args, **more):
            if ours := self._ours(path):
                self.step(name, ours)
                self._synced.pop(ours, None)
            return function(path, *args, **more)

        return call

    def _renaming(self, function: Callable) -> Callable:
        def call(source, target, *args, **more):
            old, new = self._ours(source), self._ours(target)
            if new is not None:
                self.step("rename", new)
                if old in self._synced:
                    self._synced[new] = self._synced.pop(old)
            return function(source, target, *args, **more)

        return call

    def _fsync(self, fd) -> None:
        """Counts; no byte has to survive the machine of the test."""
        stat = os.fstat(fd if isinstance(fd, int) else fd.fileno())
        for path in self._files():
            if os.path.samestat(path.stat(), stat):
                self.step("fsync", path)
                self._synced[path] = path.read_bytes()

    def _files(self) -> Iterator[Path]:
        return (path for path in self._folder.rglob("*") if path.is_file())

    def _video(self, function: Callable) -> Callable:
        def call(file, mode=None, **more):
            path = self._ours(file.removeprefix("file:")) if mode == "w" else None
            return function(_VideoFile(self, path, "w+") if path else file, mode, **more)

        return call


class _Raw(io.FileIO):
    """An unbuffered file whose writes are steps of a `FaultyDisk`."""

    def __init__(self, disk: FaultyDisk, path: Path, mode: str):
        disk.opening(path)
        super().__init__(path, mode)
        self._disk, self._path = disk, path

    def write(self, data: Any) -> int:
        data, write = memoryview(data).cast("B"), super().write
        self._disk.step("write", self._path, lambda: write(data[: len(data) // 2]))
        return write(data)

    def truncate(self, size: int | None = None) -> int:
        self._disk.step("truncate", self._path)
        return super().truncate(size)


class _VideoFile(_Raw):
    """A file that C code writes, to which an error is a negative number."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            return -(error.errno or errno.EIO)
        except Killed:
            return -errno.EIO
