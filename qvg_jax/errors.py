"""Errors that are told to a user in one line."""

import contextlib
from collections.abc import Iterator

__all__ = ["UserError", "told_to_user"]


class UserError(ValueError):
    """An error that the user can mend: its message names the argument, the value and what is accepted.

    The command prints the message in one line. Every other exception keeps its traceback.
    """


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
