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
    "Frames",
    "Indices",
    "Layers",
    "Name",
    "Names",
    "Port",
    "Rate",
    "Shape",
    "Share",
    "Side",
    "SomeFrames",
    "Steps",
    "Whole",
    "parse_bytes",
]

LARGEST = 10**18  # what a whole number of the command line may be

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _option(parse: Callable[[str], Any], metavar: str) -> Parameter:
    """A parameter of one word, which `parse` turns into a value or refuses with a ValueError."""

    def convert(_: Any, tokens: Sequence[Token]) -> Any:
        return parse(tokens[-1].value)  # of an option given twice, the last one counts

    return Parameter(
        converter=convert, n_tokens=1, metavar=metavar, allow_leading_hyphen=True, negative=()
    )


def _number(least: int, most: int, what: str) -> Callable[[str], int]:
    """A reader of whole numbers of a range; `what` they are is said of all others."""

    def read(text: str) -> int:
        # A number of thousands of digits takes long to read, and is too large anyway.
        digits = text.lstrip("0") if text.isascii() and text.isdecimal() else ""
        number = int(digits or "0") if len(digits) <= 20 else most + 1
        if not text.isascii() or not text.isdecimal() or number < least:
            raise ValueError(f"{_quoted(text)} is not accepted: give {what}")
        if number > most:
            raise ValueError(f"{_quoted(text)} is not accepted: give {what}, at most {most}")
        return number

    return read


def _quoted(text: str) -> str:
    """A text of the user in a message, not at any length."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


_whole = _number(0, LARGEST, "a whole number")
_count = _number(1, 10**9, "a whole number above 0")
_steps = _number(1, 10_000, "a whole number above 0")
_layers = _number(1, 1024, "a whole number above 0")
_frames = _number(1, 10**6, "a whole number above 0")
_some_frames = _number(0, 10**6, "a whole number")
_side = _number(1, 2**14, "a whole number above 0")
_rate = _number(1, 1000, "a whole number above 0")
_port = _number(0, 65535, "a port from 0 on")


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError(f"{_quoted(text)} is not accepted: give the path of a file or a folder")
    return Path(text)


def _name(text: str) -> str:
    return str(_path(text)) if not text or "\0" in text else text


def _bits(text: str) -> float:
    try:
        bits = float(text)
    except ValueError:
        bits = 0.0
    if not 0 < bits <= 16:
        raise ValueError(f"{_quoted(text)} is not accepted: give bits, such as 2.33")
    return bits


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"{_quoted(text)} is not accepted: give a share, such as 0.3")
    return share


def parse_bytes(text: str) -> int:
    """Bytes of "24GB", "22.4GiB" or "80 GB".

    A number without a unit is GB below a million, however it is written ("24", "2.4e1"), and bytes from a
    million on ("24e9", "24000000000").

    Raises:
        ValueError: the text is no such size, or the size is 0.
    """
    match = re.fullmatch(r"([\d.]+(?:e\d+)?) ?(?:([KMGT]?)(i?)B?)", text.strip(), re.IGNORECASE)
    try:
        number = float(match[1])  # type: ignore[index]
        unit = match[2].upper()  # type: ignore[index]
        if match[0].strip() == match[1] and 1 <= number < 1e6:
            unit = "G"  # nobody asks about 24 bytes
        scale = 1024 ** " KMGT".index(unit or " ") if match[3] else _UNITS[unit]  # type: ignore[index]
        size = int(number * scale)
    except (TypeError, ValueError, OverflowError):
        size = 0
    if not 1 <= size <= LARGEST:
        raise ValueError(f"{_quoted(text)} is not accepted: give a size such as 24GB or 22.4GiB")
    return size


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    try:
        shape = tuple(map(_count, parts))
    except ValueError:
        shape = ()
    if len(shape) != 4:
        raise ValueError(
            f"{_quoted(text)} is not accepted: give four whole numbers above 0, such as "
            "1,12,37440,128"
        )
    return shape


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    if not all(names):
        raise ValueError(f"{_quoted(text)} is not accepted: give names with one comma between them")
    return names


def _indices(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split(","))


def _joined(names: tuple[str, ...]) -> str:
    """Names as a user writes them, for the default in a help text."""
    return ",".join(names) or "none"


type Count = Annotated[int, _option(_count, "N")]
"""A whole number above 0."""

type Whole = Annotated[int, _option(_whole, "N")]
"""A whole number, 0 included."""

type Steps = Annotated[int, _option(_steps, "N")]
"""A number of denoising steps."""

type Layers = Annotated[int, _option(_layers, "N")]
"""A number of layers."""

type Frames = Annotated[int, _option(_frames, "N")]
"""A number of frames above 0."""

type SomeFrames = Annotated[int, _option(_some_frames, "N")]
"""A number of frames, 0 included."""

type Side = Annotated[int, _option(_side, "N")]
"""The height or width of a picture in pixels."""

type Rate = Annotated[int, _option(_rate, "N")]
"""Frames a second."""

type Port = Annotated[int, _option(_port, "N")]
"""A port to listen at; 0 is any free one."""

type Bits = Annotated[float, _option(_bits, "BITS")]
"""Bits per element, above 0 and at most 16."""

type Share = Annotated[float, _option(_share, "SHARE")]
"""A share, from 0 to 1."""

type ByteSize = Annotated[int, _option(parse_bytes, "SIZE")]
"""A number of bytes, such as 24GB or 22.4GiB on the command line; 24 alone is 24GB, 24e9 alone are bytes."""

type Shape = Annotated[tuple[int, ...], _option(_shape, "B,H,T,D")]
"""The shape of a span: batch, heads, tokens, head dim."""

type Names = Annotated[tuple[str, ...], _option(_names, "NAMES"), Parameter(show_default=_joined)]
"""Names, separated by commas on the command line."""

type Indices = Annotated[tuple[int, ...], _option(_indices, "LIST")]
"""Whole numbers, separated by commas on the command line."""

type Name = Annotated[str, _option(_name, "PATH")]
"""The name of a file that is read, kept as it was written."""

type File = Annotated[Path, _option(_path, "PATH")]
"""A file or a folder."""
