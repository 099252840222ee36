"""Slots: packed spans of all layers behind each other, leaves [L, N, ...], read and written singly.

float8 leaves lie in their slots as bytes. XLA for CPU knows no float8 slices: it would convert a
whole buffer to float16, all layers and slots, to read or write one span of it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qvg_jax.cache.layout import Layout
from qvg_jax.codecs.base import Codec

__all__ = ["Float8Bytes", "empty_slots", "read_slot", "write_slot"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8Bytes:
    """A float8 array as bytes that remember which float8 they are."""

    bytes_x: Any  # uint8, any shape
    dtype: Any = dataclasses.field(metadata=dict(static=True))


def _to_bytes(packed: Any) -> Any:
    def one(x: Array) -> Any:
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 1:
            return Float8Bytes(lax.bitcast_convert_type(x, jnp.uint8), x.dtype)
        return x

    return jax.tree.map(one, packed)


def _from_bytes(stored: Any) -> Any:
    def one(x: Any) -> Array:
        is_bytes = isinstance(x, Float8Bytes)
        return lax.bitcast_convert_type(x.bytes_x, x.dtype) if is_bytes else x

    return jax.tree.map(one, stored, is_leaf=lambda x: isinstance(x, Float8Bytes))


def empty_slots(lay: Layout, codec: Codec, dtype: Any) -> tuple[Any, Any]:
    """Zeroed slots [L, N, ...] of a codec, and its initial state for each layer [L, ...].

    Raises:
        ValueError: the codec refuses the span's shape, or does not keep the form of its state.
    """
    if not lay.max_spans:
        return None, None
    state = codec.init(lay.span_shape, dtype)
    span = jax.ShapeDtypeStruct(lay.span_shape, dtype)
    packed, after = jax.eval_shape(
        lambda x, s: codec.encode(x, s, key=jax.random.key(0)), span, state
    )
    before = jax.eval_shape(lambda s: s, state)
    form = lambda x: (x.shape, x.dtype)  # noqa: E731
    if jax.tree.map(form, before) != jax.tree.map(form, after):
        raise ValueError(f"codec {codec.name}: encode changes the shape or dtype of its state")
    slots = jax.tree.map(
        lambda p: jnp.zeros((lay.layers, lay.max_spans, *p.shape), p.dtype),
        jax.eval_shape(_to_bytes, packed),
    )
    return slots, jax.tree.map(lambda s: jnp.stack([jnp.asarray(s)] * lay.layers), state)


def read_slot(slots: Any, layer: Array, slot: Array) -> Any:
    """The packed span of one layer in one slot."""

    def read(x: Array) -> Array:
        return lax.dynamic_slice(x, _corner(x, layer, slot), (1, 1, *x.shape[2:]))[0, 0]

    return _from_bytes(jax.tree.map(read, slots))


def write_slot(slots: Any, layer: Array, slot: Array, packed: Any) -> Any:
    """The slots with one span of one layer replaced; in place where XLA may."""

    def write(x: Array, new: Array) -> Array:
        return lax.dynamic_update_slice(x, new[None, None], _corner(x, layer, slot))

    return jax.tree.map(write, slots, _to_bytes(packed))


def _corner(x: Array, layer: Array, slot: Array) -> list[Array]:
    """Where a slot begins, all indices of one dtype: with `jax_enable_x64` numbers are int64."""
    return [jnp.asarray(i, jnp.int32) for i in (layer, slot, *[0] * (x.ndim - 2))]
