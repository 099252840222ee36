"""Recipes whose groups fit the heads of a model: a preset made for heads of 128 works at 64, too."""

import inspect

from qvg_jax.codecs import presets
from qvg_jax.codecs.recipes import is_recipe, parse_recipe, written

__all__ = ["fitted"]

# The setting that counts channels, where it is not `group`.
CHANNELS = {"kivi": "value_group"}


def fitted(recipe: str, head_dim: int) -> str:
    """A recipe whose groups of channels are not longer than a head.

    A group that the recipe states itself stays. A preset's own is clamped to the head dim, so
    `qvg-asym` at head dim 64 is `qvg-asym:group=64`.

    Args:
        recipe: NAME or NAME:SETTING=VALUE:...; what is composed by hand comes back as it is.
        head_dim: channels of a head.

    Raises:
        ValueError: text that is no recipe.
    """
    if not is_recipe(recipe):
        return recipe
    name, settings = parse_recipe(recipe)
    constructor = (presets.PRESETS | presets.PAIRS).get(name)
    if constructor is None:
        return recipe
    setting = CHANNELS.get(name, "group")
    parameters = inspect.signature(constructor).parameters
    default = parameters[setting].default if setting in parameters else None
    if default is None and "group" in parameters:
        default = settings.get("group", parameters["group"].default)
    if setting in settings or not isinstance(default, int) or default <= head_dim:
        return recipe
    return written(name, settings | {setting: head_dim})
