"""Codecs as text: a recipe `NAME:SETTING=VALUE:...`, or calls of factories joined by `>`."""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.number_format import format_name
from qvg_jax.codecs.spec import FACTORIES

__all__ = ["is_recipe", "parse_call", "parse_recipe", "written"]


def is_recipe(text: str) -> bool:
    """Returns whether a text is `NAME` or `NAME:...`, and not calls of factories."""
    return re.fullmatch(r"[^(>:]*(:.*)?", text, re.DOTALL) is not None


def parse_recipe(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the preset's name and the settings that change it: for `presets.get(name, **settings)`.

    Args:
        text: such as "qvg" or "qvg:group=32:num_centroids=64". Numbers, True, False and None are
            read as such, all else is a string.

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
        if key in values:
            raise ValueError(f"codec={text!r} gives {key} twice; accepted: each setting once")
        values[key] = _value(value)
    return name, values


def written(name: str, settings: Mapping[str, Any]) -> str:
    """Returns the text of a recipe, from which `parse_recipe` gives the name and the settings again."""
    return ":".join([name, *(f"{key}={_text(value)}" for key, value in settings.items())])


def parse_call(text: str, preset: Callable[[str], Any]) -> Any:
    """Returns the codec or smoothing that calls of factories make: "f(n=1) > g(m=2)", as codecs print.

    Args:
        text: Python's notation for calls with literals as arguments; `a > b` is `chain(a, b)`.
        preset: reads the text of a recipe, for `preset('qvg:group=32')` among the calls.

    Raises:
        ValueError: other notation, an unknown factory, or arguments that it does not accept.
    """
    try:
        return _Calls(text, preset).made(ast.parse(text.strip(), mode="eval").body)
    except (RecursionError, MemoryError):  # MemoryError: how Python's parser says it
        raise ValueError(f"codec={text[:60]!r}... is nested too deeply; {_ACCEPTED}") from None
    except SyntaxError as error:
        raise ValueError(f"codec={text!r} is not understood: {error.msg}; {_ACCEPTED}") from None


_ACCEPTED = (
    "accepted: a recipe such as 'qvg:group=32', or calls such as "
    "'kmeans_smoothing(num_centroids=64) > residual_quantize(bits=2)'"
)


class _Calls:
    """Makes what the nodes of an expression stand for; nothing but calls of factories is run."""

    def __init__(self, text: str, preset: Callable[[str], Any]):
        self.text, self.preset = text, preset

    def made(self, node: ast.expr) -> Any:
        match node:
            case ast.Compare(left=left, ops=ops, comparators=others):
                if all(isinstance(op, ast.Gt) for op in ops):
                    return chain(*map(self.made, [left, *others]))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return self.called(name, args, keywords)
            case ast.Name(id=word):
                return word
            case _:
                try:
                    return ast.literal_eval(node)
                except ValueError:
                    pass
        raise ValueError(f"codec={self.text!r} is not understood; {_ACCEPTED}")

    def called(self, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Any:
        values = [self.made(a) for a in args]
        named = {k.arg: self.made(k.value) for k in keywords if k.arg is not None}
        if name == "preset" and len(values) == 1 and isinstance(values[0], str):
            return self.preset(values[0])
        if name not in FACTORIES or name == "preset":
            known = ", ".join(sorted(set(FACTORIES) - {"preset"}))
            raise ValueError(f"codec={self.text!r}: {name!r} is not known; accepted: {known}")
        try:
            return FACTORIES[name](*values, **named)
        except TypeError as error:
            raise ValueError(f"codec={self.text!r}: {name!r}: {error}") from None


def _value(text: str) -> Any:
    """Returns the value of a literal, and any other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _text(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if value is not None and not isinstance(value, str | bool | int | float | tuple):
        value = format_name(value)
    return value if isinstance(value, str) else repr(value)
