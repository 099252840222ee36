"""Cases of the attention benchmark: shapes, caches full of random codes, and other ways to read them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qvg_jax.attention.api import attend
from qvg_jax.attention.cudnn import Workspaces, attend_cudnn
from qvg_jax.attention.kernel_plan import MEASURED, SPAN_BY_SPAN, Plan
from qvg_jax.attention.kernels import attend_kernels
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.rope import Rope, axial_rope, frequency_ladder
from qvg_jax.cache.slots import read_slot
from qvg_jax.codecs import presets

__all__ = ["BETWEEN", "DECODE", "FEW", "PLANS", "READS", "ROWS", "Row", "inputs", "noise"]


@functools.cache
def rope(head_dim: int) -> Rope:
    """RoPE of three axes: 44, 42 and 42 channels of 128, or the like of another head dim."""
    side = head_dim // 6 * 2
    return axial_rope([frequency_ladder(n) for n in (head_dim - 2 * side, side, side)])


# (heads, tokens) of one layer's span in LongCat, Self-Forcing.
DECODE = ((32, 29_640), (12, 37_440))


@dataclasses.dataclass(frozen=True)
class Row:
    """One attention call: `queries` new tokens against themselves and `spans` spans."""

    name: str
    heads: int
    queries: int
    span_tokens: int
    spans: int
    head_dim: int = 128

    @property
    def keys(self) -> int:
        """Keys that every query sees."""
        return self.spans * self.span_tokens + self.queries

    @property
    def dense_keys(self) -> int:
        """Keys of the uncompressed opponent: `keys`, of few queries rounded up to what cuDNN takes."""
        return -(-self.keys // 64) * 64 if self in FEW else self.keys

    @property
    def flops(self) -> int:
        """Floating-point operations of the two matrix products."""
        return 4 * self.heads * self.queries * self.keys * self.head_dim


# What a decoder of tokens asks.
FEW = tuple(
    Row(f"{t} queries, {name}", 12, t, tokens, spans)
    for name, tokens, spans in (("16k", 16_384, 1), ("131k", 32_768, 4))
    for t in (1, 4, 16)
)

ROWS = (
    Row("self-forcing", 12, 4_680, 37_440, 3),
    Row("longcat", 32, 7_800, 37_440, 1),
    Row("worldplay", 24, 3_520, 42_240, 1),
    Row("few queries", 12, 256, 32_768, 4),
    Row("short history", 12, 4_680, 28_080, 1),
    Row("long history", 12, 4_680, 46_800, 6),
    *FEW,
    Row("64 channels", 24, 4_680, 37_440, 1, head_dim=64),
    Row("256 channels", 8, 4_680, 37_440, 1, head_dim=256),
)

# Between "few queries" and a video's: measured when they are named.
BETWEEN = tuple(Row(f"{t} queries", 12, t, 32_768, 4) for t in (64, 512, 1024, 2048))


def noise(shape: tuple[int, ...], seed: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Numbers of mean 0 and variance 1 from a hash of their index; compiles in no time."""
    i = jnp.zeros(shape, jnp.uint32)
    for axis, n in enumerate(shape):
        i = i * jnp.uint32(n) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    i = (i + jnp.uint32(seed * 7919 + 13)) * jnp.uint32(2654435761)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        i = (i ^ (i >> shift)) * jnp.uint32(factor)
    pair = (i & 0xFFFF).astype(jnp.float32) + (i >> 16).astype(jnp.float32)
    return ((pair / 65536 - 1) * 6**0.5).astype(dtype)


