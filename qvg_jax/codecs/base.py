"""The codec, a compressor of K or V: a frozen record of pure functions that compares by value.

A `Codec` turns a span of tokens into a pytree of small arrays and back. A `Smoothing` takes
something out of the span, stores it, and leaves a residual. `chain` (`compose`) puts any number of
smoothings in front of one codec and is again a codec, so chains nest:

    codec = chain(kmeans_smoothing(256), residual_quantize(bits=2, group=64))
    state = codec.init(x_BHTD.shape, x_BHTD.dtype)
    packed, state = codec.encode(x_BHTD, state)
    x_BHTD = codec.decode(packed)

Arrays carry their axes in their names: B batch, H heads, T tokens of one span, D head dim.
"""

import dataclasses
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from qvg_jax.codecs.arguments import checked_decode, checked_encode
from qvg_jax.codecs.number_format import FormatLike, dtype_of, format_name
from qvg_jax.codecs.spec import Spec, Value, factory
from qvg_jax.codecs.storage import Centroids, Storage, Values
from qvg_jax.errors import wrong_kind

__all__ = [
    "Codec",
    "Decode",
    "EmptyState",
    "Encode",
    "IdentityPacked",
    "Init",
    "Packed",
    "Restore",
    "Shape",
    "Smooth",
    "Smoothing",
    "State",
    "check_span",
    "identity",
    "per_element",
]

type Shape = tuple[int, ...]
type Packed = Any  # a pytree of arrays; its shapes depend on the span's shape only
type State = Any  # a pytree of arrays that one span hands to the next


class EmptyState(NamedTuple):
    """State of a transform that remembers nothing between spans."""


@runtime_checkable
class Init(Protocol):
    """Returns the state before the first span of a shape (B, H, T, D)."""

    def __call__(self, shape: Shape, dtype: Any = jnp.bfloat16, /) -> State: ...


@runtime_checkable
class Encode(Protocol):
    """Returns the packed form of a span, and the state for the next one."""

    def __call__(
        self, x_BHTD: Array, state: State, /, *, key: PRNGKeyArray | None = None
    ) -> tuple[Packed, State]: ...


@runtime_checkable
class Decode(Protocol):
    """Returns the span of a packed form."""

    def __call__(self, packed: Packed, dtype: Any = jnp.bfloat16, /) -> Array: ...


@runtime_checkable
class Smooth(Protocol):
    """Returns what a smoothing stores of a span, the residual in float32, and the state for the next."""

    def __call__(
        self, x_BHTD: Array, state: State, /, *, key: PRNGKeyArray | None = None
    ) -> tuple[Packed, Array, State]: ...


@runtime_checkable
class Restore(Protocol):
    """Returns the span, in float32, of what a smoothing stored and its residual."""

    def __call__(self, packed: Packed, residual_BHTD: Array, /) -> Array: ...


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Codec(Value):
    """A compressor of spans: pure functions only, so it jits, vmaps, scans and shards.

    It is a value: factories attach a `spec`, and codecs with equal specs are equal, hash alike, can
    be pickled and print as what `presets.parse` reads. One that is made by hand, from functions, is
    equal to another of the same functions.

    Same input, same state and same key give the same bytes on every run. `packed` holds arrays
    only and its shapes depend on the span's shape only, so that the packed form of several spans
    can be stacked, scanned over, written with `dynamic_update_slice` and donated.

    Attributes:
        init: `init(shape, dtype) -> state` for spans of shape (B, H, T, D).
        encode: `encode(x_BHTD, state, *, key=None) -> (packed, state)`. The new state lets the
            next span start from what this one learned.
        decode: `decode(packed, dtype=jnp.bfloat16) -> x_BHTD`.
        bits_per_element: `bits_per_element(shape) -> float`, from the storage formats; equals
            eight times the bytes of `packed`'s buffers divided by the number of elements.
        name: what reports call it.
        nbytes: `nbytes(shape) -> int`, the bytes of `packed` for that span.
        storage: what the bytes of `packed` stand for, for kernels; None if nothing is declared. It
            goes with `decode`: a copy that decodes otherwise needs another.
        deficit: `deficit(packed) -> (B, H, T)`, per token the variance of an element of what is
            encoded less that of what is decoded, by the codec's model of its error (`key_bias`);
            None if it has none.
        spec: the factory and the settings that made the codec; None if it was made by hand.
    """

    init: Init
    encode: Encode
    decode: Decode
    bits_per_element: Callable[[Shape], float]
    name: str
    nbytes: Callable[[Shape], int]
    storage: Storage | None = None
    deficit: Callable[[Packed], Array] | None = None
    spec: Spec | None = dataclasses.field(default=None, init=False)

    def checked(self) -> "Codec":
        """The same codec, whose `encode` and `decode` name arguments of another kind."""
        encode, decode = checked_encode(self.encode), checked_decode(self.decode, self.nbytes)
        return dataclasses.replace(self, encode=encode, decode=decode)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Smoothing(Value):
    """A transform that takes something out of a span and leaves a residual of the same shape.

    Attributes:
        init: `init(shape, dtype) -> state`.
        encode: `encode(x_BHTD, state, *, key=None) -> (node, residual_BHTD, state)`; `node` is
            what must be stored, `residual_BHTD` is float32 and relative to the *stored* values.
        decode: `decode(node, residual_BHTD) -> x_BHTD`, float32, the inverse of `encode`.
        nbytes: `nbytes(shape) -> int`, the bytes of `node`.
        name: what reports call it.
        storage: what `node` holds, for kernels, or the phrase that names it; None is the name.
        isometric: whether the residual's differences are those of the span, so that the deficit of
            what follows is the deficit of the whole.
        spec: the factory and the settings that made the smoothing; None if it was made by hand.
    """

    init: Init
    encode: Smooth
    decode: Restore
    nbytes: Callable[[Shape], int]
    name: str
    storage: Centroids | str | None = None
    isometric: bool = True
    spec: Spec | None = dataclasses.field(default=None, init=False)

    def checked(self) -> "Smoothing":
        """The same smoothing, whose `encode` and `decode` name arguments of another kind."""
        encode, decode = checked_encode(self.encode), checked_decode(self.decode)
        return dataclasses.replace(self, encode=encode, decode=decode)


