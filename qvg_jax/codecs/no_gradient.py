"""The point where a reverse gradient ends, with a sentence that says why.

Codes are integers, so that JAX would give a gradient of zero for them without a word; of a loop whose
length is data it would name its own internals. A primitive of
our own and not `custom_vjp`, which forbids forward derivatives, or `linear_call`, which forbids vmap.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["no_gradient"]


CODES = "its codes are integers, and rounding has slope zero"


def no_gradient(x: Any, where: str, why: str = CODES) -> Any:
    """Returns x. Forward derivatives pass; a reverse one raises, in place of being silently zero.

    Args:
        x: an array, or a tree of arrays whose floats carry derivatives.
        where: what the gradient would have to go through, the subject of the message.
        why: what is in its way.

    Raises:
        ValueError: when JAX goes back through it.
    """

    def ended(x: Any) -> Any:
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        return _no_gradient_p.bind(x, where=where, why=why) if floats else x

    return jax.tree.map(ended, x)


def _refuse(cotangent: Any, x: Any, *, where: str, why: str) -> Any:
    if type(cotangent) is ad.Zero:  # nothing depends on it
        return [None]
    raise ValueError(
        f"{where} has no gradient: {why}. A cache is for generation; train with the uncompressed keys "
        "and values"
    )


_no_gradient_p = Primitive("no_gradient")
_no_gradient_p.def_impl(lambda x, where, why: x)
_no_gradient_p.def_abstract_eval(lambda x, where, why: x)
mlir.register_lowering(_no_gradient_p, lambda ctx, x, where, why: [x])
batching.defvectorized(_no_gradient_p)
ad.deflinear2(_no_gradient_p, _refuse)
