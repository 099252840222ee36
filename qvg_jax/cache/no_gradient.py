"""The point where a reverse gradient ends, with a sentence that says why."""

from typing import Any

from jax.custom_derivatives import linear_call

__all__ = ["no_gradient"]


def no_gradient(x: Any, where: str) -> Any:
    """Returns x. Forward derivatives pass; a reverse one raises, in place of being silently zero.

    Args:
        x: an array.
        where: what the gradient would have to go through, the subject of the message.

    Raises:
        ValueError: when JAX goes back through it.
    """

    def refuse(_, cotangent):
        raise ValueError(
            f"{where} has no gradient: its codes are integers, and rounding has slope zero. A cache is "
            "for generation; train with the uncompressed keys and values"
        )

    return linear_call(lambda _, x: x, refuse, (), x)