class IdentityPacked(NamedTuple):
    """The packed form of `identity`: the values themselves."""

    values_BHTD: Float[Array, "B H T D"]


def check_span(shape: Shape, dtype: Any = jnp.float32) -> None:
    """Raises ValueError unless `shape` is (B, H, T, D) with every axis > 0 and `dtype` floats.

    Raises:
        TypeError: `shape` is no tuple or list of integers.
    """
    if not isinstance(shape, tuple | list) or not all(isinstance(n, Integral) for n in shape):
        raise wrong_kind("shape", shape, "(B, H, T, D), such as x.shape")
    if len(shape) != 4:
        raise ValueError(f"shape={tuple(shape)} has rank {len(shape)}; accepted: (B, H, T, D)")
    if any(n < 1 for n in shape):
        raise ValueError(f"shape={tuple(shape)} has an empty axis; accepted: B, H, T, D >= 1")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={jnp.dtype(dtype).name} is not accepted: give floating point")


def per_element(nbytes: Callable[[Shape], int]) -> Callable[[Shape], float]:
    """Returns the function of a shape that gives bits per element: 8 * nbytes(shape) / prod(shape)."""

    def bits_per_element(shape: Shape) -> float:
        return 8 * nbytes(shape) / math.prod(shape)

    return bits_per_element


@factory
def identity(dtype: FormatLike = "bf16") -> Codec:
    """Returns the codec that only stores: x is rounded to `dtype` and nothing else happens.

    "No compression" is a codec and not a special case, so the plain cache and the compressed
    cache run the same code.

    Args:
        dtype: floating dtype of the stored values.

    Returns:
        A stateless codec with `8 * itemsize` bits per element.

    Raises:
        ValueError: `dtype` is not floating point.
    """
    name, stored = format_name(dtype), dtype_of(dtype)
    if not jnp.issubdtype(stored, jnp.floating):
        raise ValueError(f"dtype={stored.name} is not accepted: give a floating point dtype")

    def init(shape: Shape, x_dtype: Any = jnp.bfloat16) -> EmptyState:
        check_span(shape, x_dtype)
        return EmptyState()

    def encode(x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None):
        del key
        check_span(x_BHTD.shape, x_BHTD.dtype)
        return IdentityPacked(x_BHTD.astype(stored)), state

    def decode(packed: IdentityPacked, dtype: Any = jnp.bfloat16) -> Array:
        return packed.values_BHTD.astype(dtype)

    def nbytes(shape: Shape) -> int:
        check_span(shape)
        return math.prod(shape) * stored.itemsize

    def deficit(packed: IdentityPacked) -> Array:
        return jnp.zeros(packed.values_BHTD.shape[:3], jnp.float32)

    storage = Storage(Values(name))
    return Codec(init, encode, decode, per_element(nbytes), name, nbytes, storage, deficit)
