"""Errors that are told to a user in one line."""

__all__ = ["UserError"]


class UserError(ValueError):
    """An error that the user can mend: its message names the argument, the value and what is accepted.

    The command prints the message in one line. Every other exception keeps its traceback.
    """
