"""What a command says beside its progress."""

import re

__all__ = ["beside_progress"]

PROGRESS = re.compile(r"[\w.-]+: loading (JAX|the model)(, \d+ s)?")


def beside_progress(out: str) -> str:
    """The standard output of a command without the lines that only say that it is at work."""
    return "".join(l for l in out.splitlines(True) if not PROGRESS.fullmatch(l.rstrip("\n")))
