"""The point where a reverse gradient ends, with a sentence that says why.

Codes are integers, so that JAX would give a gradient of zero for them without a word. A primitive of
our own and not `custom_vjp`, which forbids forward derivatives, or `linear_call`, which forbids vmap.
"""

from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["no_gradient"]


def no_gradient(x: Any, where: str) -> Any:
    """Returns x. Forward derivatives pass; a reverse one raises, in place of being silently zero.

    Args:
        x: an array.
        where: what the gradient would have to go through, the subject of the message.

    Raises:
        ValueError: when JAX goes back through it.
    """
    return _no_gradient_p.bind(x, where=where)


def _refuse(cotangent: Any, x: Any, *, where: str) -> Any:
    if type(cotangent) is ad.Zero:  # nothing depends on it
        return [None]
    raise ValueError(
        f"{where} has no gradient: its codes are integers, and rounding has slope zero. A cache is for "
        "generation; train with the uncompressed keys and values"
    )


_no_gradient_p = Primitive("no_gradient")
_no_gradient_p.def_impl(lambda x, where: x)
_no_gradient_p.def_abstract_eval(lambda x, where: x)
mlir.register_lowering(_no_gradient_p, lambda ctx, x, where: [x])
batching.defvectorized(_no_gradient_p)
ad.deflinear2(_no_gradient_p, _refuse)
