"""Checks of pocket world's options that need no weights: codecs and actions."""

from typing import Any

from models.pocket_world.camera import parse_actions
from qvg_jax.codecs import presets
from qvg_jax.codecs.recipes import parse_recipe
from qvg_jax.errors import told_to_user

__all__ = ["check_options"]


def check_options(options: Any) -> None:
    """Raises UserError for actions that pocket world does not know, or a codec; KEYS/VALUES are two."""
    with told_to_user():
        for recipe in options.codecs:
            for name, settings in map(parse_recipe, recipe.split("/")):
                presets.pair(name, **settings)
    if options.actions is not None:
        parse_actions(options.actions)
