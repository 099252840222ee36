"""JAX as the command uses it: 32-bit numbers, and compiled programs kept in a folder of bounded size."""

import os
from pathlib import Path

from qvg_jax.app.versions import own_version, versions
from qvg_jax.errors import UserError

__all__ = ["PROGRAMS_BYTES", "programs_folder", "set_up_jax", "verbose_version"]

PROGRAMS_BYTES = 4 * 10**9  # the programs used longest ago go first


def programs_folder() -> Path:
    """The folder of compiled programs: the one that JAX is told of by its environment, or the user's."""
    if named := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "qvg_jax", "programs")


def set_up_jax() -> None:
    """Sets JAX up for the command: 32-bit numbers, and compiled programs kept in the user's cache folder.

    Results do not depend on `JAX_ENABLE_X64`, which is for the user's own programs. A folder of compiled
    programs that JAX was told of stays, with the size that JAX was told.

    Raises:
        UserError: JAX was told of a platform that is not there.
    """
    import jax

    jax.config.update("jax_enable_x64", False)
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # of a platform without its package or device
        platform = os.environ.get("JAX_PLATFORMS", "")
        why = f" ({error})" if str(error) else ""
        raise UserError(
            f"JAX_PLATFORMS={platform!r} cannot be used here; accepted: cpu, a platform that this "
            f"machine and the installed JAX have, or none{why}"
        ) from error
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(programs_folder()))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", PROGRAMS_BYTES)


def verbose_version() -> str:
    """Versions of this package and of what it uses, and where compiled programs are kept."""
    folder = programs_folder()
    files = [p.stat().st_size for p in folder.glob("*") if p.is_file()] if folder.is_dir() else []
    of = f", of at most {PROGRAMS_BYTES / 1e9:g} GB"
    if {"JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"} & os.environ.keys():
        of = ""  # JAX's own settings count
    used = [f"  {name} {version}" for name, version in versions().items() if name != "qvg_jax"]
    return "\n".join(
        [
            f"qvg {own_version()}",
            *used,
            f"compiled programs: {folder}, {sum(files) / 1e6:.1f} MB{of}; the folder can be deleted",
        ]
    )
