"""Stored names inside of what trainers, compilers and releases wrap around a network.

The same weights are stored as `blocks.0.weight`, `model.blocks.0.weight` or
`generator_ema._fsdp_wrapped_module.blocks.0.weight`, after who saved them. Known wrappers are read; one
that is not known is named in the error, in front of hundreds of names that do not fit because of it.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from qvg_jax.errors import printable

__all__ = ["common_prefix", "unwrapped"]

# Of torch.compile, FSDP and checkpointing: at any level.
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Of trainers and releases: at the front, also several of them.
_FRONT = ("module.", "generator_ema.", "generator.", "model.", "diffusion_model.", "ema.")


def unwrapped[T](stored: str, target: Callable[[str], T | str]) -> T | str:
    """What `target` says of a stored name, or of the name without wrappers if only that fits.

    Args:
        stored: the name.
        target: where a name goes, or a string that says why nowhere.

    Returns:
        Where it goes, or the string for the name as stored.
    """
    first = target(stored)
    if not isinstance(first, str):
        return first
    name = functools.reduce(lambda n, part: n.replace(part, ""), _ANYWHERE, stored)
    while True:
        found = target(name)
        wrapper = next((w for w in _FRONT if name.startswith(w)), None)
        if not isinstance(found, str):
            return found
        if wrapper is None:
            return first
        name = name.removeprefix(wrapper)


def common_prefix(unused: Sequence[str], target: Callable[[str], Any]) -> str | None:
    """A sentence on what all unused names begin with, if most fit without it; else None."""
    start = os.path.commonprefix([*unused]).split(".")[:-1] if len(unused) > 1 else []
    for n in range(1, len(start) + 1):
        prefix = ".".join(start[:n]) + "."
        fit = sum(not isinstance(target(name.removeprefix(prefix)), str) for name in unused)
        if fit > len(unused) // 2:
            return (
                f"{len(unused)} names begin with {printable(prefix)!r}, and {fit} of them fit without "
                "it; accepted: names without it"
            )
    return None
