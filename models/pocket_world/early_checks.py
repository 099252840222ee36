"""Checks of pocket world's options that need no weights: codecs and actions."""

from typing import Any

from models.pocket_world.camera import parse_actions
from models.runs.early_checks import check_recipe

__all__ = ["check_options"]


def check_options(options: Any) -> None:
    """Raises UserError for actions that pocket world does not know, or a codec; KEYS/VALUES are two."""
    for recipe in options.codecs:
        for part in recipe.split("/"):
            check_recipe(part)
    if options.actions is not None:
        parse_actions(options.actions)
