"""Safetensors files opened with limits, and values that are not numbers found quickly."""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qvg_jax.errors import UserError, printable

__all__ = ["count_nonfinite", "opened", "read_tensor"]

HEADER_BYTES = 2**24  # a header of 1,000 tensors takes 120 kB
PIECE = 2**20  # values that are looked at together


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Any]:
    """A safetensors file for reading, as `safetensors.safe_open` gives it.

    safetensors checks that the tensors lie inside the file and do not overlap; the size of the header
    is checked before.

    Raises:
        UserError: the file is not there, or not a whole safetensors file; also from the body.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
        header = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= header <= size - 8:
            raise UserError(
                f"{path}: missing or corrupt: not a readable safetensors file ({size} bytes, and a "
                f"header that says it has {header})"
            )
        if header > HEADER_BYTES:
            raise UserError(f"{path}: a header of {header} bytes; accepted: at most {HEADER_BYTES}")
        with safe_open(path, "numpy") as tensors:
            yield tensors
    except OSError as error:
        raise UserError(f"{path}: missing or corrupt ({error.strerror or error})") from None
    except SafetensorError as error:
        what = printable(str(error))[:200]
        raise UserError(
            f"{path}: missing or corrupt: not a readable safetensors file ({what})"
        ) from None


def read_tensor(tensors: Any, name: str, path: str | os.PathLike) -> np.ndarray:
    """A tensor of an opened file, all of whose values are numbers.

    Raises:
        UserError: NaN or Inf among its values; the message names file and tensor.
    """
    x = tensors.get_tensor(name)
    if bad := count_nonfinite(x):
        raise UserError(
            f"{os.fspath(path)}: {printable(name)} has {bad} NaN or Inf values; accepted: finite values"
        )
    return x


def count_nonfinite(x: np.ndarray) -> int:
    """How many values of an array of floats are NaN or Inf, without a copy of the array."""
    if x.dtype.name in ("bfloat16", "float16"):
        # The exponent's bits are all ones. ml_dtypes' own test of bfloat16 is many times slower.
        ones = 0x7F80 if x.dtype.name == "bfloat16" else 0x7C00
        flat = np.ascontiguousarray(x).view(np.uint16).reshape(-1)
        pieces = (flat[i : i + PIECE] for i in range(0, flat.size, PIECE))
        return sum(int(np.count_nonzero(p & ones == ones)) for p in pieces)
    if x.dtype.kind != "f":
        return 0
    flat = x.reshape(-1)
    pieces = (flat[i : i + PIECE] for i in range(0, flat.size, PIECE))
    return sum(p.size - int(np.count_nonzero(np.isfinite(p))) for p in pieces)
