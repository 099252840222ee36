"""Checks of a run's options before its model is loaded, or even imported: seconds for a typing error, not minutes."""

import logging
from pathlib import Path

from qvg_jax.app.model_entry import GenerateOptions, ModelEntry
from qvg_jax.errors import UserError
from qvg_jax.files import writable_folder

__all__ = ["FILES", "REPORTS", "check_early", "check_out"]

REPORTS = ("report.json", "report.png", "report.html")
FILES = ("video.mp4", *REPORTS)  # what a run writes into its folder

log = logging.getLogger(__name__)


def check_early(entry: ModelEntry, options: GenerateOptions) -> None:
    """Raises for options that are wrong whatever the weights are: the folder, and what `entry.check` reads.

    Raises:
        UserError: a value that is not accepted, named with what would be.
        OSError: the folder cannot be made or written.
    """
    check_out(options.out)
    entry.check(options)
    seen = {options.codecs[0]}
    for name in options.codecs[1:]:
        if name in seen:
            log.warning(f"--compare {name}: this codec is asked for already, and runs once")
        seen.add(name)


def check_out(out: Path) -> None:
    """Raises if the files of a run cannot be written into a folder; leaves no new folder behind.

    Raises:
        UserError: one of the files is a folder.
        OSError: the folder cannot be made or written.
    """
    out = Path(out)
    for name in FILES:
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {out / name} is a folder; accepted: another --out")
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        writable_folder(out)
    finally:
        for folder in missing:  # the innermost first
            if folder.is_dir():
                folder.rmdir()
