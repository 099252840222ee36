"""Attention by the GPU kernels: one running softmax over the new block, sink, window and spans.

Spans are decoded one or a few at a time into a workspace (`workspaces`), which one kernel attends to.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.dequant_attention import (
    Queries,
    Schedule,
    combine_splits,
    log_sum_exp,
    prepare_tokens,
    schedule_for,
    splits_for,
    visit,
)
from pallas_kernels.dequantize import HEAD_DIMS
from qvg_jax.attention.formats import scheme_of
from qvg_jax.attention.kernel_plan import MEASURED, SPAN_BY_SPAN, Plan
from qvg_jax.attention.new_block import NewBlock, new_block, rotation_of
from qvg_jax.attention.stored import near_keys
from qvg_jax.attention.workspaces import by_kernels, of_dense, of_near, of_spans, of_spans_by_xla
from qvg_jax.backends import num_sms, on_several_devices
from qvg_jax.cache.layer_codecs import LayerCodecs
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.view import CacheView

__all__ = ["attend_kernels", "undecodable", "unsupported"]


def unsupported(view: CacheView, q_BTHD: Array, fp8: bool) -> str | None:
    """The reason why the attention kernels cannot serve a call, or None if they can."""
    lay: Layout = view.cache.layout
    if lay.blocks == "padded":
        return "the cache has blocks='padded'; the kernels read padding too"
    for name, codec in (("key", lay.key_codec), ("value", lay.value_codec)):
        if isinstance(codec, LayerCodecs):
            return f"{name} codecs differ by layer; the kernels read one for all"
    if lay.head_dim not in HEAD_DIMS:
        return f"head_dim={lay.head_dim}; the kernels read {', '.join(map(str, HEAD_DIMS))}"
    for name, x in (("q", q_BTHD), ("the dense buffer", view.cache.dense_k)):
        if x.dtype != jnp.bfloat16:
            return f"{name} has dtype {x.dtype}; the kernels read bfloat16"
    if (why := on_several_devices(q_BTHD)) is not None:
        return why
    for name, codec in (("key", lay.key_codec), ("value", lay.value_codec)):
        if fp8 and lay.max_spans and scheme_of(codec, lay.head_dim, 1) is None:
            return f"{name} codec {codec.name}: e4m3 attention needs a bound that codes give"
    return None


def undecodable(view: CacheView) -> str | None:
    """The part of a codec that the kernels do not decode, or None if they decode keys and values."""
    lay: Layout = view.cache.layout
    for name, codec in (("key", lay.key_codec), ("value", lay.value_codec)):
        why = scheme_of(codec, lay.head_dim, 1) if lay.max_spans else None
        if isinstance(why, str) and isinstance(scheme_of(codec, lay.head_dim, 2), str):
            return f"the kernels do not decode the {name} codec {codec.name}: {why}"
    return None


@dataclasses.dataclass(frozen=True)
class _Call:
    """The constants of one call of `attend_kernels`, which all of its phases need.

    Attributes:
        view, layer: what is read.
        dtype: of spans and the new block in their workspace.
        plan: how kernel calls, memory and waiting are spent.
        implementation: of the kernels.
        kernels_read: whether kernels turn stored bytes into what attention reads, and XLA nothing.
        branches: videos of the queries for each video of the cache.
    """

    view: CacheView
    layer: Array
    dtype: Any
    plan: Plan
    implementation: str
    kernels_read: bool
    branches: int

    @property
    def layout(self) -> Layout:
        """The cache's layout."""
        return self.view.cache.layout

    @property
    def rows(self) -> int:
        """Key-value heads of all videos of the cache."""
        return self.layout.batch * self.view.heads

    @property
    def spans_at_once(self) -> int:
        """Spans of a group, which lie behind each other in a workspace."""
        if not self.kernels_read:
            return 1
        return self.plan.spans_at_once(self.layout, self.view.heads, self.dtype)

    @property
    def groups(self) -> int:
        """Groups of spans in a full cache, as far as the heads of the view read spans."""
        return -(-self.layout.max_spans // self.spans_at_once) if self.view.reads_spans else 0

    def slots_of(self, group: Any) -> tuple[Array, Array]:
        """The slots of a group of spans, and the number of its valid tokens."""
        cache, first, many = self.view.cache, group * self.spans_at_once, self.spans_at_once
        count = jnp.clip(cache.num_spans - first, 0, many)
        slot = (cache.first_span + first + jnp.arange(many)) % self.layout.max_spans
        return (slot if many > 1 else slot[0]), count * self.layout.span_tokens


def attend_kernels(
    q_BTHD: Array,
    view: CacheView,
    k_BTHD: Array,
    v_BTHD: Array,
    layer: Array,
    scale: Array,
    *,
    fp8: bool,
    implementation: str = "mosaic",
    plan: Plan = MEASURED,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """The output of `attend` by GPU kernels, for calls that are not `unsupported`.

    Spans are decoded into a workspace and merged into one running softmax. With `fp8` they and the
    new block are attended in e4m3; sink and window always in bf16, as nothing bounds their values but
    a pass over them. `plan` is for "mosaic". With `return_lse` the log-sum-exp comes too, as `attend`
    returns it.
    """
    lay: Layout = view.cache.layout
    branches = q_BTHD.shape[0] // lay.batch

    def prepared(batch: int, fp8: bool) -> tuple[Queries, Queries]:
        q, rotation = rotation_of(view, q_BTHD, batch)
        by = implementation if implementation == "mosaic" else "reference"  # which is XLA
        sizes = dict(batch=batch, heads=view.heads, fp8=fp8, implementation=by)
        return prepare_tokens(q, scale, rotation=rotation, **sizes)

    bf16_queries, queries = prepared(lay.batch, fp8)
    call = _Call(
        view=view,
        layer=layer,
        dtype=queries.q_nQD.dtype,
        plan=plan if implementation == "mosaic" else SPAN_BY_SPAN,
        implementation=implementation,
        kernels_read=by_kernels(view),
        branches=branches,
    )
    count = q_BTHD.shape[1] * q_BTHD.shape[0] * q_BTHD.shape[2] // call.rows
    splits = _splits(call, queries, count, k_BTHD.shape[1])
    by = dict(splits=splits, implementation=implementation)
    read = _reader(call)
    new = new_block(view, k_BTHD, v_BTHD, call.dtype, implementation)
    own = queries if branches == 1 else prepared(branches * lay.batch, fp8)[1]
    state, first_group = _visit_new_block(call, own, new, read, by)
    if branches > 1:  # each had a block of its own; all read the same cache
        state = _shared_state(state, branches, count, queries.q_nQD.shape[1])
    refs = [jax.new_ref(x) for x in state]
    _visit_dense(call, bf16_queries, refs, by)
    if read is not None:
        _visit_spans(call, queries, refs, read, by, first_group)
    left = [r[...] for r in refs], count, splits if isinstance(splits, Schedule) else None

    def by_query(x_nQE: Array) -> Array:
        x = x_nQE.reshape(lay.batch, view.heads, branches, -1, q_BTHD.shape[1], x_nQE.shape[-1])
        return jnp.transpose(x, (2, 0, 4, 1, 3, 5)).reshape(*q_BTHD.shape[:3], -1)

    out_BTHD = by_query(combine_splits(*left)).astype(q_BTHD.dtype)
    if not return_lse:
        return out_BTHD
    return out_BTHD, by_query(log_sum_exp(*left)[..., None])[..., 0]


def _splits(call: _Call, queries: Queries, count: int, new_tokens: int) -> int | Schedule:
    """The number of parts into which the keys of a visit are split, so that every multiprocessor has work."""
    fp8 = call.dtype != jnp.bfloat16
    typical = call.spans_at_once * call.layout.span_tokens if call.groups else new_tokens
    about = (typical, max(1, call.groups), fp8, num_sms())
    if call.plan.even and call.branches == 1:
        return schedule_for(call.rows * queries.q_nQD.shape[1] // 128, *about)
    return splits_for(call.rows, count, *about)


def _reader(call: _Call) -> Callable[..., Any] | None:
    """The function that brings spans into workspaces, None where there are none for the heads of the view.

    `read(slot, valid, new=None)` returns scales, keys and values.
    """
    if not call.view.reads_spans:
        return None
    make = of_spans if call.kernels_read else of_spans_by_xla
    return make(call.view, call.layer, call.dtype, call.implementation)


def _visit_new_block(
    call: _Call, queries: Queries, new: NewBlock, read: Callable[..., Any] | None, by: dict
) -> tuple[Any, int]:
    """The softmax state after the new block, and the first group of spans that is not in it.

    Where the plan allows it the new block lies behind the spans of the first group.
    """
    joined = call.plan.joined and call.branches == 1 and call.kernels_read
    if read is not None and joined and not call.layout.span_tokens % 16:
        slot, valid = call.slots_of(0)
        scales, k, v = read(slot, valid, new)
        state = visit(
            queries, k, v, valid + new.tokens, k_scale_n=scales[0], v_scale_n=scales[1], **by
        )
        return state, 1
    scales = new.scales
    k, v = new.workspace(scales)
    state = visit(queries, k, v, new.tokens, k_scale_n=scales[0], v_scale_n=scales[1], **by)
    return state, 0


def _shared_state(state: Any, branches: int, count: int, room: int) -> list[Array]:
    """The state of all branches as that of queries which read the same cache, padded to `room`."""
    state = [_joined(x[:, :, : count // branches], branches, 1) for x in state]
    more = room - count
    return [jnp.pad(x, ((0, 0), (0, 0), (0, more)) + ((0, 0),) * (x.ndim - 3)) for x in state]


def _visit_dense(call: _Call, queries: Queries, refs: list[Any], by: dict) -> None:
    """Attends to sink and window, or to what local heads read of them, in bf16."""
    only = call.view.only
    if only is not None and not only.history:
        near = near_keys(call.view, call.layer, jnp.bfloat16)
        if near.k_BHTD.shape[2]:
            k, v = of_near(call.view, near, call.implementation)
            visit(queries, k, v, near.valid, state=refs, **by)
        return
    valid = call.view.cache.dense_tokens
    for part in call.plan.dense_parts(call.layout, call.view.heads, call.dtype):
        in_part = jnp.clip(valid - part[0], 0, part[1])
        k, v = of_dense(call.view, call.layer, in_part, part, call.implementation)
        visit(queries, k, v, in_part, state=refs, **by)


def _visit_spans(
    call: _Call, queries: Queries, refs: list[Any], read: Callable[..., Any], by: dict, first: int
) -> None:
    """Attends to the groups of spans from `first` on."""

    def one(slot: Array, valid: Any) -> None:
        scales, k, v = read(slot, valid)
        visit(queries, k, v, valid, k_scale_n=scales[0], v_scale_n=scales[1], state=refs, **by)

    if call.kernels_read and call.groups <= call.plan.unrolled:
        for i in range(first, call.groups):
            one(*call.slots_of(i + _zero_after(refs)))
        return

    def step(i: Array, done: Array) -> Array:
        one(*call.slots_of(i))
        return done

    groups = -(-call.view.cache.num_spans // call.spans_at_once)
    lax.fori_loop(first, groups, step, jnp.int32(0))


def _zero_after(refs: list[Any]) -> Array:
    """Zero, known only when the visits so far are done.

    The next decoding depends on it. Otherwise XLA may decode several groups of spans before it visits
    the first, and keep them all.
    """
    m = refs[1][(0,) * refs[1].ndim]
    return (m > 1e37).astype(jnp.int32)


def _joined(x: Array, branches: int, axis: int = 0) -> Array:
    """The rows of all branches as more queries of one branch's rows: (R n, Q) to (n, R Q) at `axis`."""
    *before, _, queries = x.shape[: axis + 2]
    apart = x.reshape(*before, branches, -1, queries, *x.shape[axis + 2 :])
    rows = apart.shape[axis + 1]
    return jnp.swapaxes(apart, axis, axis + 1).reshape(*before, rows, -1, *x.shape[axis + 2 :])
