"""Errors that are told to a user in one line."""

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = [
    "LostDeviceError",
    "MissingExtraError",
    "UserError",
    "article",
    "printable",
    "told_to_user",
    "wrong_kind",
]


class UserError(ValueError):
    """An error that the user can mend: its message names the argument, the value and what is accepted.

    The command prints the message in one line. Every other exception keeps its traceback.
    """


class LostDeviceError(UserError):
    """The error of a run whose devices are not all there any more."""


class MissingExtraError(UserError, ImportError):
    """An error that says which optional packages are missing and how to install them.

    Args:
        what: what needs them and which, such as "reading PyTorch's files needs PyTorch".
        extra: the extra of this package that has them.
    """

    def __init__(self, what: str, extra: str):
        super().__init__(
            f"{what}: pip install 'qvg-jax[{extra}]', or in a checkout uv run --extra {extra} qvg"
        )


@contextlib.contextmanager
def told_to_user() -> Iterator[None]:
    """Turns a ValueError of the library into a UserError: for code that only checks a user's values.

    with told_to_user():
        codec = presets.get(name_from_the_command_line)
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def wrong_kind(name: str, value: Any, accepted: str) -> TypeError:
    """The error for an argument that is of another kind than the ones accepted.

    Args:
        name: of the argument.
        value: what was given.
        accepted: what would be.
    """
    return TypeError(f"{name}={_shown(value)} is not accepted: give {accepted}")


def _shown(value: Any) -> str:
    """A value in a few words: a number as it is, an array by its shape, anything else by its kind."""
    if value is None or isinstance(value, str | int | float):
        return repr(value)[:60]
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {tuple(value.shape)} of {value.dtype}"
    return article(type(value).__name__)


def article(noun: str) -> str:
    """The noun behind "a" or "an"."""
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"


def printable(text: str) -> str:
    r"""The text in one line that a terminal can only show, not obey: for words from files and strangers.

    White space becomes a space. Other control characters, which could move the cursor or change the
    terminal's title, and lone surrogates are written as escapes, such as `\x1b`.
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
