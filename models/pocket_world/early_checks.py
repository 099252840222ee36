"""Checks of pocket world's options that need no weights: codecs and actions."""

from typing import Any

from models.pocket_world.camera import parse_actions
from models.runs.early_checks import check_encoders
from qvg_jax.codecs import presets
from qvg_jax.codecs.recipes import parse_recipe
from qvg_jax.errors import UserError, told_to_user

__all__ = ["check_endless", "check_options"]


def check_options(options: Any) -> None:
    """Raises UserError for a codec or actions that are not known, or an option without the one it needs."""
    parts = [part for recipe in options.codecs for part in recipe.split("/")]
    with told_to_user():
        for part in parts:
            name, settings = parse_recipe(part)
            check_encoders(part, presets.pair(name, **settings))
    if options.actions is not None:
        parse_actions(options.actions)
    check_endless(options)


def check_endless(options: Any) -> None:
    """Raises UserError for an option of a bounded memory without --endless."""
    for name in ("memory", "recall"):
        value = getattr(options, name)
        if value and not options.endless:
            raise UserError(f"{name}={value} needs --endless: without it all is kept")
