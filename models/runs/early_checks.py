"""The codecs that a user asks for, by modules that are imported in a moment: to check before a network is loaded."""

from typing import Any

from qvg_jax.codecs import presets
from qvg_jax.codecs.base import Codec
from qvg_jax.errors import told_to_user

__all__ = ["check_codecs", "codec_pair"]

BASELINE = "bf16"


def check_codecs(options: Any) -> None:
    """Raises UserError for a codec that is not known, or a setting of one that is not accepted."""
    for recipe in options.codecs:
        codec_pair(recipe)


def codec_pair(recipe: str) -> tuple[Codec | None, Codec | None]:
    """Codecs of K and V; None for the baseline, which keeps the model's dtype.

    Raises:
        UserError: the recipe is not known, or one of its settings is not accepted.
    """
    if recipe == BASELINE:
        return None, None
    with told_to_user():
        return presets.parse_pair(recipe)
