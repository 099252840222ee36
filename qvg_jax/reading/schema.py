"""JSON and settings from outside as values of declared types, or an error that names the field.

A schema is a class with annotated fields: a dataclass or a `msgspec.Struct`, with ranges by
`Annotated[int, msgspec.Meta(ge=1, le=1024)]`.

The types are checked by msgspec (BSD-3-Clause, 0.6 MB, no dependencies). pydantic-core, the other
candidate, is nine times as large, and its schemas are written by hand where pydantic itself is not used.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from qvg_jax.errors import UserError, printable

__all__ = ["Size", "checked", "named_file", "parse_json", "read_json"]

type Size = Annotated[int, Meta(ge=1, le=2**20)]
"""A size in a configuration, such as a width."""

JSON_BYTES = 2**20  # of a configuration or an index; the largest released one has a tenth
LONGEST_NAME = 255  # characters, as file systems have it
SHOWN = 60  # characters of a value in a message


def read_json[T](path: str | os.PathLike, kind: type[T], *, most: int = JSON_BYTES) -> T:
    """The value of a JSON file, checked.

    Args:
        path: the file.
        kind: schema of the whole file.
        most: bytes that such a file has at most.

    Raises:
        UserError: the file is not there, too large, no JSON, or does not fit the schema.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise UserError(f"{path}: {size} bytes; accepted: at most {most}")
            text = file.read(size)
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from error
    return parse_json(text, kind, str(path))


def parse_json[T](text: bytes | str, kind: type[T], where: str) -> T:
    """The value of a JSON text, checked.

    Args:
        text: UTF-8 or a string.
        kind: schema.
        where: what the text is, for the message.

    Raises:
        UserError: no JSON, or JSON that does not fit the schema.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        found = None
        with contextlib.suppress(
            msgspec.DecodeError, RecursionError, UnicodeError
        ):  # it is for the message only
            found = msgspec.json.decode(text)
        raise _refused(error, found, where) from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; accepted: JSON of a few levels") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise UserError(f"{where}: not readable as JSON ({printable(str(error))})") from None


def checked[T](values: Any, kind: type[T], where: str = "") -> T:
    """Values of Python, such as a parsed JSON object, as a value of a schema.

    Fields that the schema lacks are ignored, except for a dataclass: there each key must be a field.

    Args:
        values: mapping of names to values.
        kind: schema.
        where: what the values are, for the message; left out if the caller says it.

    Raises:
        UserError: a value of another type or out of range, a missing or an unknown field; the
            message names it.
    """
    fields = getattr(kind, "__dataclass_fields__", {})
    unknown = sorted(map(str, values.keys() - fields.keys())) if fields and _named(values) else ()
    if unknown:
        raise UserError(
            f"{_front(where)}{printable(', '.join(unknown))[:SHOWN]} is not known; accepted: "
            f"{', '.join(fields)}"
        )
    try:
        return msgspec.convert(dict(values) if _named(values) else values, kind)
    except msgspec.ValidationError as error:
        raise _refused(error, values, where) from None
    except RecursionError:
        raise UserError(f"{_front(where)}nested too deeply; accepted: a few levels") from None


def named_file(folder: Path, name: str, where: str) -> Path:
    """A file beside another one, by a name that a file from outside gives.

    Args:
        folder: folder that the name must stay in.
        name: the name as stored.
        where: the file that has the name, for the message.

    Raises:
        UserError: the name is empty, too long, or a path out of the folder.
    """
    bare = bool(name) and len(name) <= LONGEST_NAME and name not in (".", "..")
    if not bare or not name.isprintable() or re.search(r"[/\\]", name):
        raise UserError(
            f"{where}: the file name {printable(name)[:SHOWN]!r} is not accepted: give names of files "
            f"beside it, of at most {LONGEST_NAME} characters"
        )
    return folder / name


def _front(where: str) -> str:
    return f"{where}: " if where else ""


def _named(values: Any) -> bool:
    return isinstance(values, Mapping)


def _refused(error: msgspec.ValidationError, values: Any, where: str) -> UserError:
    """The error with the field's name and value in place of msgspec's path."""
    what, _, path = str(error).partition(" - at `")
    path = path.rstrip("`")
    what = what.replace("`", "").replace("Expected ", "expected ")
    what = what.replace("Object missing required field", "has no")
    name = path.removeprefix("$").lstrip(".")
    found, known = values, bool(name) and "..." not in name
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", name):
        try:
            found = found[int(index) if index else key]
        except (KeyError, IndexError, TypeError):
            known = False
            break
    value = f"={printable(repr(found))[:SHOWN]}" if known else ""
    return UserError(f"{_front(where)}{name + value + ': ' if name else ''}{printable(what)}")
