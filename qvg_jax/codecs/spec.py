"""Specs make codecs values: a spec says what made a codec, and compares, hashes, prints and rebuilds it.

A codec is a handful of functions, and functions compare by identity only. So every factory of codecs
is decorated with `factory`, which checks the arguments by their annotations and attaches a `Spec`: the
factory's name and all settings, defaults included. Two codecs with equal specs are equal, wherever
and whenever they were built, so jit compiles once for both.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np

from qvg_jax.codecs.number_format import FormatLike, format_name

__all__ = ["FACTORIES", "Spec", "Value", "factory"]

# All decorated factories by name: what `presets.parse` reads.
FACTORIES: dict[str, Callable[..., Any]] = {}


@dataclasses.dataclass(frozen=True)
class Spec:
    """The factory that made a value and all its settings; hashable.

    Attributes:
        factory: a key of `FACTORIES`.
        settings: (name, value) of every argument, in the order of the signature. Dtypes are short
            names, codecs and smoothings are themselves.
        text: how the value is written, if not as a call; it does not take part in comparisons.
    """

    factory: str
    settings: tuple[tuple[str, Any], ...]
    text: str | None = dataclasses.field(default=None, compare=False)

    def __getitem__(self, setting: str) -> Any:
        return dict(self.settings)[setting]

    def __str__(self) -> str:
        if self.text is not None:
            return self.text
        settings = dict(self.settings)
        if self.factory == "chain" and len(settings["transforms"]) > 1 and not settings["encoder"]:
            return " > ".join(_written(t, inside_chain=True) for t in settings["transforms"])
        return f"{self.factory}({', '.join(self._arguments())})"

    def _arguments(self) -> list[str]:
        """Returns the arguments of the call, without those that have their default."""
        written, leading = [], True
        for name, p in inspect.signature(FACTORIES[self.factory]).parameters.items():
            value = self[name]
            if p.kind is p.VAR_POSITIONAL:
                written += [_written(v) for v in value]
                leading = False
            elif leading and isinstance(value, Value):
                written.append(_written(value))
            elif value != p.default:
                leading = False
                written.append(f"{name}={_written(value)}")
            else:
                leading = False
        return written


class Value:
    """Base of frozen dataclasses of functions: equal by `spec`, or by their fields if they have none.

    `spec` is set by `factory`. An object made by hand, or by `dataclasses.replace`, has none; it is
    equal to another with the same functions.
    """

    spec: Spec | None

    def checked[V](self: V) -> V:
        """The same value, whose functions check their arguments."""
        return self

    def _key(self) -> tuple[Any, ...]:
        if self.spec is not None:
            return type(self), self.spec
        return type(self), *self._fields()

    def _fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self) if f.init)  # pyright: ignore[reportArgumentType]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Value):
            return NotImplemented
        return hash(self) == hash(other) and self._key() == other._key()

    def __hash__(self) -> int:
        if "_hash" not in self.__dict__:
            object.__setattr__(self, "_hash", hash(self._key()))
        return self.__dict__["_hash"]

    def __str__(self) -> str:
        return getattr(self, "name", "?") if self.spec is None else str(self.spec)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.spec is None:
            return type(self), self._fields()
        return _rebuilt, (FACTORIES[self.spec.factory], self.spec.settings, self.spec.text)


def factory[F: Callable[..., Any]](function: F) -> F:
    """Makes what a function returns a value: its arguments are checked and become the `spec`.

    Integers, numbers and flags are checked by the annotations (an int may come from NumPy, a float is
    not an int), dtypes annotated `FormatLike` become short names, sequences become tuples. The
    function, which sees the checked arguments, checks their ranges.

    Args:
        function: returns a new `Value`, the same for equal arguments. No `**kwargs`.

    Returns:
        The function with these checks; also in `FACTORIES`, under its name.
    """
    signature, hints = inspect.signature(function), typing.get_type_hints(function)

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            bound.arguments[name] = _checked(name, value, hints.get(name))
        made = function(*bound.args, **bound.kwargs).checked()
        object.__setattr__(made, "spec", Spec(make.__name__, tuple(bound.arguments.items())))
        return made

    FACTORIES[make.__name__] = make
    return make  # pyright: ignore[reportReturnType]


def _rebuilt(function: Callable[..., Any], settings: Any, text: str | None) -> Any:
    bound = inspect.signature(function).bind_partial()
    bound.arguments.update(settings)
    more = {} if text is None else {"text": text}
    return function(*bound.args, **(bound.kwargs | more))


def _tuple(value: Any) -> Any:
    """Returns lists and NumPy arrays, also inside each other, as tuples."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(map(_tuple, value)) if isinstance(value, list | tuple) else value


_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Returns the value in the annotated type; ValueError if it is of another."""
    if hint is FormatLike:
        return format_name(value)
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    if isinstance(value, bool | np.bool_):
        if bool in kinds:
            return bool(value)
    elif isinstance(value, Integral):
        if bool in kinds and value in (0, 1):
            return bool(value)
        if int in kinds or float in kinds:
            return int(value)
    elif isinstance(value, Real):
        if float in kinds:
            return float(value)
    elif isinstance(value, str):
        if str in kinds:
            return value
    elif value is None:
        if types.NoneType in kinds:
            return None
    elif isinstance(value, list | tuple | np.ndarray):
        value = _tuple(value)
    accepted = [text for kind, text in _KINDS.items() if kind in kinds]
    if not accepted or any(typing.get_origin(k) is tuple for k in kinds):
        return value
    if types.NoneType in kinds:
        accepted.append("None")
    raise ValueError(f"{name}={value!r} is not accepted: give {' or '.join(accepted)}")


def _written(value: Any, inside_chain: bool = False) -> str:
    """Returns the text of a setting, as `presets.parse` reads it."""
    if not isinstance(value, Value):
        return repr(value)
    if value.spec is None:
        return f"<{value}>"  # made by hand: there is nothing to read back
    if value.spec.text is not None:
        return f"preset({value.spec.text!r})"
    bracket = inside_chain and " > " in str(value) and value.spec.factory == "chain"
    return f"({value})" if bracket and not str(value).startswith("chain(") else str(value)
