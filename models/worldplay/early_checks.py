"""Checks of a walk's options that need no network: codecs and actions, by modules that are imported in a moment."""

from typing import Any

from models.runs.early_checks import codec_pair
from models.worldplay.cameras import parse_actions
from qvg_jax.errors import told_to_user

__all__ = ["check_walk", "without_storage"]


def check_walk(options: Any) -> None:
    """Raises UserError for actions that cannot be walked, or for a codec that is not known.

    A codec may have the setting `storage`, which is checked with its history.
    """
    for recipe in options.codecs:
        codec_pair(without_storage(recipe)[0])
    with told_to_user():
        if options.actions is not None:
            parse_actions(options.actions)


def without_storage(recipe: str) -> tuple[str, str]:
    """A recipe without the setting `storage`, which is WorldPlay's own, and that setting: packed if left out."""
    kept, storage = [], "packed"
    for part in recipe.split(":"):
        key, _, value = part.partition("=")
        if key == "storage":
            storage = value
        else:
            kept.append(part)
    return ":".join(kept), storage
