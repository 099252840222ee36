"""attend through cuDNN: XLA decodes and rotates some keys and values, cuDNN attends to them.

The keys of a call lie in one workspace of bounded size: the new block with the first tokens of sink and
window, or more tokens of those, or a few spans. `flash` merges the results of the calls.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qvg_jax.attention.flash import BACKENDS, Softmax, no_keys, visit
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.rope import Encodings
from qvg_jax.cache.slots import read_slot
from qvg_jax.cache.view import CacheView
from qvg_jax.capability import capability
from qvg_jax.devices import on_several_devices

__all__ = ["Workspaces", "attend_cudnn", "unsupported"]


@dataclasses.dataclass(frozen=True)
class Workspaces:
    """How much one call of cuDNN reads; results differ by rounding only.

    Attributes:
        dense_bytes: K and V of sink and window. All of them are rotated, the empty ones too.
        span_bytes: K and V of spans; one span is always allowed.
        parts: into how many parts the keys of a call are split; None chooses (`parts_for`).
    """

    dense_bytes: int = 2**26
    span_bytes: int = 2**28
    parts: int | None = None


def unsupported(view: CacheView, q_BTHD: Array) -> str | None:
    """Why cuDNN cannot serve this call, or None if it can."""
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
    *,
    backend: str = "cudnn",
    workspaces: Workspaces = Workspaces(),
) -> Float[Array, "R T Hq D"]:
    """`attend` for calls that are not `unsupported`.

    Args:
        q_BTHD, view, k_BTHD, v_BTHD, layer, scale: as in `attend`; `layer` and `scale` are arrays.
        backend: "cudnn", or "xla" for the same path anywhere and in any floating dtype.
        workspaces: sizes of the calls.

    Returns:
        The attention output in q's dtype.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not accepted: give one of {tuple(BACKENDS)}")
    lay: Layout = view.cache.layout
    batches, tokens, query_heads = q_BTHD.shape[:3]
    branches, group = batches // lay.batch, query_heads // view.heads
    rows = lay.batch * view.heads
    reader = _Reader(view, layer, q_BTHD.dtype, workspaces)
    call = functools.partial(visit, backend=backend, parts=workspaces.parts)

    q_BHTD, k_BHTD, v_BHTD = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    k_BHTD, v_BHTD = k_BHTD.astype(q_BTHD.dtype), v_BHTD.astype(q_BTHD.dtype)
    q_BHTD, k_BHTD = view.new(q_BHTD), view.new(k_BHTD)
    # cuDNN's scale is a constant of the program. For the usual scale the factor is one, and exact.
    factor = scale.astype(jnp.float32) * math.sqrt(lay.head_dim)
    q_BHTD = (q_BHTD.astype(jnp.float32) * factor).astype(q_BTHD.dtype)

    # A key-value head is a row: query heads that share it are more queries, and so are branches.
    sizes = (lay.batch, view.heads, group, tokens, lay.head_dim)
    q_RBHGTD = q_BHTD.reshape(branches, *sizes)
    q_nQD = jnp.moveaxis(q_RBHGTD, 0, 2).reshape(rows, -1, lay.head_dim)

    run = no_keys(q_nQD)
    first = 0  # part of sink and window
    if branches > 1:  # each branch has a new block of its own
        flat = lambda x: x.reshape(branches * rows, -1, lay.head_dim)  # noqa: E731
        apart = q_RBHGTD.reshape(branches * rows, -1, lay.head_dim)
        new = call(no_keys(apart), apart, flat(k_BHTD), flat(v_BHTD), tokens)
        run = Softmax(*(_side_by_side(x, branches) for x in new))
    else:
        # Together with the first part of sink and window: one call where a window is short.
        k_BHTD, v_BHTD, valid = reader.dense(0, k_BHTD, v_BHTD)
        run = call(run, q_nQD, _rows(k_BHTD), _rows(v_BHTD), valid)
        first = 1

    def dense(i: Array, run: Softmax) -> Softmax:
        k_BHTD, v_BHTD, valid = reader.dense(i)
        return call(run, q_nQD, _rows(k_BHTD), _rows(v_BHTD), valid)

    if first < reader.dense_parts:
        run = lax.fori_loop(first, jnp.maximum(reader.valid_parts(), first), dense, run)

    offset = 0.0 if lay.key_bias is None else lay.key_bias.offset

    def spans(i: Array, run: Softmax) -> Softmax:
        k_BHTD, v_BHTD, valid = reader.spans(i)
        return call(run, q_nQD, _rows(k_BHTD), _rows(v_BHTD), valid, offset=offset)

    if lay.max_spans:
        run = lax.fori_loop(0, reader.valid_groups(), spans, run)

    out = run.out_nQD.reshape(lay.batch, view.heads, branches, *sizes[2:])
    out_RBTHGD = jnp.transpose(out, (2, 0, 4, 1, 3, 5))
    return out_RBTHGD.reshape(q_BTHD.shape).astype(q_BTHD.dtype)


def _rows(x_BHTD: Array) -> Array:
    return x_BHTD.reshape(-1, *x_BHTD.shape[2:])


def _side_by_side(x: Array, branches: int) -> Array:
    """Queries of all branches' rows (R n, Q, ...) as queries of one row (n, R Q, ...)."""
    x_RnQ = x.reshape(branches, -1, *x.shape[1:])
    return jnp.moveaxis(x_RnQ, 0, 1).reshape(x_RnQ.shape[1], -1, *x.shape[2:])


