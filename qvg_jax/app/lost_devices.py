"""A device or a process that is lost during a run: one line for the user, and an exit that waits for nobody."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from qvg_jax.errors import LostDeviceError

__all__ = ["leave", "told_of_lost_devices"]

# What collectives, the coordination service and drivers say of a peer or a device that is gone.
_LOST = re.compile(
    r"gloo|nccl|closed by peer|heartbeat|unavailable|aborted|deadline_exceeded|cuda_error",
    re.IGNORECASE,
)


@contextlib.contextmanager
def told_of_lost_devices(options: Any) -> Iterator[None]:
    """Turns the errors of a lost device or process, in a run of several, into a LostDeviceError.

    Args:
        options: of the run: `devices`, `plan` and `coordinator` say whether it has several devices, `out`
            and `resume` how it goes on.
    """
    several = (getattr(options, "devices", None) or 1) > 1
    several |= any(getattr(options, name, None) is not None for name in ("plan", "coordinator"))
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not several or "RESOURCE_EXHAUSTED" in str(error) or not _LOST.search(str(error)):
            raise
        go_on = ""
        if hasattr(options, "resume"):
            go_on = (
                f"; blocks that were finished are in {Path(options.out)}: --resume goes on from them, also "
                "with other --devices"
            )
        what = str(error).strip().splitlines()[0][:160]
        raise LostDeviceError(
            f"a device or a process of the run was lost ({what}){go_on}"
        ) from error


def leave(code: int) -> int:
    """Ends this process with an exit code, if it is one of several; returns the code if it is alone.

    A usual exit would wait for the process that was lost.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
