"""Standard output and error of a command that may have been closed, or whose reader may go away."""

import contextlib
import os
import sys

__all__ = ["drop_output", "give_streams"]


def give_streams() -> None:
    """Replaces an output that was closed before the start, as by `2>&-`, by one that goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process


def drop_output() -> None:
    """Points standard output at nothing, so that what is still in its buffer raises no second error."""
    with contextlib.suppress(OSError, ValueError):  # a stand-in without a file of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