class _Reader:
    """Keys and values of one layer as attention multiplies them: valid tokens first, then zeros.

    Zeros, because an unused slot may hold NaN, and a weight of zero times NaN is NaN.
    """

    def __init__(self, view: CacheView, layer: Array, dtype: Any, sizes: Workspaces):
        lay: Layout = view.cache.layout
        self.view, self.layer, self.dtype = view, layer, dtype
        token = 2 * lay.batch * view.heads * lay.head_dim * jnp.dtype(dtype).itemsize
        self.dense_tokens = lay.dense_blocks * lay.block_tokens
        self.dense_parts = -(-self.dense_tokens * token // sizes.dense_bytes)
        self.part_tokens = -(-self.dense_tokens // self.dense_parts)
        self.at_once = 1
        if lay.max_spans:
            most = min(lay.max_spans, max(1, sizes.span_bytes // (token * lay.span_tokens)))
            groups = -(-lay.max_spans // most)
            self.at_once = -(-lay.max_spans // groups)  # groups of nearly equal size

    def valid_parts(self) -> Array:
        """Parts of sink and window that hold a token."""
        valid = self.view.cache.dense_blocks * self.view.cache.layout.block_tokens
        return (valid + self.part_tokens - 1) // self.part_tokens

    def valid_groups(self) -> Array:
        """Groups of spans that hold one."""
        return (self.view.cache.num_spans + self.at_once - 1) // self.at_once

    def dense(
        self, i: Array | int, k_new_BHTD: Array | None = None, v_new_BHTD: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Keys, values and number of valid tokens of part i of sink and window, behind the new block."""
        view, lay = self.view, self.view.cache.layout
        size, total = self.part_tokens, self.dense_tokens
        # The last part is moved back to stay inside the buffer.
        wanted = jnp.asarray(i, jnp.int32) * size
        start = jnp.minimum(wanted, total - size)
        valid = jnp.clip(view.cache.dense_blocks * lay.block_tokens - wanted, 0, size)

        def read(buffer: Array) -> Array:
            corner, form = (
                (self.layer, 0, 0, start, 0),
                (1, lay.batch, lay.heads, size, lay.head_dim),
            )
            return lax.dynamic_slice(buffer, corner, form)[0].astype(self.dtype)

        table = view.dense_table(start, size)
        k_BHTD = view.keys(read(view.cache.dense_k), table)
        v_BHTD = view.values(read(view.cache.dense_v), table)
        if total % size:
            more = ((0, 0), (0, 0), (0, size), (0, 0))
            k_BHTD, v_BHTD = (
                lax.dynamic_slice_in_dim(jnp.pad(x, more), wanted - start, size, 2)
                for x in (k_BHTD, v_BHTD)
            )
        k_BHTD, v_BHTD = _zeros_behind(k_BHTD, valid), _zeros_behind(v_BHTD, valid)
        if k_new_BHTD is not None:
            k_BHTD = jnp.concatenate([k_new_BHTD, k_BHTD], 2)
            v_BHTD = jnp.concatenate([v_new_BHTD, v_BHTD], 2)
            valid += k_new_BHTD.shape[2]
        return k_BHTD, v_BHTD, valid

    def spans(self, i: Array) -> tuple[Array, Array, Array]:
        """Keys, values and number of valid tokens of group i of the spans, oldest first."""
        cache, lay, first = self.view.cache, self.view.cache.layout, i * self.at_once
        count = jnp.clip(cache.num_spans - first, 0, self.at_once)
        slot_N = (cache.first_span + first + jnp.arange(self.at_once)) % lay.max_spans
        if self.at_once == 1:  # a vectorized slice is a gather, for which XLA copies what it reads
            k_BHTD, v_BHTD = self._span(slot_N[0])
        else:
            both_NBHTD = jax.vmap(self._span)(slot_N)
            k_BHTD, v_BHTD = (
                jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, lay.head_dim) for x in both_NBHTD
            )
        valid = count * lay.span_tokens
        if self.at_once > 1:
            k_BHTD, v_BHTD = _zeros_behind(k_BHTD, valid), _zeros_behind(v_BHTD, valid)
        return k_BHTD, v_BHTD, valid

    def _span(self, slot: Array) -> tuple[Array, Array]:
        view, cache, lay = self.view, self.view.cache, self.view.cache.layout
        packed_k, packed_v = (read_slot(x, self.layer, slot) for x in (cache.span_k, cache.span_v))
        k_BHTD = lay.key_codec.decode(packed_k, self.dtype)
        v_BHTD = lay.value_codec.decode(packed_v, self.dtype)
        if view.rope is not None:
            table = view.span_table(slot)
            # Rotation reads each channel twice; without the barrier XLA decodes it twice.
            k_BHTD = view.keys(lax.optimization_barrier(k_BHTD), table)
            if isinstance(view.rope, Encodings):
                v_BHTD = view.values(lax.optimization_barrier(v_BHTD), table)
        return k_BHTD, v_BHTD


def _zeros_behind(x_BHTD: Array, valid: Array) -> Array:
    visible_T = jnp.arange(x_BHTD.shape[2]) < valid
    return jnp.where(visible_T[None, None, :, None], x_BHTD, 0)
