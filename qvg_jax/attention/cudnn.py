"""attend through cuDNN: XLA decodes and rotates some keys and values, cuDNN attends to them.

The keys of a call lie in one workspace of bounded size: the new block with the first tokens of sink and
window, or more tokens of those, or a few spans. `flash` merges the results of the calls.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qvg_jax.attention.features import PLAIN, Features
from qvg_jax.attention.flash import BACKENDS, Softmax, no_keys, split, visit
from qvg_jax.attention.stored import decoded_span, near_keys, read_dense
from qvg_jax.attention.xla import attend_new_block
from qvg_jax.backends import capability, on_several_devices
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.rope import Encodings, Rope
from qvg_jax.cache.view import CacheView

__all__ = ["Workspaces", "attend_cudnn", "unsupported"]


@dataclasses.dataclass(frozen=True)
class Workspaces:
    """Sizes of what one call of cuDNN reads; results differ by rounding only.

    Attributes:
        dense_bytes: K and V of sink and window. All of them are rotated, the empty ones too.
        span_bytes: K and V of spans; one span is always allowed.
        parts: into how many parts the keys of a call are split; None chooses (`parts_for`).
    """

    dense_bytes: int = 2**26
    span_bytes: int = 2**28
    parts: int | None = None


def unsupported(view: CacheView, q_BTHD: Array, features: Features = PLAIN) -> str | None:
    """The reason why cuDNN cannot serve a call, or None if it can."""
    if features.softcap is not None:
        return f"softcap={features.softcap}; cuDNN attends to plain logits"
    lay: Layout = view.cache.layout
    if q_BTHD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q has dtype {q_BTHD.dtype}; cuDNN reads bfloat16 and float16"
    found = capability()
    widest = 128 if found is not None and found < (9, 0) else 256
    if lay.head_dim % 8 or lay.head_dim > widest:
        return f"head_dim={lay.head_dim}; cuDNN reads multiples of 8 up to {widest} on this device"
    if lay.key_bias is not None and lay.key_bias.factor:
        factor = lay.key_bias.factor
        return f"key_bias factor={factor}; with cuDNN only factor=0 is served, with any offset"
    if (why := on_several_devices(q_BTHD)) is not None:
        return why
    if found is None or found < (8, 0):
        device = jax.devices()[0]
        name = f"{device.platform} {getattr(device, 'compute_capability', '')}".strip()
        return f"the default device is {name}; cuDNN needs a GPU of compute capability 8.0 or more"
    return None


def attend_cudnn(
    q_BTHD: Float[Array, "R T Hq D"],
    view: CacheView,
    k_BTHD: Float[Array, "R T H D"],
    v_BTHD: Float[Array, "R T H D"],
    layer: Int[Array, ""],
    scale: Float[Array, ""],
    features: Features = PLAIN,
    *,
    backend: str = "cudnn",
    workspaces: Workspaces = Workspaces(),
) -> tuple[Float[Array, "R T Hq D"], Float[Array, "R T Hq"] | None]:
    """Output and log-sum-exp of `attend` through cuDNN, for calls that are not `unsupported`.

    XLA attends to a new block of which not all is seen, and its result is one of those that are merged.

    Args:
        q_BTHD, view, k_BTHD, v_BTHD, layer, scale: as in `attend`; `layer` and `scale` are arrays.
        features: of the call.
        backend: "cudnn", or "xla" for the same path anywhere and in any floating dtype.
        workspaces: sizes of the calls.

    Returns:
        The attention output in q's dtype, and the log-sum-exp if the features need it.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not accepted: give one of {tuple(BACKENDS)}")
    lay: Layout = view.cache.layout
    batches, tokens, query_heads = q_BTHD.shape[:3]
    branches, group = batches // lay.batch, query_heads // view.heads
    rows = lay.batch * view.heads

    q_BHTD, k_BHTD, v_BHTD = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    k_BHTD, v_BHTD = k_BHTD.astype(q_BTHD.dtype), v_BHTD.astype(q_BTHD.dtype)
    q_BHTD = view.new(q_BHTD)
    # cuDNN's scale is a constant of the program. For the usual scale the factor is one, and exact.
    factor = scale.astype(jnp.float32) * math.sqrt(lay.head_dim)
    q_BHTD = (q_BHTD.astype(jnp.float32) * factor).astype(q_BTHD.dtype)
    # A key-value head is a row: query heads that share it are more queries, and so are branches.
    q_RBHGTD = q_BHTD.reshape(branches, lay.batch, view.heads, group, tokens, lay.head_dim)
    q_nQD = jnp.moveaxis(q_RBHGTD, 0, 2).reshape(rows, -1, lay.head_dim)

    # The new block shares a call with the oldest spans, or else with the first part of sink and window. Not
    # where each branch has its own, nor where an offset is added to the logits of spans only, nor where
    # not all of it is seen or the valid tokens of rows end at different places.
    offset = 0.0 if lay.key_bias is None else lay.key_bias.offset
    by_xla = features.hides or not k_BHTD.shape[2]
    padded = lay.blocks == "padded"
    joins = branches == 1 and not offset and not by_xla and not padded
    new = (k_BHTD, v_BHTD) if joins else None
    reader = _Reader(view, layer, q_nQD, new, workspaces)

    def visit_keys(run: Softmax, keys: _Keys, offset: float = 0.0) -> Softmax:
        k_nSD, v_nSD = (x.reshape(rows, -1, lay.head_dim) for x in (keys.k_BHTD, keys.v_BHTD))
        parts = dict(parts=keys.parts, backend=backend, offset=offset)
        valid = jnp.repeat(keys.valid, view.heads) if padded else keys.valid
        return visit(run, q_nQD, k_nSD, v_nSD, valid, **parts)

    if joins:
        run = no_keys(q_nQD)
    else:
        apart_nQD = q_RBHGTD.reshape(branches * rows, -1, lay.head_dim)
        k_BHTD = view.new(k_BHTD) if k_BHTD.shape[2] else k_BHTD
        if by_xla:
            apart_BHQD = apart_nQD.reshape(batches, view.heads, -1, lay.head_dim)
            of_cudnn = jnp.float32(1 / math.sqrt(lay.head_dim))
            found = attend_new_block(apart_BHQD, k_BHTD, v_BHTD, of_cudnn, features)
            run = Softmax(*(x.reshape(branches * rows, *x.shape[2:]) for x in found))
        else:
            parts, room = split(*apart_nQD.shape[:2], tokens, workspaces.parts)
            k_BHTD, v_BHTD = _joined([k_BHTD], room), _joined([v_BHTD], room)
            k_nSD, v_nSD = (x.reshape(branches * rows, -1, lay.head_dim) for x in (k_BHTD, v_BHTD))
            alone = dict(parts=parts, backend=backend)
            run = visit(no_keys(apart_nQD), apart_nQD, k_nSD, v_nSD, tokens, **alone)
        run = Softmax(*(_behind(x.reshape(branches, rows, *x.shape[1:]), 1) for x in run))
    # Loops, also where there is at most one step: a loop that looks at a counter, and no condition, which
    # would become a node of a CUDA graph.
    if view.reads_spans:
        some = lambda i, run: visit_keys(run, reader.spans(i), offset)  # noqa: E731
        run = lax.fori_loop(0, reader.valid_groups(), some, run)
    part = lambda i, run: visit_keys(run, reader.dense(i))  # noqa: E731
    run = lax.fori_loop(0, reader.valid_parts(), part, run)

    out = run.out_nQD.reshape(lay.batch, view.heads, branches, group, tokens, lay.head_dim)
    out_RBTHGD = jnp.transpose(out, (2, 0, 4, 1, 3, 5))
    out_BTHD, lse_BTH = out_RBTHGD.reshape(q_BTHD.shape), None
    if features.needs_lse:
        lse = run.lse_nQ.reshape(out.shape[:5])
        lse_BTH = jnp.transpose(lse, (2, 0, 4, 1, 3)).reshape(q_BTHD.shape[:3])
    out_BTHD, lse_BTH = features.finished(out_BTHD, lse_BTH)
    return out_BTHD.astype(q_BTHD.dtype), lse_BTH


