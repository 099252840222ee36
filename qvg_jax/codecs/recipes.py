"""Codecs as a user writes them: `NAME` or `NAME:SETTING=VALUE:...`."""

from typing import Any

__all__ = ["parse_recipe"]


def parse_recipe(text: str) -> tuple[str, dict[str, Any]]:
    """The preset's name and the settings that change it: for `presets.get(name, **settings)`.

    Args:
        text: such as "qvg" or "qvg:group=32:num_centroids=64"; what reads as a number becomes one.

    Raises:
        ValueError: a setting that is not written SETTING=VALUE.
    """
    name, *settings = text.split(":")
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key.isidentifier() and equals and value):
            raise ValueError(
                f"codec={text!r} is not understood at {setting!r}; accepted: NAME or "
                "NAME:SETTING=VALUE:..., such as 'qvg:group=32'"
            )
        values[key] = _number(value)
    return name, values


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
