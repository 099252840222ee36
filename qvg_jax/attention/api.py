"""attend: one softmax over sink, compressed spans, window and the new block.

The implementations are in `xla`, `cudnn` and `kernels`; `choice` says which of them serves a call.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qvg_jax.attention.by_head import attend_by_head
from qvg_jax.attention.choice import choose
from qvg_jax.attention.features import Features, features_of
from qvg_jax.attention.spread import attend_on_devices
from qvg_jax.attention.xla import attend_xla
from qvg_jax.backends import Candidate
from qvg_jax.cache.arguments import check_cache
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.rope import Encodings, Rope
from qvg_jax.cache.view import CacheView
from qvg_jax.codecs.arguments import check_array
from qvg_jax.codecs.no_gradient import no_gradient

__all__ = ["attend"]

NO_GRADIENT = "how much of the cache is read is data, and no loop of such a length runs backwards"


def attend(
    q_BTHD: Float[Array, "B T Hq D"],
    cache: KVCache | CacheView,
    k_BTHD: Float[Array, "B T H D"] | None,
    v_BTHD: Float[Array, "B T H D"] | None,
    *,
    layer: int | Int[Array, ""] | None = None,
    positions: Float[Array, "B T P"] | Int[Array, "B T P"] | None = None,
    rope: Rope | Encodings | None = None,
    scale: float | Float[Array, ""] | None = None,
    causal: bool = False,
    mask: Bool[Array, "*B T T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " Hq"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    precision: str | None = None,
) -> Float[Array, "B T Hq D"] | tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """Attention of a new block to everything in the cache and, both ways or causally, to itself.

        o_BTHD = attend(q_BTHD, cache, k_BTHD, v_BTHD, positions=pos_BTP, rope=rope)

    A model of many layers makes one `cache.view(positions, rope)` for all of them and passes it
    in place of the cache. `layer` may be traced, so the layers can be one `lax.scan`; packed
    spans are read where they lie, and no layer is copied. Works in q's dtype with logits, sums
    and output accumulated in float32. Forward derivatives pass; a reverse one is a ValueError.

    The batch of q, k and v may be R times the cache's B: row r B + b reads video b. So the two
    branches of guidance share a cache, and a span is decoded once for both.

    Args:
        q_BTHD: queries before RoPE; Hq is a multiple of the cache's H, and query head j reads
            key-value head j // (Hq / H).
        cache: the cache, or a view of it that brings positions and rope along.
        k_BTHD: the new block's keys before RoPE; any number of tokens, also none. None reads the
            cache alone, as cross attention does, or a layer that shares another's K and V.
        v_BTHD: the new block's values; None beside keys of None.
        layer: which layer of the cache; may be left out if it has one.
        positions: positions of the new tokens; only with a cache and a rope.
        rope: rotation of Q and K, or encodings of stored K and V (then H above is all of their
            heads); only with a cache. None is none.
        scale: factor of the logits, positive; None is 1 / sqrt(D). A base-2 logit beyond about 8,000
            is more than fp8 takes: the output of its query is NaN.
        causal: whether a query of the new block sees only new keys that are not behind it. All of
            the cache lies before the block and is always seen.
        mask: bool, which keys of the new block its queries see, (T, T), (B, T, T) or (B, Hq, T, T),
            with 1 in place of B or Hq for all. Of `causal`, `mask` and `lengths` all must allow it.
        lengths: tokens of each row of the new block that count, the first ones; the others are
            padding that no query sees, and the output of padding means nothing.
        softcap: c of logits c tanh(s / c); None for plain logits.
        sink_logits: a learned logit for each query head that takes part in the softmax and brings
            no value.
        return_lse: whether to return the log-sum-exp of the logits too: (output, float32 (B, T, Hq)).
            It includes `sink_logits`.
        implementation: "mosaic", kernels for Hopper GPUs that decode spans into a workspace; "cudnn",
            for NVIDIA GPUs of compute capability 8.0 and more: cuDNN attends to spans that Triton
            decodes where jax_triton is installed, and else XLA; "triton", kernels for the same GPUs,
            which need jax_triton; "xla", anywhere. None takes the first of these that serves the call
            (`explain` says which, and why). A named one is never replaced: what it cannot read is an
            error.
            "mosaic_fp8" is an older name of "mosaic" in fp8.
        precision: precision of the matrix products: "bf16", or "fp8" with "mosaic", where spans and
            the new block are read in e4m3: faster, for an error small beside that of 2-bit codes.
            None without an implementation is "fp8" where the kernels serve the call and both codecs
            have codes of at most two bits and one stage of k-means; else it is "bf16" on kernels and
            cuDNN, and the dtype of q on XLA.

    Returns:
        The attention output in q's dtype; zero for a query that sees no key at all. With
        `return_lse` a pair.

    Raises:
        TypeError: the cache is none, or q, k or v is no array.
        ValueError: a shape that does not fit the cache, a missing layer, positions or rope
            beside a view, a scale that is not positive, a mask, lengths or sink_logits of another
            shape or dtype, or an unknown implementation.
        NotImplementedError: a named implementation cannot serve this call; the message says why.
    """
    check_cache(cache, or_view=True)
    check_array(q_BTHD, "q", "(B, T, Hq, D)")
    if isinstance(cache, CacheView):
        if positions is not None or rope is not None:
            raise ValueError("positions and rope belong to cache.view(...); leave them out here")
        view = cache
    else:
        view = cache.view(positions, rope, precompute=False)
    lay: Layout = view.cache.layout
    if (k_BTHD is None) != (v_BTHD is None):
        raise ValueError("k and v: one of them is None; accepted: both, or None for both")
    if reads_new := k_BTHD is not None:
        check_array(k_BTHD, "k", "(B, T, H, D), or None with v=None")
        check_array(v_BTHD, "v", "(B, T, H, D), or None with k=None")
        _check(lay, view.heads, q_BTHD, k_BTHD, v_BTHD, layer)
    else:
        k_BTHD = v_BTHD = jnp.zeros((*q_BTHD.shape[:1], 0, view.heads, lay.head_dim), q_BTHD.dtype)
        _check(lay, view.heads, q_BTHD, k_BTHD, v_BTHD, layer, reads_new)
    asked = dict(causal=causal, mask=mask, lengths=lengths) if reads_new else {}
    if not reads_new and (causal or mask is not None or lengths is not None):
        raise ValueError(
            "k=None: causal, mask and lengths say what is seen of new keys; leave them out"
        )
    asked |= dict(softcap=softcap, sink_logits=sink_logits, return_lse=return_lse)
    features = features_of(q_BTHD.shape[:3], **asked)
    if not q_BTHD.shape[1]:
        return (q_BTHD, jnp.zeros(q_BTHD.shape[:3], jnp.float32)) if return_lse else q_BTHD
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    if isinstance(scale, int | float) and not 0 < scale < math.inf:
        raise ValueError(f"{scale=}; accepted: a positive number, or None for 1 / sqrt(D)")
    scale = jnp.float32(1 / math.sqrt(lay.head_dim) if scale is None else scale)
    call = (q_BTHD, view, k_BTHD, v_BTHD, layer, scale, features)
    if lay.plan is None:
        chosen = choose(view, q_BTHD, implementation, precision, features, reads_new).chosen
        out, lse = _attend(*call, chosen)
    else:
        out, lse = _attend_on_devices(*call, implementation=implementation, precision=precision)
    out = no_gradient(out, "attend", NO_GRADIENT)
    return (out, no_gradient(lse, "attend", NO_GRADIENT)) if return_lse else out


@functools.partial(jax.jit, static_argnames=("implementation", "precision"))
def _attend_on_devices(
    *call: Any, implementation: str | None, precision: str | None
) -> tuple[Array, Array]:
    def here(q_BTHD, view, k_BTHD, v_BTHD, layer, scale, features, reads_new):
        chosen = choose(view, q_BTHD, implementation, precision, features, reads_new).chosen
        return _attend(q_BTHD, view, k_BTHD, v_BTHD, layer, scale, features, chosen)

    return attend_on_devices(here, *call)


@functools.partial(jax.jit, static_argnames="chosen")
def _attend(
    q_BTHD: Array,
    view: CacheView,
    k_BTHD: Array,
    v_BTHD: Array,
    layer: Array,
    scale: Array,
    features: Features,
    chosen: Candidate,
) -> tuple[Array, Array | None]:
    call = (q_BTHD, view, k_BTHD, v_BTHD, layer, scale, features)
    if chosen.implementation == "xla":
        attend_some = attend_xla
    elif chosen.implementation == "cudnn":
        from qvg_jax.attention.cudnn import Workspaces, attend_cudnn

        decoder = "triton" if chosen.decoding == "kernels" else "xla"
        attend_some = functools.partial(attend_cudnn, workspaces=Workspaces(decoder=decoder))
    else:
        attend_some = functools.partial(_attend_kernels, chosen)
    if view.cache.layout.history is not None:
        return attend_by_head(attend_some, *call)
    return attend_some(*call)


def _attend_kernels(chosen: Candidate, *call: Any) -> tuple[Array, Array | None]:
    """Output and log-sum-exp of attention by kernels; of the features they know `return_lse` only."""
    from qvg_jax.attention.kernels import attend_kernels

    *call, features = call
    fp8, implementation = chosen.precision == "fp8", chosen.implementation
    names = dict(fp8=fp8, implementation=implementation, return_lse=features.return_lse)
    found = attend_kernels(*call, **names)
    return found if features.return_lse else (found, None)


def _check(
    lay: Layout, heads: int, q: Array, k: Array, v: Array, layer: Any, reads_new: bool = True
) -> None:
    if layer is None and lay.layers > 1:
        raise ValueError(f"layer=None; the cache has {lay.layers} layers: give an index below it")
    if isinstance(layer, int) and not 0 <= layer < lay.layers:
        raise ValueError(f"layer={layer} is not accepted: give 0 <= layer < {lay.layers}")
    rows, tokens = q.shape[:2] if q.ndim == 4 else (lay.batch, "T")
    for name, x in (("k", k), ("v", v)) if reads_new else ():
        want = (rows, tokens, heads, lay.head_dim)
        if x.shape != want:
            raise ValueError(f"{name} has shape {x.shape}; accepted: {want} (B, T, H, D)")
    fits = q.ndim == 4 and q.shape[0] and not q.shape[0] % lay.batch and q.shape[3] == lay.head_dim
    if not fits or q.shape[2] % heads:
        want = f"({lay.batch} or a multiple, T, a multiple of {heads}, {lay.head_dim})"
        raise ValueError(f"q has shape {q.shape}; accepted: {want} (B, T, Hq, D)")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q has dtype {q.dtype}; accepted: floating point")