def inputs(row: Row, codec: Any = None) -> tuple[Any, ...]:
    """q, view, k and v of one layer; the spans of the cache hold random codes, its window is empty."""
    codec = presets.get("qvg") if codec is None else codec
    cache = KVCache.create(
        heads=row.heads,
        head_dim=row.head_dim,
        block_tokens=row.span_tokens // 8,
        sink_blocks=0,
        span_blocks=8,
        max_spans=row.spans,
        keep_recent=0,
        window_blocks=8,
        key_codec=codec,
        value_codec=codec,
    )

    @jax.jit
    def fill(cache):
        def one(x, seed):
            if x.dtype == jnp.uint8 and x.shape[-1] <= 8:  # e4m3 scales as bytes, near 0.3
                return (noise(x.shape, seed, jnp.float32) * 3 + 42).astype(jnp.uint8)
            if x.dtype == jnp.uint8:
                return (noise(x.shape, seed, jnp.float32) * 51 + 128).astype(jnp.uint8)
            if x.dtype == jnp.int8:
                return x
            return noise(x.shape, seed, x.dtype)

        spans = []
        for j, tree in enumerate((cache.span_k, cache.span_v)):
            leaves, form = jax.tree.flatten(tree)
            leaves = [one(x, 10 * j + i) for i, x in enumerate(leaves)]
            spans.append(jax.tree.unflatten(form, leaves))
        return dataclasses.replace(
            cache,
            span_k=spans[0],
            span_v=spans[1],
            span_pos=noise(cache.span_pos.shape, 30, jnp.float32) * 50,
            num_spans=jnp.int32(row.spans),
        )

    cache = fill(cache)
    q, k, v = (noise((1, row.queries, row.heads, row.head_dim), 40 + i) for i in range(3))
    here = noise((1, row.queries, 3), 50, jnp.float32) * 50
    view = jax.jit(lambda c, p: c.view(p, rope(row.head_dim)))(cache, here)
    return q, view, k, v


def _with(implementation: str) -> Any:
    return lambda q, view, k, v: attend(q, view, k, v, implementation=implementation)


def _planned(fp8: bool, plan: Plan) -> Any:
    """`attend` under another plan than its own."""
    return lambda q, view, k, v: attend_kernels(
        q, view, k, v, jnp.int32(0), jnp.float32(q.shape[-1] ** -0.5), fp8=fp8, plan=plan
    )


def _by_cudnn(**sizes: Any) -> Any:
    """`attend` through cuDNN with other workspaces than its own."""
    return lambda q, view, k, v: attend_cudnn(
        q,
        view,
        k,
        v,
        jnp.int32(0),
        jnp.float32(q.shape[-1] ** -0.5),
        workspaces=Workspaces(**sizes),
    )[0]


def _whole_history(q, view, k, v):
    """Rotated queries, and all keys, rotated, and values, (B, T, H, D), as in an uncompressed cache."""
    cache, lay = view.cache, view.cache.layout
    keys, values = [_turn(view, k, view.table_new)], [v]
    for slot in range(lay.max_spans):
        packed_k, packed_v = (
            read_slot(x, jnp.int32(0), jnp.int32(slot)) for x in (cache.span_k, cache.span_v)
        )
        decoded = lay.key_codec.decode(packed_k, q.dtype).swapaxes(1, 2)
        keys.append(_turn(view, decoded, view.span_table(jnp.int32(slot))))
        values.append(lay.value_codec.decode(packed_v, q.dtype).swapaxes(1, 2))
    return _turn(view, q, view.table_new), *(jnp.concatenate(x, 1) for x in (keys, values))


def _turn(view, x_BTHD, table):
    return view.rope.rotate(x_BTHD.swapaxes(1, 2), table).swapaxes(1, 2)


def _official(q, view, k, v):
    """Attention as released integrations do it: K and V rebuilt in bf16, concatenated and rotated."""
    q, k, v = _whole_history(q, view, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


READS = {
    "mosaic_fp8": _with("mosaic_fp8"),
    "mosaic": _with("mosaic"),
    "cudnn": _with("cudnn"),
    "xla": _with("xla"),
    "official style": _official,
}
# What is measured when it is named: Triton, which not every machine has; the plan before, one change to it at a time,
# and more of the last one.
PLANS = {
    "triton": _with("triton"),
    "cudnn, Triton decodes": _by_cudnn(decoder="triton"),
    "cudnn, XLA decodes": _by_cudnn(decoder="xla"),
    "cudnn, Triton decodes, half a GB": _by_cudnn(decoder="triton", span_bytes=2**29),
    "fp8, span by span": _planned(True, SPAN_BY_SPAN),
    "bf16, span by span": _planned(False, SPAN_BY_SPAN),
    "fp8, even": _planned(True, Plan(even=True)),
    "fp8, straight": _planned(True, Plan(unrolled=8)),
    "fp8, even, straight": _planned(True, Plan(even=True, unrolled=8)),
    "fp8, half a GB": _planned(True, dataclasses.replace(MEASURED, workspace=2**29)),
    "bf16, half a GB": _planned(False, dataclasses.replace(MEASURED, workspace=2**29)),
}