class _Keys(NamedTuple):
    """Keys and values of one call, as attention multiplies them."""

    k_BHTD: Array
    v_BHTD: Array
    valid: (
        Array | int
    )  # tokens that count, the first ones; of each video (B,) where padding is hidden
    parts: int  # into how many the tokens are split; it divides their number


class _Reader:
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

    def dense(self, i: Array) -> _Keys:
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
                x = _joined([x], 2 * size, axis)
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

    def spans(self, i: Array) -> _Keys:
        """Group i of the spans, the oldest first; the first with the new block."""
        cache, lay, first = self.view.cache, self.view.cache.layout, i * self.at_once
        count = jnp.clip(self.num_spans - first, 0, self.at_once)
        # In place of spans that do not exist the last one is read again, and does not count.
        span_N = first + jnp.minimum(jnp.arange(self.at_once), jnp.maximum(count - 1, 0))
        slot_N = (cache.first_span + span_N) % lay.max_spans
        stored, valid = self._stored(slot_N), count * lay.span_tokens
        if cache.span_valid is not None:
            counts_BT = _behind(cache.span_valid[slot_N], 1)
            here = (jnp.arange(counts_BT.shape[1]) < valid)[None]
            stored, valid = _real_first(stored, counts_BT & here)
        return self._keys(*stored, valid, i == 0)

    def _keys(self, k_BHTD: Array, v_BHTD: Array, table: Any, valid: Array, joins: Array) -> _Keys:
        """Workspace of stored keys and values, the new block behind the valid ones if it joins."""
        view = self.view
        if isinstance(view.rope, Encodings):
            # An encoding reads each channel more than once; without the barrier XLA decodes it again.
            k_BHTD, v_BHTD = lax.optimization_barrier((k_BHTD, v_BHTD))
            k_BHTD, v_BHTD = view.keys(k_BHTD, table), view.values(v_BHTD, table)
        size = k_BHTD.shape[2] + self.new_tokens
        parts, room = split(*self.q_nQD.shape[:2], size, self.parts)

        def placed(x: Array, new: Array | None, axis: int = 2) -> Array:
            x = _joined([x], room, axis)
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
        return _Keys(k_BHTD, v_BHTD, valid + jnp.where(joins, self.new_tokens, 0), parts)

    def _stored(self, slot_N: Array) -> tuple[Array, Array, Any]:
        """Keys and values of spans behind each other as their codecs give them, and their rope table."""
        view = self.view

        def one(slot: Array) -> tuple[Array, Array, Any]:
            k, v = decoded_span(view, self.layer, slot, self.q_nQD.dtype)
            return k, v, None if view.rope is None else view.span_table(slot)

        if self.at_once == 1:  # a vectorized slice is a gather, for which XLA may copy
            return one(slot_N[0])
        k, v, table = jax.vmap(one)(slot_N)
        return _behind(k, 2), _behind(v, 2), jax.tree.map(lambda t: _behind(t, 1), table)


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


def _behind(x_N: Array, axis: int) -> Array:
    """The arrays x_N[0], x_N[1], ... concatenated along their own `axis`."""
    x = jnp.moveaxis(x_N, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _joined(arrays: Sequence[Array], tokens: int, axis: int = 2) -> Array:
    """The arrays behind each other along `axis`, with zeros up to `tokens`."""
    form = list(arrays[0].shape)
    form[axis] = tokens - sum(x.shape[axis] for x in arrays)
    zeros = [jnp.zeros(form, arrays[0].dtype)] if form[axis] else []
    return jnp.concatenate([*arrays, *zeros], axis) if len(arrays) + len(zeros) > 1 else arrays[0]
