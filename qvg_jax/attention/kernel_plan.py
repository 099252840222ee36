"""Plans of `attend_kernels`: how many spans a kernel call reads, and in how much memory.

Results under different plans differ by rounding only.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.dequantize.types import padded
from qvg_jax.cache.layout import Layout

__all__ = ["MEASURED", "SPAN_BY_SPAN", "Plan"]

# Workspaces of this many bytes are always allowed: splitting less into chunks would not pay.
_LEAST_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Plan:
    """The order and size of the kernel calls of one attention call.

    Attributes:
        even: whether only the queries of the last wave of blocks share their keys
            (`pallas_kernels.dequant_attention.Schedule`); otherwise all share them.
        workspace: bytes of K and V of spans that are decoded and attended together; one span is
            always allowed.
        unrolled: up to how many groups of spans are a straight line of kernels, of which those
            without a valid span do nothing. More are a loop, in which the host asks the GPU before
            every step whether there is one.
        cut: whether sink and window come in parts of no more bytes than a span or `workspace`.
        joined: whether the new block lies behind the spans of the first group, and is attended with
            them, where kernels read those.
    """

    even: bool = False
    workspace: int = 0
    unrolled: int = 0
    cut: bool = False
    joined: bool = False

    def spans_at_once(self, lay: Layout, heads: int, dtype: jnp.dtype) -> int:
        """The number of spans of a group; spans that fill no whole sixteens of tokens go alone."""
        if lay.span_tokens % 16 or lay.max_spans < 2:
            return 1
        one = _bytes(lay, heads, lay.span_tokens, dtype)
        most = max(1, min(lay.max_spans, self.workspace // one))
        return -(-lay.max_spans // -(-lay.max_spans // most))  # groups of nearly equal size

    def dense_parts(self, lay: Layout, heads: int, dtype: jnp.dtype) -> list[tuple[int, int]]:
        """The first token and the number of tokens of each part of sink and window, read in bf16."""
        total = lay.dense_blocks * lay.block_tokens
        if not self.cut or not lay.max_spans:
            return [(0, total)]
        span = _bytes(lay, heads, padded(lay.span_tokens), dtype)
        token = _bytes(lay, heads, 1, jnp.bfloat16)
        size = padded(max(span, self.workspace, _LEAST_BYTES) // token)
        return [(start, min(size, total - start)) for start in range(0, total, size)]


def _bytes(lay: Layout, heads: int, tokens: int, dtype: jnp.dtype) -> int:
    return 2 * lay.batch * heads * tokens * lay.head_dim * jnp.dtype(dtype).itemsize


# The faster of the two on an H100 (pallas_kernels/README.md), and the one with the least memory.
MEASURED = Plan(even=True, workspace=2**28, unrolled=8, cut=True, joined=True)
SPAN_BY_SPAN = Plan()
