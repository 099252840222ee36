"""Types of the command's options: numbers with a range, sizes, lists.

The module imports no JAX, so that a wrong option is told at once.

A dataclass of options uses them as annotations. In Python the values are what the annotation says
(an int, a tuple of strings); on the command line the text is checked and turned into one.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token

__all__ = [
    "Bits",
    "ByteSize",
    "Count",
    "File",
    "Indices",
    "Names",
    "Port",
    "Shape",
    "Whole",
    "parse_bytes",
]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _option(parse: Callable[[str], Any], metavar: str) -> Parameter:
    """A parameter of one word, which `parse` turns into a value or refuses with a ValueError."""

    def convert(_: Any, tokens: Sequence[Token]) -> Any:
        return parse(tokens[-1].value)  # of an option given twice, the last one counts

    return Parameter(
        converter=convert, n_tokens=1, metavar=metavar, allow_leading_hyphen=True, negative=()
    )


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not accepted: give a whole number")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{text!r} is not accepted: give a whole number above 0")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError(f"{text!r} is not accepted: give a port, 0 to 65535")
    return int(text)


def _bits(text: str) -> float:
    try:
        bits = float(text)
    except ValueError:
        bits = 0.0
    if not 0 < bits <= 16:
        raise ValueError(f"{text!r} is not accepted: give bits, such as 2.33")
    return bits


def parse_bytes(text: str) -> int:
    """Bytes of "24GB", "24e9", "22.4GiB" or "80 GB"; a plain number below a million, "24", is GB.

    Raises:
        ValueError: the text is no such size, or the size is 0.
    """
    match = re.fullmatch(r"([\d.]+(?:e\d+)?) ?(?:([KMGT]?)(i?)B?)", text.strip(), re.IGNORECASE)
    try:
        number = float(match[1])  # type: ignore[index]
        unit = match[2].upper()  # type: ignore[index]
        if match[0] == match[1] and "e" not in text.lower() and 1 <= number < 1e6:
            unit = "G"  # nobody asks about 24 bytes
        scale = 1024 ** " KMGT".index(unit or " ") if match[3] else _UNITS[unit]  # type: ignore[index]
        size = int(number * scale)
    except (TypeError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"{text!r} is not accepted: give a size such as 24GB or 22.4GiB")
    return size


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(p.isdecimal() and int(p) for p in parts):
        raise ValueError(
            f"{text!r} is not accepted: give four whole numbers above 0, such as 1,12,37440,128"
        )
    return tuple(map(int, parts))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _indices(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split(","))


def _joined(names: tuple[str, ...]) -> str:
    """Names as a user writes them, for the default in a help text."""
    return ",".join(names) or "none"


type Count = Annotated[int, _option(_count, "N")]
"""A whole number above 0."""

type Whole = Annotated[int, _option(_whole, "N")]
"""A whole number, 0 included."""

type Port = Annotated[int, _option(_port, "N")]
"""A port to listen at; 0 is any free one."""

type Bits = Annotated[float, _option(_bits, "BITS")]
"""Bits per element, above 0 and at most 16."""

type ByteSize = Annotated[int, _option(parse_bytes, "SIZE")]
"""A number of bytes, such as 24GB or 22.4GiB on the command line; 24 alone is 24GB."""

type Shape = Annotated[tuple[int, ...], _option(_shape, "B,H,T,D")]
"""The shape of a span: batch, heads, tokens, head dim."""

type Names = Annotated[tuple[str, ...], _option(_names, "NAMES"), Parameter(show_default=_joined)]
"""Names, separated by commas on the command line."""

type Indices = Annotated[tuple[int, ...], _option(_indices, "LIST")]
"""Whole numbers, separated by commas on the command line."""

type File = Annotated[Path, _option(Path, "PATH")]
"""A file or a folder."""
