"""Checks of what `encode` and `decode` are given: another kind is named with what is accepted.

A factory puts them around the functions of what it makes, see `Value.checked`. So a codec's own functions
may take for granted that a span is an array and that a packed form is of its class.
"""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from qvg_jax.codecs.no_gradient import no_gradient
from qvg_jax.errors import article, wrong_kind

__all__ = ["check_array", "checked_decode", "checked_encode"]

FIRST = "what encode returns first: packed, state = codec.encode(x, state)"

# Inside of a codec, parts may read packed forms of other sizes than their own, as `transform_codec` does.
_inside: ContextVar[bool] = ContextVar("inside", default=False)


def check_array(value: Any, name: str, axes: str) -> None:
    """Raises TypeError unless a value has a shape and a dtype, as arrays, tracers and `ShapeDtypeStruct` do.

    Args:
        value: the argument.
        name: of the argument.
        axes: for the message, such as "(B, T, Hq, D)".
    """
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise wrong_kind(name, value, f"an array {axes}")


def checked_encode(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `encode` of a codec or a smoothing with its span and key checked, and with no silent gradient.

    A reverse gradient through codes, which are integers, would be wrong without a word: it raises. One
    through a codec without codes, such as `identity`, is right and passes.
    """
    encode = getattr(encode, "unchecked", encode)

    @functools.wraps(encode)
    def checked(x_BHTD: Any, state: Any, *, key: Any = None, **more: Any) -> Any:
        check_array(x_BHTD, "x", "(B, H, T, D)")
        if key is not None and not hasattr(key, "dtype"):
            raise wrong_kind("key", key, "a key, such as jax.random.key(0), or None")
        made = encode(x_BHTD, state, key=key, **more)
        if not any(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(made[0])):
            return made
        return no_gradient(made, "encode")

    checked.unchecked = encode  # pyrefly: ignore[missing-attribute]
    return checked


def checked_decode(
    decode: Callable[..., Any], nbytes: Callable[[Any], int] | None = None
) -> Callable[..., Any]:
    """Returns `decode` with its packed form checked by the class that it is annotated with, and by its bytes.

    Args:
        decode: of a codec or a smoothing.
        nbytes: of the codec: bytes of the packed form of a span; None checks the class only.
    """
    decode = getattr(decode, "unchecked", decode)
    form = inspect.get_annotations(decode).get("packed")

    def check_kind(packed: Any) -> None:
        if isinstance(form, type) and not isinstance(packed, form):
            raise wrong_kind("packed", packed, f"{article(form.__name__)}, {FIRST}")

    @functools.wraps(decode)
    def of_codec(packed: Any, dtype: Any = jnp.bfloat16) -> Any:
        check_kind(packed)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype={jnp.dtype(dtype).name} is not accepted: give floating point")
        if _inside.get():
            return decode(packed, dtype)
        token = _inside.set(True)
        try:
            x_BHTD = decode(packed, dtype)
        except (TypeError, ValueError) as error:
            if type(error) not in (TypeError, ValueError) or "accepted" in str(error):
                raise
            raise ValueError(
                f"packed does not fit this codec ({error}); accepted: {FIRST}"
            ) from error
        finally:
            _inside.reset(token)
        found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(packed))
        if nbytes is not None and found != (own := nbytes(x_BHTD.shape)):
            raise ValueError(
                f"packed has {found} bytes, as another codec made it: a span of shape {x_BHTD.shape} "
                f"has {own} in this one; accepted: {FIRST}"
            )
        return x_BHTD

    @functools.wraps(decode)
    def of_smoothing(packed: Any, residual_BHTD: Any) -> Any:
        check_kind(packed)
        return decode(packed, residual_BHTD)

    checked = of_smoothing if nbytes is None else of_codec
    checked.unchecked = decode  # pyrefly: ignore[missing-attribute]
    return checked
