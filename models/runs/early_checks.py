"""Checks of options that need no network: codecs and walks, by modules that are imported in a moment."""

from typing import Any

from qvg_jax.codecs import presets
from qvg_jax.errors import told_to_user

__all__ = ["check_codecs", "check_pocket_world", "check_walk"]

BASELINE = "bf16"


def check_codecs(options: Any) -> None:
    """Raises UserError for a codec that is not known, or a setting of one that is not accepted."""
    for recipe in options.codecs:
        _check_recipe(recipe)


def check_walk(options: Any) -> None:
    """Raises UserError for actions that cannot be walked, or for codecs as `check_codecs` does.

    A codec may have the setting `storage`, which is WorldPlay's own and checked with its history.
    """
    from models.worldplay.cameras import parse_actions

    for recipe in options.codecs:
        kept = [part for part in recipe.split(":") if not part.startswith("storage=")]
        _check_recipe(":".join(kept))
    with told_to_user():
        if options.actions is not None:
            parse_actions(options.actions)


def check_pocket_world(options: Any) -> None:
    """Raises UserError for actions that pocket world does not know, or a codec; KEYS/VALUES are two."""
    from models.pocket_world.camera import parse_actions

    for recipe in options.codecs:
        for part in recipe.split("/"):
            _check_recipe(part)
    if options.actions is not None:
        parse_actions(options.actions)


def _check_recipe(recipe: str) -> None:
    with told_to_user():
        if recipe != BASELINE:
            presets.parse_pair(recipe)
