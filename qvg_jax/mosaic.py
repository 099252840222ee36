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
    finish,
    join,
    prepare,
    schedule_for,
    splits_for,
    visit,
)
from qvg_jax.capability import processors
from qvg_jax.devices import is_hopper, on_several_devices
from qvg_jax.kernel_formats import E4M3, scheme_of
from qvg_jax.kernel_plan import MEASURED, SPAN_BY_SPAN, Plan
from qvg_jax.layout import Layout
from qvg_jax.view import CacheView
from qvg_jax.workspaces import by_kernels, of_dense, of_spans, of_spans_by_xla, of_tokens

__all__ = ["attend_kernels", "is_hopper", "unsupported"]


_HEAD_DIMS = (64, 128, 256)


def unsupported(
    view: CacheView, q_BTHD: Array, narrow: bool, implementation: str = "mosaic"
) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    lay: Layout = view.cache.layout
    if lay.head_dim not in _HEAD_DIMS:
        return f"head_dim={lay.head_dim}; the kernels read {', '.join(map(str, _HEAD_DIMS))}"
    for name, x in (("q", q_BTHD), ("the dense buffer", view.cache.dense_k)):
        if x.dtype != jnp.bfloat16:
            return f"{name} has dtype {x.dtype}; the kernels read bfloat16"
    if (why := on_several_devices(q_BTHD)) is not None:
        return why
    for name, codec in (("key", lay.key_codec), ("value", lay.value_codec)):
        if not narrow or not lay.max_spans:
            continue
        # All arguments, as elsewhere: they are the key under which a format is remembered.
        if scheme_of(codec, lay.head_dim, 1, implementation) is None:
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
    rows, bf16 = lay.batch * view.heads, jnp.bfloat16
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    q, k = view.new(q), view.new(k.astype(bf16))
    group, branches = q.shape[1] // view.heads, q.shape[0] // lay.batch
    own_mQD = q.reshape(branches * rows, -1, lay.head_dim)
    q_nQD = _joined(own_mQD, branches)
    queries = q_nQD.shape[1]
    wide = prepare(q_nQD, scale, bf16)
    asked = prepare(q_nQD, scale, E4M3) if narrow else wide
    dtype = asked.q_nQD.dtype

    kernels_read = by_kernels(view, implementation)
    at_once = plan.spans_at_once(lay, view.heads, dtype) if kernels_read else 1
    groups = -(-lay.max_spans // at_once)
    typical = at_once * lay.span_tokens if lay.max_spans else k.shape[2]
    about = (typical, max(1, groups), narrow, processors())
    if plan.even and branches == 1:
        splits = schedule_for(rows * asked.q_nQD.shape[1] // 128, *about)
    else:
        splits = splits_for(rows, queries, *about)
    by = dict(splits=splits, implementation=implementation)

    flat = lambda x: x.reshape(-1, *x.shape[-2:])  # noqa: E731
    units, k_new, v_new = of_tokens(
        flat(k), flat(v.astype(bf16)), k.shape[2], dtype, implementation
    )
    state = visit(
        asked if branches == 1 else prepare(own_mQD, scale, dtype),
        k_new, v_new, k.shape[2], k_unit_n=units[0], v_unit_n=units[1], **by,
    )  # fmt: skip
    if branches > 1:  # each had a block of its own; all read the same cache
        state = [_joined(x[:, :, : own_mQD.shape[1]], branches, 1) for x in state]
        more = asked.q_nQD.shape[1] - queries
        state = [jnp.pad(x, ((0, 0), (0, 0), (0, more)) + ((0, 0),) * (x.ndim - 3)) for x in state]
    refs = [jax.new_ref(x) for x in state]

    valid = cache.dense_blocks * lay.block_tokens
    for part in plan.dense_parts(lay, view.heads, dtype):
        here = jnp.clip(valid - part[0], 0, part[1])
        k_dense, v_dense = of_dense(view, layer, here, part, implementation)
        visit(wide, k_dense, v_dense, here, state=refs, **by)

    if lay.max_spans:
        read = (of_spans if kernels_read else of_spans_by_xla)(view, layer, dtype, implementation)

        def some(slot: Array, valid: Any) -> None:
            units, k_spans, v_spans = read(slot, valid)
            visit(
                asked, k_spans, v_spans, valid, k_unit_n=units[0], v_unit_n=units[1], state=refs,
                **by,
            )  # fmt: skip

        straight = kernels_read and groups <= plan.unrolled
        if at_once == 1 and not straight:

            def one(i: Array, done: Array) -> Array:
                some((cache.first_span + i) % lay.max_spans, lay.span_tokens)
                return done

            lax.fori_loop(0, cache.num_spans, one, jnp.int32(0))
        else:

            def several(i: Any, done: Any) -> Any:
                first = i * at_once + (_zero_after(refs) if straight else 0)
                count = jnp.clip(cache.num_spans - first, 0, at_once)
                slot = (cache.first_span + first + jnp.arange(at_once)) % lay.max_spans
                some(slot if at_once > 1 else slot[0], count * lay.span_tokens)
                return done

            if straight:
                for i in range(groups):
                    several(i, None)
            else:
                lax.fori_loop(0, -(-cache.num_spans // at_once), several, jnp.int32(0))
    left = [r[...] for r in refs]
    if isinstance(splits, Schedule):
        out_nQD = join(left, splits, rows, queries)
    else:
        out_nQD = finish(left, queries)
    out = out_nQD.reshape(lay.batch, view.heads, branches, group, -1, lay.head_dim)
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
