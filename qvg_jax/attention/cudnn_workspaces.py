"""Workspaces of the path through cuDNN: keys and values of some tokens, as one call reads them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qvg_jax.attention.flash import split
from qvg_jax.attention.stored import decoded_span, near_keys, read_dense
from qvg_jax.attention.workspaces import of_spans
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.rope import Encodings, Rope
from qvg_jax.cache.view import CacheView

__all__ = ["MEASURED", "Keys", "Reader", "Workspaces", "behind", "joined"]


@dataclasses.dataclass(frozen=True)
class Workspaces:
    """How large the workspaces of a call of cuDNN are, and what decodes into them; results differ by rounding only.

    Attributes:
        dense_bytes: K and V of sink and window. All of them are rotated, the empty ones too.
        span_bytes: K and V of spans; one span is always allowed.
        parts: into how many parts the keys of a call are split; None chooses (`parts_for`).
        decoder: what decodes spans: "xla"; "triton", which rotates keys and fills the workspace in the
            same pass; or "reference", which computes what "triton" does on any device.
    """

    dense_bytes: int = 2**26
    span_bytes: int = 2**28
    parts: int | None = None
    decoder: str = "xla"


MEASURED = Workspaces()


class Keys(NamedTuple):
    """Keys and values of one call, as attention multiplies them."""

    k_BHTD: Array
    v_BHTD: Array
    valid: (
        Array | int
    )  # tokens that count, the first ones; of each video (B,) where padding is hidden
    parts: int  # into how many the tokens are split; it divides their number


class Reader:
    """Workspaces of one layer: valid tokens first, then tokens that do not count.

    Those are finite: an unused slot may hold NaN, and a weight of zero times NaN is NaN.
    """

    def __init__(
        self,
        view: CacheView,
        layer: Array,
        q_nQD: Array,
        new: tuple[Array, Array] | None,
        sizes: Workspaces,
    ):
        """A reader for queries q_nQD; `new` are keys before RoPE and values that join one workspace."""
        lay: Layout = view.cache.layout
        self.view, self.layer, self.q_nQD, self.parts = view, layer, q_nQD, sizes.parts
        self.new, self.new_tokens = new, 0 if new is None else new[0].shape[2]
        token = 2 * lay.batch * view.heads * lay.head_dim * q_nQD.dtype.itemsize
        self.near = view.only is not None and not view.only.history
        self.num_spans = view.cache.num_spans if view.reads_spans else jnp.zeros((), jnp.int32)
        blocks = lay.sink_blocks + lay.history.local_blocks if self.near else lay.dense_blocks
        self.dense_tokens = blocks * lay.block_tokens
        # Near keys are few, and all of them are one part.
        bytes_of_all = 0 if self.near else self.dense_tokens * token
        self.dense_parts = max(1, -(-bytes_of_all // sizes.dense_bytes))
        self.part_tokens = -(-self.dense_tokens // self.dense_parts)
        self.at_once = 1
        if lay.max_spans:
            most = min(lay.max_spans, max(1, sizes.span_bytes // (token * lay.span_tokens)))
            groups = -(-lay.max_spans // most)
            self.at_once = -(-lay.max_spans // groups)  # groups of nearly equal size
        self.read, self.turned = None, None
        if sizes.decoder != "xla" and view.reads_spans:
            self.read = of_spans(view, layer, jnp.bfloat16, sizes.decoder)
            self.turned = None if new is None else (view.new(new[0]), new[1])

    def valid_parts(self) -> Array:
        """Parts of sink and window to visit: those that hold a token, or the first for the new block."""
        cache, size = self.view.cache, self.part_tokens
        parts = (cache.dense_tokens + size - 1) // size if size else jnp.zeros_like(self.num_spans)
        if self.near:
            parts = jnp.minimum(parts, 1)
        if self.new is None:
            return parts
        return jnp.where(self.num_spans > 0, parts, jnp.maximum(parts, 1))

    def valid_groups(self) -> Array:
        """The number of groups that hold a valid span."""
        return (self.num_spans + self.at_once - 1) // self.at_once

    def dense(self, i: Array) -> Keys:
        """Part i of sink and window; the first with the new block if there are no spans."""
        view = self.view
        if self.near:
            k_BHTD, v_BHTD, table, counts_BT = near_keys(view, self.layer, self.q_nQD.dtype)
            stored, valid = (k_BHTD, v_BHTD, table), counts_BT[0].sum(dtype=jnp.int32)
            if view.cache.dense_valid is not None:
                stored, valid = _real_first(stored, counts_BT)
            return self._keys(*stored, valid, i == 0)
        size, total = self.part_tokens, self.dense_tokens
        # The last part is moved back to stay inside the buffer, and what it repeats is moved out of it.
        wanted = i * size
        start = jnp.minimum(wanted, total - size)
        valid = jnp.clip(view.cache.dense_tokens - wanted, 0, size)

        def valid_first(x: Array, axis: int) -> Array:
            if total % size:
                x = joined([x], 2 * size, axis)
                x = lax.dynamic_slice_in_dim(x, wanted - start, size, axis)
            form = [1] * x.ndim
            form[axis] = size
            return jnp.where((jnp.arange(size) < valid).reshape(form), x, 0)

        def read(buffer: Array) -> Array:
            x_BHTD = read_dense(view, buffer, self.layer, start, size)
            return valid_first(x_BHTD, 2).astype(self.q_nQD.dtype)

        table = jax.tree.map(lambda t: valid_first(t, 1), view.dense_table(start, size))
        joins = (i == 0) & (self.num_spans == 0)
        stored = read(view.cache.dense_k), read(view.cache.dense_v), table
        if view.cache.dense_valid is not None:
            counts_BT = lax.dynamic_slice_in_dim(view.cache.dense_valid, start, size, 1)
            stored, valid = _real_first(stored, valid_first(counts_BT, 1))
        return self._keys(*stored, valid, joins)

    def spans(self, i: Array) -> Keys:
        """Group i of the spans, the oldest first; the first with the new block."""
        cache, lay, first = self.view.cache, self.view.cache.layout, i * self.at_once
        count = jnp.clip(self.num_spans - first, 0, self.at_once)
        # In place of spans that do not exist the last one is read again, and does not count.
        span_N = first + jnp.minimum(jnp.arange(self.at_once), jnp.maximum(count - 1, 0))
        slot_N = (cache.first_span + span_N) % lay.max_spans
        valid = count * lay.span_tokens
        if self.read is not None:
            return self._by_kernels(slot_N if self.at_once > 1 else slot_N[0], valid, i == 0)
        stored = self._stored(slot_N)
        if cache.span_valid is not None:
            counts_BT = behind(cache.span_valid[slot_N], 1)
            here = (jnp.arange(counts_BT.shape[1]) < valid)[None]
            stored, valid = _real_first(stored, counts_BT & here)
        return self._keys(*stored, valid, i == 0)

    def _keys(self, k_BHTD: Array, v_BHTD: Array, table: Any, valid: Array, joins: Array) -> Keys:
        """Workspace of stored keys and values, the new block behind the valid ones if it joins."""
        view = self.view
        if isinstance(view.rope, Encodings):
            # An encoding reads each channel more than once; without the barrier XLA decodes it again.
            k_BHTD, v_BHTD = lax.optimization_barrier((k_BHTD, v_BHTD))
            k_BHTD, v_BHTD = view.keys(k_BHTD, table), view.values(v_BHTD, table)
        size = k_BHTD.shape[2] + self.new_tokens
        parts, room = split(*self.q_nQD.shape[:2], size, self.parts)

        def placed(x: Array, new: Array | None, axis: int = 2) -> Array:
            x = joined([x], room, axis)
            return x if new is None else lax.dynamic_update_slice_in_dim(x, new, valid, axis)

        k_new_BHTD, v_new_BHTD = self.new or (None, None)
        k_BHTD, v_BHTD = placed(k_BHTD, k_new_BHTD), placed(v_BHTD, v_new_BHTD)
        if isinstance(view.rope, Rope):
            if self.new is not None:
                table = jax.tree.map(lambda t, n: placed(t, n, 1), table, view.table_new)
            elif room > size:
                table = jax.tree.map(lambda t: placed(t, None, 1), table)
            table = lax.optimization_barrier(table)
            # Rotation reads each channel twice; without the barrier XLA decodes it twice.
            k_BHTD = view.keys(lax.optimization_barrier(k_BHTD), table)
        return Keys(k_BHTD, v_BHTD, valid + jnp.where(joins, self.new_tokens, 0), parts)

    def _by_kernels(self, slot: Array, valid: Array, joins: Array) -> Keys:
        """Workspace of spans that kernels decode and rotate into it, the new block behind the valid ones."""
        view = self.view
        size = self.at_once * view.cache.layout.span_tokens + self.new_tokens
        parts, room = split(*self.q_nQD.shape[:2], size, self.parts)
        _, k_nWD, v_nWD = self.read(slot, valid, width=room)
        if self.turned is not None:  # in place, as nothing else reads what kernels wrote
            k_nTD, v_nTD = (x.reshape(k_nWD.shape[0], *x.shape[2:]) for x in self.turned)
            k_nWD = lax.dynamic_update_slice_in_dim(k_nWD, k_nTD, valid, 1)
            v_nWD = lax.dynamic_update_slice_in_dim(v_nWD, v_nTD, valid, 1)
        k_BHTD, v_BHTD = (x.reshape(-1, view.heads, *x.shape[1:]) for x in (k_nWD, v_nWD))
        return Keys(k_BHTD, v_BHTD, valid + jnp.where(joins, self.new_tokens, 0), parts)

    def _stored(self, slot_N: Array) -> tuple[Array, Array, Any]:
        """Keys and values of spans behind each other as their codecs give them, and their rope table."""
        view = self.view

        def one(slot: Array) -> tuple[Array, Array, Any]:
            k, v = decoded_span(view, self.layer, slot, self.q_nQD.dtype)
            return k, v, None if view.rope is None else view.span_table(slot)

        if self.at_once == 1:  # a vectorized slice is a gather, for which XLA may copy
            return one(slot_N[0])
        k, v, table = jax.vmap(one)(slot_N)
        return behind(k, 2), behind(v, 2), jax.tree.map(lambda t: behind(t, 1), table)


def _real_first(
    stored: tuple[Array, Array, Any], counts_BT: Array
) -> tuple[tuple[Array, Array, Any], Array]:
    """Keys, values and rope table with the tokens that count in front, and their number in each video.

    cuDNN reads the first keys of a row, and softmax does not care about their order.
    """
    order_BT = jnp.argsort(~counts_BT, axis=1, stable=True)

    def sorted_by(x: Array, axis: int) -> Array:
        form = [1] * x.ndim
        form[0], form[axis] = order_BT.shape
        return jnp.take_along_axis(x, order_BT.reshape(form), axis)

    k_BHTD, v_BHTD, table = stored
    table = jax.tree.map(lambda t: sorted_by(t, 1), table)
    found = sorted_by(k_BHTD, 2), sorted_by(v_BHTD, 2), table
    return found, counts_BT.sum(1, dtype=jnp.int32)


def behind(x_N: Array, axis: int) -> Array:
    """The arrays x_N[0], x_N[1], ... concatenated along their own `axis`."""
    x = jnp.moveaxis(x_N, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def joined(arrays: Sequence[Array], tokens: int, axis: int = 2) -> Array:
    """The arrays behind each other along `axis`, with zeros up to `tokens`."""
    form = list(arrays[0].shape)
    form[axis] = tokens - sum(x.shape[axis] for x in arrays)
    zeros = [jnp.zeros(form, arrays[0].dtype)] if form[axis] else []
    return jnp.concatenate([*arrays, *zeros], axis) if len(arrays) + len(zeros) > 1 else arrays[0]
