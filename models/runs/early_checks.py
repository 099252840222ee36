"""The codecs that a user asks for, by modules that are imported in a moment: to check before a network is loaded."""

from collections.abc import Iterable
from typing import Any

from qvg_jax.codecs import presets
from qvg_jax.codecs.base import Codec
from qvg_jax.codecs.compose import missing_for
from qvg_jax.errors import UserError, told_to_user

__all__ = ["check_codecs", "check_encoders", "codec_pair"]

BASELINE = "bf16"


def check_codecs(options: Any) -> None:
    """Raises UserError for a codec that is not known, or a setting of one that is not accepted."""
    for recipe in options.codecs:
        codec_pair(recipe)


def codec_pair(recipe: str) -> tuple[Codec | None, Codec | None]:
    """Codecs of K and V; None for the baseline, which keeps the model's dtype.

    Raises:
        UserError: the recipe is not known, one of its settings is not accepted, or it names an encoder that
            this machine has not.
    """
    if recipe == BASELINE:
        return None, None
    with told_to_user():
        codecs = presets.parse_pair(recipe)
    check_encoders(recipe, codecs)
    return codecs


def check_encoders(recipe: str, codecs: Iterable[Codec | None]) -> None:
    """Raises UserError for a codec that names an encoder which this machine has not."""
    for codec in codecs:
        if (why := missing_for(codec)) is not None:
            raise UserError(f"codec={recipe!r}: {why}")
