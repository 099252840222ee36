"""Checks of a walk's options that need no network: codecs and actions, by modules that are imported in a moment."""

from typing import Any

from models.runs.early_checks import codec_pair
from models.worldplay.cameras import parse_actions
from qvg_jax.errors import told_to_user

__all__ = ["check_walk"]


def check_walk(options: Any) -> None:
    """Raises UserError for actions that cannot be walked, or for a codec that is not known.

    A codec may have the setting `storage`, which is WorldPlay's own and checked with its history.
    """
    for recipe in options.codecs:
        kept = [part for part in recipe.split(":") if not part.startswith("storage=")]
        codec_pair(":".join(kept))
    with told_to_user():
        if options.actions is not None:
            parse_actions(options.actions)
