"""Arrays in an .npz file, whose directory and headers are checked before an array is allocated.

An .npz is a zip of .npy files, and a zip of a few megabytes can stand for terabytes. So the sizes that
the zip's directory states, and the shapes in the headers, are held against each other and against what
such a file can honestly hold; only then is an array made, and it is filled piece by piece.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from qvg_jax.errors import UserError, printable

__all__ = ["read_npz"]

DIRECTORY_BYTES = 2**16  # of a zip's directory: some hundred names
# Bytes of an array for one of the file. Arrays of bfloat16 values written as float32 need about 2.5,
# arrays of a few repeated values more; a bomb has up to a thousand.
MOST_INFLATED = 16
FREE_BYTES = 2**20  # that any array may have, however well it is compressed
HEADER_BYTES = 4096  # of an .npy's header; shapes of five axes take a hundred
PIECE = 2**20
METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
LONGEST_TEXT = 64  # characters


def read_npz(path: str | os.PathLike, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an .npz file has.

    Arrays are of floats, integers, or short texts. NumPy has no bfloat16 of its own and stores such
    arrays as raw pairs of bytes; those are read as bfloat16.

    Args:
        path: the file.
        names: arrays to read; others stay unread.

    Raises:
        UserError: the file is not there, not an .npz, encrypted, torn, or states more than it can
            hold; an array is of another kind. The message names the file and the array.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            _check_directory(file, path)
            with zipfile.ZipFile(file) as archive:
                members = {info.filename: info for info in archive.infolist()}
                wanted = [name for name in names if f"{name}.npy" in members]
                return {n: _read(archive, members[f"{n}.npy"], n, path) for n in wanted}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: missing or not an .npz ({error.strerror or error})") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError) as error:
        what = printable(str(error)) or type(error).__name__
        raise UserError(f"{path}: missing or not an .npz ({what[:200]})") from None
    except (ValueError, RuntimeError, OverflowError, UnicodeError) as error:  # of a torn directory
        raise UserError(f"{path}: not a whole .npz ({printable(str(error))[:200]})") from None


def _check_directory(file: BinaryIO, path: Path) -> None:
    """Raises UserError if the zip's directory is larger than such a file needs."""
    if file.read(6) == b"\x93NUMPY":
        raise UserError(f"{path}: a single array (.npy); accepted: an .npz with arrays by name")
    size = file.seek(0, os.SEEK_END)
    tail_at = max(0, size - 22 - 2**16)  # the end record may have a comment behind it
    file.seek(tail_at)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise UserError(f"{path}: missing or not an .npz (no directory at its end)")
    (stated,) = struct.unpack_from("<L", tail, at + 12)
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":  # the large form of the record
        (offset,) = struct.unpack_from("<Q", tail, at - 12)
        file.seek(min(offset, size))
        record = file.read(56)
        stated = struct.unpack_from("<Q", record, 40)[0] if len(record) == 56 else size
    if stated > DIRECTORY_BYTES:
        raise UserError(
            f"{path}: a directory of {stated} bytes; accepted: at most {DIRECTORY_BYTES}"
        )
    file.seek(0)


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, path: Path) -> np.ndarray:
    """One array, allocated after its header and sizes have been checked."""
    where = f"{path}: array {printable(name)!r}"
    if info.flag_bits & 1:
        raise UserError(f"{where} is encrypted; accepted: arrays as np.savez writes them")
    if info.compress_type not in METHODS:
        raise UserError(
            f"{where} is compressed by method {info.compress_type}; accepted: as np.savez and "
            "np.savez_compressed write them"
        )
    if info.file_size > max(FREE_BYTES, MOST_INFLATED * info.compress_size):
        raise UserError(
            f"{where} says it has {info.file_size} bytes in {info.compress_size} compressed ones; "
            f"accepted: at most {MOST_INFLATED} times as many"
        )
    with archive.open(info) as file:
        shape, fortran, stored = _header(file, where)
        dtype = _kind(stored, where)
        count = 1
        for n in shape:
            count *= n
        if file.tell() + count * dtype.itemsize != info.file_size:
            raise UserError(
                f"{where} of shape {shape} and {dtype} does not have the size that the file states"
            )
        out = np.empty(count, dtype)
        left = memoryview(out.view(np.uint8)) if count else memoryview(b"")
        while left:
            if not (piece := file.read(min(PIECE, len(left)))):
                raise UserError(f"{where} ends early")
            left[: len(piece)] = piece
            left = left[len(piece) :]
        file.read(1)  # the end of the member, where its checksum is compared
    out = out.view(ml_dtypes.bfloat16) if stored.kind == "V" else out
    return out.reshape(shape[::-1]).T if fortran else out.reshape(shape)


def _header(file: Any, where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of an .npy file."""
    form = np.lib.format
    readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    try:
        reader = readers[form.read_magic(file)]
        shape, fortran, dtype = reader(file, max_header_size=HEADER_BYTES)
    except (
        Exception
    ) as error:  # NumPy reads the header as Python, which has errors of a dozen kinds
        what = printable(str(error).strip().partition("\n")[0])[:120]
        raise UserError(f"{where} has no header of an array ({what})") from None
    if len(shape) > 8 or any(isinstance(n, bool) or not 0 <= n < 2**48 for n in shape):
        raise UserError(f"{where} has shape {str(shape)[:120]}; accepted: sizes of at most 8 axes")
    return shape, fortran, dtype


def _kind(stored: np.dtype, where: str) -> np.dtype:
    """The dtype to read an array in, bytes for bfloat16's sake in 16-bit words."""
    if stored.kind == "V" and stored.itemsize == 2 and stored.names is None:
        return np.dtype(np.uint16)
    text = stored.kind == "U" and stored.itemsize <= 4 * LONGEST_TEXT
    if stored.kind in "fiub" and stored.itemsize <= 8 and stored.subdtype is None or text:
        return stored
    raise UserError(
        f"{where} is of dtype {printable(str(stored))[:60]}; accepted: bfloat16, float16, float32, "
        "float64"
    )
