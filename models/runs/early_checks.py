"""Checks of codecs that need no network, by modules that are imported in a moment."""

from typing import Any

from qvg_jax.codecs import presets
from qvg_jax.errors import told_to_user

__all__ = ["check_codecs", "check_recipe"]

BASELINE = "bf16"


def check_codecs(options: Any) -> None:
    """Raises UserError for a codec that is not known, or a setting of one that is not accepted."""
    for recipe in options.codecs:
        check_recipe(recipe)


def check_recipe(recipe: str) -> None:
    """Raises UserError unless a text is bf16, or a recipe for K and V."""
    with told_to_user():
        if recipe != BASELINE:
            presets.parse_pair(recipe)
