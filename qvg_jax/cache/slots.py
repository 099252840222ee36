"""Slots: packed spans of layers behind each other, leaves [L, N, ...], read and written singly.

Layers of one group (see `layer_codecs`) lie behind each other, in most caches all of them.

float8 leaves lie in their slots as bytes. XLA for CPU knows no float8 slices: it would convert a
whole buffer to float16, all layers and slots, to read or write one span of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qvg_jax.cache.layer_codecs import LayerCodecs, LayerGroup, groups_of, joined, parts_of
from qvg_jax.cache.layout import Layout
from qvg_jax.codecs.base import Codec

__all__ = [
    "Float8Bytes",
    "batch_leaves",
    "decode_slot",
    "empty_slots",
    "initial_states",
    "read_slot",
    "write_slot",
]


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


def empty_slots(lay: Layout, codec: Codec | LayerCodecs, dtype: Any) -> tuple[Any, Any]:
    """Zeroed slots [L, N, ...] of a codec, and its initial state for each layer [L, ...].

    Where layers are in several groups, a tuple of both for each group.

    Raises:
        ValueError: the codec refuses the span's shape, or does not keep the form of its state.
    """
    if not lay.max_spans:
        return None, None
    slots = []
    for one, layers, shape in groups_of(codec, lay):
        packed, before, after = _forms(one, shape, dtype)
        form = lambda x: (x.shape, x.dtype)  # noqa: E731
        if jax.tree.map(form, before) != jax.tree.map(form, after):
            raise ValueError(f"codec {one.name}: encode changes the shape or dtype of its state")
        room = (len(layers), lay.max_spans)
        slots.append(jax.tree.map(lambda p, r=room: jnp.zeros((*r, *p.shape), p.dtype), packed))
    return joined(codec, lay, slots), initial_states(lay, codec, dtype)


def initial_states(lay: Layout, codec: Codec | LayerCodecs, dtype: Any) -> Any:
    """What a codec starts from in each layer, leaves [L, ...]; None for a cache without slots."""
    if not lay.max_spans:
        return None
    states = []
    for one, layers, shape in groups_of(codec, lay):
        state = one.init(shape, dtype)
        copies = range(len(layers))
        states.append(
            jax.tree.map(
                lambda s, copies=copies: jnp.stack([jnp.asarray(s) for _ in copies]), state
            )
        )
    return joined(codec, lay, states)


def _forms(codec: Codec, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any, Any]:
    """Shapes and dtypes of a packed span as it is stored, and of the state before and after."""
    state = codec.init(shape, dtype)
    span = jax.ShapeDtypeStruct(shape, dtype)
    packed, after = jax.eval_shape(
        lambda x, s: codec.encode(x, s, key=jax.random.key(0)), span, state
    )
    return jax.eval_shape(_to_bytes, packed), jax.eval_shape(lambda s: s, state), after


def batch_leaves(lay: Layout, codec: Codec | LayerCodecs, dtype: Any) -> tuple[Any, Any]:
    """Whether each leaf of a packed span, and of a codec's state, has the batch as its first axis.

    Found from the shapes for one row more. A leaf that does not depend on the batch is of all rows.

    Raises:
        NotImplementedError: a codec that stores rows of the batch together.
    """

    def apart(one: Codec, shape: tuple[int, ...], longer: tuple[int, ...]) -> bool:
        if shape == longer:
            return False
        if shape[1:] == longer[1:] and (shape[0], longer[0]) == (lay.batch, lay.batch + 1):
            return True
        raise NotImplementedError(
            f"codec {one.name} stores rows of the batch together, in {shape}: none can be taken alone"
        )

    packed, states = [], []
    for one, _, shape in groups_of(codec, lay):
        more = (lay.batch + 1, *shape[1:])
        forms = _forms(one, shape, dtype)[:2], _forms(one, more, dtype)[:2]
        found = jax.tree.map(lambda a, b, one=one: apart(one, a.shape, b.shape), *forms)
        packed.append(found[0])
        states.append(found[1])
    return joined(codec, lay, packed), joined(codec, lay, states)


def read_slot(slots: Any, layer: Array, slot: Array) -> Any:
    """The packed span of one layer in one slot."""

    def read(x: Array) -> Array:
        return lax.dynamic_slice(x, _corner(x, layer, slot), (1, 1, *x.shape[2:]))[0, 0]

    return _from_bytes(jax.tree.map(read, slots))


def decode_slot(
    slots: Any,
    codec: Codec | LayerCodecs,
    lay: Layout,
    layer: Array,
    slot: Array,
    dtype: Any,
    heads: int | None = None,
) -> Array:
    """The span of one layer in one slot, decoded: (B, H, T, D).

    Args:
        slots: of the cache, all groups.
        codec, lay: of the cache; `codec` is that of keys or of values.
        layer, slot: which span.
        dtype: of the result.
        heads: the number of the layer's heads with a history, in a cache where that differs.
    """
    pairs = zip(groups_of(codec, lay), parts_of(codec, lay, slots), strict=True)
    pairs = [(g, part) for g, part in pairs if heads is None or g.shape[1] == heads]

    def decoder(group: LayerGroup, part: Any) -> Callable[[Array, Array], Array]:
        return lambda i, slot: group.codec.decode(read_slot(part, i, slot), dtype)

    if len(pairs) == 1 and pairs[0][0].layers == tuple(range(lay.layers)):
        return decoder(*pairs[0])(layer, slot)
    group, index = ([0] * lay.layers for _ in range(2))
    for g, (one, _) in enumerate(pairs):
        for i, l in enumerate(one.layers):
            group[l], index[l] = g, i
    group_L, index_L = jnp.asarray(group, jnp.int32), jnp.asarray(index, jnp.int32)
    decoders = [decoder(*pair) for pair in pairs]
    if len(decoders) == 1:
        return decoders[0](index_L[layer], slot)
    return lax.switch(group_L[layer], decoders, index_L[layer], slot)


def write_slot(
    slots: Any, layer: Array, slot: Array, packed: Any, store: Array | None = None
) -> Any:
    """The slots with one span of one layer replaced, unless `store` is False; in place where XLA may."""

    def write(x: Array, new: Array) -> Array:
        corner, new = _corner(x, layer, slot), new[None, None]
        if store is not None:
            new = jnp.where(store, new, lax.dynamic_slice(x, corner, new.shape))
        return lax.dynamic_update_slice(x, new, corner)

    return jax.tree.map(write, slots, _to_bytes(packed))


def _corner(x: Array, layer: Array, slot: Array) -> list[Array]:
    """Where a slot begins, all indices of one dtype: with `jax_enable_x64` numbers are int64."""
    return [jnp.asarray(i, jnp.int32) for i in (layer, slot, *[0] * (x.ndim - 2))]
