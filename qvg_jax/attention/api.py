"""attend: one softmax over sink, compressed spans, window and the new block.

The implementations are in `xla`, `cudnn` and `kernels`; `choice` says which of them serves a call.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qvg_jax.attention.choice import choose
from qvg_jax.attention.xla import attend_xla
from qvg_jax.backends import Candidate
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.rope import Encodings, Rope
from qvg_jax.cache.view import CacheView

__all__ = ["attend"]


def attend(
    q_BTHD: Float[Array, "B T Hq D"],
    cache: KVCache | CacheView,
    k_BTHD: Float[Array, "B T H D"],
    v_BTHD: Float[Array, "B T H D"],
    *,
    layer: int | Int[Array, ""] | None = None,
    positions: Float[Array, "B T P"] | Int[Array, "B T P"] | None = None,
    rope: Rope | Encodings | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str | None = None,
    precision: str | None = None,
) -> Float[Array, "B T Hq D"]:
    """Attention of a new block to everything in the cache and, both ways, to itself.

        o_BTHD = attend(q_BTHD, cache, k_BTHD, v_BTHD, positions=pos_BTP, rope=rope)

    A model of many layers makes one `cache.view(positions, rope)` for all of them and passes it
    in place of the cache. `layer` may be traced, so the layers can be one `lax.scan`; packed
    spans are read where they lie, and no layer is copied. Works in q's dtype with logits, sums
    and output accumulated in float32. Not differentiable in reverse (dynamic trip count).

    The batch of q, k and v may be R times the cache's B: row r B + b reads video b. So the two
    branches of guidance share a cache, and a span is decoded once for both.

    Args:
        q_BTHD: queries before RoPE; Hq is a multiple of the cache's H, and query head j reads
            key-value head j // (Hq / H).
        cache: the cache, or a view of it that brings positions and rope along.
        k_BTHD: the new block's keys before RoPE; any number of tokens.
        v_BTHD: the new block's values.
        layer: which layer of the cache; may be left out if it has one.
        positions: positions of the new tokens; only with a cache and a rope.
        rope: rotation of Q and K, or encodings of stored K and V (then H above is all of their
            heads); only with a cache. None is none.
        scale: factor of the logits; None is 1 / sqrt(D).
        implementation: "mosaic", kernels for Hopper GPUs that decode spans into a workspace; "cudnn",
            spans decoded by XLA and attended by cuDNN, for NVIDIA GPUs of compute capability 8.0 and
            more; "triton", kernels for the same GPUs, which need jax_triton; "xla", anywhere. None
            takes the first of these that serves the call, but "triton" only by name (`explain` says
            which, and why). A named one is never replaced: what it cannot read is an error.
            "mosaic_fp8" is an older name of "mosaic" in fp8.
        precision: precision of the matrix products: "bf16", or "fp8" with "mosaic", where spans and
            the new block are read in e4m3: faster, for an error small beside that of 2-bit codes.
            None is "bf16" on kernels and cuDNN, and the dtype of q on XLA.

    Returns:
        The attention output in q's dtype.

    Raises:
        ValueError: a shape that does not fit the cache, a missing layer, positions or rope
            beside a view, or an unknown implementation.
        NotImplementedError: a named implementation cannot serve this call; the message says why.
    """
    if isinstance(cache, CacheView):
        if positions is not None or rope is not None:
            raise ValueError("positions and rope belong to cache.view(...); leave them out here")
        view = cache
    else:
        view = cache.view(positions, rope, precompute=False)
    lay: Layout = view.cache.layout
    _check(lay, view.heads, q_BTHD, k_BTHD, v_BTHD, layer)
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    scale = jnp.float32(1 / math.sqrt(lay.head_dim) if scale is None else scale)
    chosen = choose(view, q_BTHD, implementation, precision).chosen
    return _attend(q_BTHD, view, k_BTHD, v_BTHD, layer, scale, chosen)


@functools.partial(jax.jit, static_argnames="chosen")
def _attend(
    q_BTHD: Array,
    view: CacheView,
    k_BTHD: Array,
    v_BTHD: Array,
    layer: Array,
    scale: Array,
    chosen: Candidate,
) -> Array:
    call = (q_BTHD, view, k_BTHD, v_BTHD, layer, scale)
    if chosen.implementation == "xla":
        return attend_xla(*call)
    if chosen.implementation == "cudnn":
        from qvg_jax.attention.cudnn import attend_cudnn

        return attend_cudnn(*call)
    from qvg_jax.attention.kernels import attend_kernels

    return attend_kernels(
        *call, fp8=chosen.precision == "fp8", implementation=chosen.implementation
    )


def _check(lay: Layout, heads: int, q: Array, k: Array, v: Array, layer: Any) -> None:
    if layer is None and lay.layers > 1:
        raise ValueError(f"layer=None; the cache has {lay.layers} layers: give an index below it")
    if isinstance(layer, int) and not 0 <= layer < lay.layers:
        raise ValueError(f"layer={layer} is not accepted: give 0 <= layer < {lay.layers}")
    rows, tokens = q.shape[:2] if q.ndim == 4 else (lay.batch, "T")
    for name, x in (("k", k), ("v", v)):
        want = (rows, tokens, heads, lay.head_dim)
        if x.shape != want:
            raise ValueError(f"{name} has shape {x.shape}; accepted: {want} (B, T, H, D)")
    fits = q.ndim == 4 and q.shape[0] and not q.shape[0] % lay.batch and q.shape[3] == lay.head_dim
    if not fits or q.shape[2] % heads:
        want = f"({lay.batch} or a multiple, T, a multiple of {heads}, {lay.head_dim})"
        raise ValueError(f"q has shape {q.shape}; accepted: {want} (B, T, Hq, D)")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q has dtype {q.dtype}; accepted: floating point")
