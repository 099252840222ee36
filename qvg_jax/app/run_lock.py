"""A lock on the folder of a run, so that two processes never write into one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from qvg_jax.errors import UserError

__all__ = ["alone_in", "check_alone_in"]

FILE = ".lock"


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps other processes out of a folder while the body runs.

    The operating system lets go of the lock when its process ends, however it ends. The same
    process may take it several times.

    Raises:
        UserError: another process has it.
        OSError: the folder is not there or cannot be written.
    """
    path = Path(folder).resolve() / FILE
    lock = FileLock(path, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"--out {os.fspath(folder)}: {_owner(path)} is writing there; accepted: another "
            "folder, or the same when that run has ended"
        ) from error
    try:
        path.write_text(str(os.getpid()))  # for the message of others; the lock is not in it
        yield
    finally:
        lock.release()


def check_alone_in(folder: str | os.PathLike) -> None:
    """Raises UserError if another process is writing in a folder; makes no file in a new one."""
    if (Path(folder) / FILE).is_file():
        with contextlib.suppress(OSError), alone_in(folder):
            pass


def _owner(path: Path) -> str:
    try:
        return f"process {int(path.read_text())}"
    except (OSError, ValueError):
        return "another process"
