"""Checks of a run's options before its model is loaded, or even imported: seconds for a typing error, not minutes."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qvg_jax.app.model_entry import GenerateOptions, ModelEntry
from qvg_jax.errors import UserError
from qvg_jax.files import writable_folder

__all__ = ["FILES", "REPORTS", "check_early", "check_out", "has_report"]

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


def has_report(out: Path, model: str, arms: Iterable[str], expected: Mapping[str, Any]) -> bool:
    """Whether all files of a finished run are in a folder, and its report is of a model, arms and settings.

    Args:
        out: folder of an earlier run.
        model: its name.
        arms: names of the arms, in their order.
        expected: entries that the report's "config" has, beside others.
    """
    out = Path(out)
    if not all((out / name).is_file() for name in FILES):
        return False
    try:
        report = json.loads((out / REPORTS[0]).read_text(encoding="utf-8"))
        found = {key: report["config"][key] for key in expected}
        same = (report["model"], [*report["arms"]]) == (model, [*arms])
    except (OSError, ValueError, KeyError, TypeError):  # not a report of ours
        return False
    return same and found == json.loads(json.dumps(dict(expected)))


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
