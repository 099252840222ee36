"""Output files that appear whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing", "synchronize", "writable_folder"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what is written there takes its place at the end.

        with replacing("report.json") as partial:
            partial.write_text(...)

    If the body raises, the temporary file is removed and an older file at `path` stays as it was.

    Raises:
        OSError: the body's, or that of the rename.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        synchronize(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def synchronize(path: str | os.PathLike) -> None:
    """Waits until the bytes of a file are on the disk: a new name must not outlive them in a crash.

    Raises:
        OSError: they could not be written.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def writable_folder(path: str | os.PathLike) -> Path:
    """The folder `path`, made if it is missing, after a file was written there and removed.

    Raises:
        OSError: it cannot be made or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"0")
    except OSError as error:
        raise OSError(error.errno or 0, error.strerror or str(error), str(path)) from error
    return path
