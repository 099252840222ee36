"""attend on the GPU kernels: from a cache view and a new block to one running softmax over all keys.

Spans are decoded one or a few at a time into a workspace (`workspaces`), which one kernel attends to.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.dequant_attention import (
    Schedule,
    combine_splits,
    prepare_tokens,
    schedule_for,
    splits_for,
    visit,
)
from pallas_kernels.dequantize import HEAD_DIMS
from qvg_jax.attention.formats import scheme_of
from qvg_jax.attention.kernel_plan import MEASURED, SPAN_BY_SPAN, Plan
from qvg_jax.attention.new_block import new_block, turning
from qvg_jax.attention.workspaces import by_kernels, of_dense, of_spans, of_spans_by_xla
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.view import CacheView
from qvg_jax.capability import processors
from qvg_jax.devices import is_hopper, on_several_devices

__all__ = ["attend_kernels", "is_hopper", "unsupported"]


def unsupported(
    view: CacheView, q_BTHD: Array, narrow: bool, implementation: str = "mosaic"
) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    lay: Layout = view.cache.layout
    if lay.head_dim not in HEAD_DIMS:
        return f"head_dim={lay.head_dim}; the kernels read {', '.join(map(str, HEAD_DIMS))}"
    for name, x in (("q", q_BTHD), ("the dense buffer", view.cache.dense_k)):
        if x.dtype != jnp.bfloat16:
            return f"{name} has dtype {x.dtype}; the kernels read bfloat16"
    if (why := on_several_devices(q_BTHD)) is not None:
        return why
    for name, codec in (("key", lay.key_codec), ("value", lay.value_codec)):
        if not narrow or not lay.max_spans:
            continue
        # All arguments, as elsewhere: they are the key under which a format is remembered.
        if scheme_of(codec, lay.head_dim, 1) is None:
            return f"{name} codec {codec.name}: e4m3 attention needs a bound that codes give"
    return None


def attend_kernels(
    q_BTHD: Array,
    view: CacheView,
    k_BTHD: Array,
    v_BTHD: Array,
    layer: Array,
    scale: Array,
    *,
    narrow: bool,
    implementation: str = "mosaic",
    plan: Plan = MEASURED,
) -> Array:
    """`attend` for what is not `unsupported`, by the kernels of `implementation`.

    Spans are decoded into a workspace and merged into one running softmax. If `narrow`, they and
    the new block are attended in e4m3; sink and window always in bf16, as nothing bounds their
    values but a pass over them. `plan` is for "mosaic".
    """
    plan = plan if implementation == "mosaic" else SPAN_BY_SPAN
    cache, lay = view.cache, view.cache.layout
    rows = lay.batch * view.heads
    branches = q_BTHD.shape[0] // lay.batch

    def prepared(batch: int, narrow: bool) -> Any:
        q, rotation = turning(view, q_BTHD, batch)
        by = implementation if implementation == "mosaic" else "reference"  # which is XLA
        here = dict(batch=batch, heads=view.heads, fp8=narrow, implementation=by)
        return prepare_tokens(q, scale, rotation=rotation, **here)

    wide, asked = prepared(lay.batch, narrow)
    queries = q_BTHD.shape[1] * q_BTHD.shape[0] * q_BTHD.shape[2] // rows
    dtype = asked.q_nQD.dtype

    kernels_read = by_kernels(view)
    at_once = plan.spans_at_once(lay, view.heads, dtype) if kernels_read else 1
    groups = -(-lay.max_spans // at_once)
    typical = at_once * lay.span_tokens if lay.max_spans else k_BTHD.shape[1]
    about = (typical, max(1, groups), narrow, processors())
    if plan.even and branches == 1:
        splits = schedule_for(rows * asked.q_nQD.shape[1] // 128, *about)
    else:
        splits = splits_for(rows, queries, *about)
    by = dict(splits=splits, implementation=implementation)

    read = None
    if lay.max_spans:
        read = (of_spans if kernels_read else of_spans_by_xla)(view, layer, dtype, implementation)

    def group(i: Any) -> tuple[Array, Array]:
        """Slots of a group of spans, and its valid tokens."""
        first = i * at_once
        count = jnp.clip(cache.num_spans - first, 0, at_once)
        slot = (cache.first_span + first + jnp.arange(at_once)) % lay.max_spans
        return (slot if at_once > 1 else slot[0]), count * lay.span_tokens

    new = new_block(view, k_BTHD, v_BTHD, dtype, implementation)
    joined = plan.joined and branches == 1 and kernels_read and lay.max_spans
    joined = joined and not lay.span_tokens % 16
    if joined:
        slot, valid = group(0)
        units, k, v = read(slot, valid, new)
        valid = valid + new.tokens
    else:
        units, valid = new.units, new.tokens
        k, v = new.workspace(units)
    own = asked if branches == 1 else prepared(branches * lay.batch, narrow)[1]
    state = visit(own, k, v, valid, k_scale_n=units[0], v_scale_n=units[1], **by)
    if branches > 1:  # each had a block of its own; all read the same cache
        state = [_joined(x[:, :, : queries // branches], branches, 1) for x in state]
        more = asked.q_nQD.shape[1] - queries
        state = [jnp.pad(x, ((0, 0), (0, 0), (0, more)) + ((0, 0),) * (x.ndim - 3)) for x in state]
    refs = [jax.new_ref(x) for x in state]

    valid = cache.dense_blocks * lay.block_tokens
    for part in plan.dense_parts(lay, view.heads, dtype):
        here = jnp.clip(valid - part[0], 0, part[1])
        k_dense, v_dense = of_dense(view, layer, here, part, implementation)
        visit(wide, k_dense, v_dense, here, state=refs, **by)

    if lay.max_spans:

        def some(slot: Array, valid: Any) -> None:
            units, k, v = read(slot, valid)
            visit(asked, k, v, valid, k_scale_n=units[0], v_scale_n=units[1], state=refs, **by)

        first = 1 if joined else 0
        straight = kernels_read and groups <= plan.unrolled
        if straight:
            for i in range(first, groups):
                some(*group(i + _zero_after(refs)))
        else:

            def several(i: Array, done: Array) -> Array:
                some(*group(i))
                return done

            lax.fori_loop(first, -(-cache.num_spans // at_once), several, jnp.int32(0))
    left = [r[...] for r in refs]
    out_nQD = combine_splits(left, queries, splits if isinstance(splits, Schedule) else None)
    out = out_nQD.reshape(lay.batch, view.heads, branches, -1, q_BTHD.shape[1], lay.head_dim)
    out_BTHD = jnp.transpose(out, (2, 0, 4, 1, 3, 5))
    return out_BTHD.reshape(q_BTHD.shape).astype(q_BTHD.dtype)


def _zero_after(refs: list[Any]) -> Array:
    """Zero, known only when the visits so far are done.

    What is decoded next depends on it. Otherwise XLA may decode several groups of spans before it
    visits the first, and keep them all.
    """
    top = refs[1][(0,) * refs[1].ndim]
    return (top > 1e37).astype(jnp.int32)


def _joined(x: Array, branches: int, axis: int = 0) -> Array:
    """Rows of all branches as more queries of a branch's rows: (R n, Q) to (n, R Q) at `axis`."""
    *before, _, queries = x.shape[: axis + 2]
    apart = x.reshape(*before, branches, -1, queries, *x.shape[axis + 2 :])
    rows = apart.shape[axis + 1]
    return jnp.swapaxes(apart, axis, axis + 1).reshape(*before, rows, -1, *x.shape[axis + 2 :])
