"""One call of flash attention by cuDNN (or XLA), and the softmax that results of several calls make.

For each query a call returns the output o_i and the log-sum-exp z_i of its logits, and calls i with keys
of their own are one softmax again, computed in float32:
    z = log sum_i exp(z_i),   o = sum_i exp(z_i - z) o_i.
A call is itself split: equal parts of its keys are entries of cuDNN's batch, as many as fill the GPU,
because cuDNN gives a block of threads 128 queries of a head and all of their keys.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qvg_jax.backends import num_sms

__all__ = ["BACKENDS", "Softmax", "no_keys", "parts_for", "split", "visit"]

_TILE_QUERIES = 128  # of one block of threads
_ALIGNED_KEYS = 64  # parts that are chosen begin at multiples of it
_MOST_PARTS = 64
# Measured in keys: what a block of threads costs beside its keys, and what writing and merging the output
# of one more part costs.
_KEYS_PER_BLOCK = 256
_KEYS_PER_PART = 400


class Softmax(NamedTuple):
    """Attention to the keys of some calls: float32 output and log-sum-exp of the logits."""

    out_nQD: Array
    lse_nQ: Array


def no_keys(q_nQD: Array) -> Softmax:
    """The result of attention to no key at all: a log-sum-exp of -inf."""
    like = q_nQD.astype(jnp.float32)  # keeps q's sharding
    return Softmax(jnp.zeros_like(like), jnp.full_like(like[..., 0], -jnp.inf))


def parts_for(rows: int, queries: int, keys: int, multiprocessors: int) -> int:
    """The number of parts into which a call's keys are split, so that few multiprocessors wait at its end."""
    tiles = rows * -(-queries // _TILE_QUERIES)

    def cost(parts: int) -> float:
        waves = -(-tiles * parts // multiprocessors)
        merging = parts * _KEYS_PER_PART * tiles / multiprocessors
        return waves * (-(-keys // parts) + _KEYS_PER_BLOCK) + merging

    most = max(1, min(_MOST_PARTS, keys // _KEYS_PER_BLOCK))
    return min(range(1, most + 1), key=cost)


def split(rows: int, queries: int, keys: int, parts: int | None = None) -> tuple[int, int]:
    """(number of parts, keys of all parts together); None lets `parts_for` choose their number."""
    aligned = 1
    if parts is None:
        parts = parts_for(rows, queries, keys, num_sms())
        aligned = _ALIGNED_KEYS if parts > 1 else 1
    size = -(-keys // (parts * aligned)) * aligned
    return parts, parts * size


def visit(
    run: Softmax,
    q_nQD: Array,
    k_nSD: Array,
    v_nSD: Array,
    valid: Array | int,
    *,
    parts: int,
    backend: str,
    offset: float = 0.0,
) -> Softmax:
    """Merges attention to the first `valid` keys, at least one, with `offset` added to their logits.

    Args:
        run: attention to other keys.
        q_nQD, k_nSD, v_nSD: rows of queries, keys and values; `parts` divides S.
        valid: how many keys count, of all rows or of each (n,); of each it may be none. What lies
            behind them is finite.
        parts: how many pieces of the keys are entries of the call's batch.
        backend: "cudnn" or "xla".
        offset: a constant, which softmax notices only beside other keys.
    """
    rows, queries, d = q_nQD.shape
    size = k_nSD.shape[1] // parts
    # Parts are neighbours in memory, so this moves nothing.
    k, v = (x.reshape(rows * parts, 1, size, d) for x in (k_nSD, v_nSD))
    q = jnp.broadcast_to(q_nQD[:, None], (rows, parts, queries, d))
    q = q.reshape(rows * parts, 1, queries, d)

    of_rows = jnp.ndim(valid) == 1
    if of_rows:
        valid_ns = jnp.clip(
            valid[:, None] - size * jnp.arange(parts, dtype=jnp.int32)[None], 0, size
        )
    else:
        valid_s = jnp.clip(valid - size * jnp.arange(parts, dtype=jnp.int32), 0, size)
    # cuDNN leaves open what it returns for no key at all: it gets one, which does not count.
    least = jnp.maximum(valid_ns if of_rows else valid_s, 1)
    lengths = jnp.broadcast_to(least if of_rows else least[None], (rows, parts)).reshape(-1)
    out, lse = BACKENDS[backend](q, k, v, lengths)

    out_nsQD = out.reshape(rows, parts, queries, d).astype(jnp.float32)
    visible = (valid_ns > 0)[..., None] if of_rows else (valid_s > 0)[None, :, None]
    lse_nsQ = jnp.where(visible, lse.reshape(rows, parts, queries) + offset, -jnp.inf)
    new_lse_nQ = jnp.maximum(run.lse_nQ, lse_nsQ.max(1))
    # A row that has seen no key yet has a log-sum-exp of -inf, and -inf - -inf would be NaN.
    at_nQ = jnp.where(new_lse_nQ > -jnp.inf, new_lse_nQ, 0) if of_rows else new_lse_nQ
    old_nQ = jnp.exp(run.lse_nQ - at_nQ)
    weight_nsQ = jnp.exp(lse_nsQ - at_nQ[:, None])
    sum_nQ = old_nQ + weight_nsQ.sum(1)
    if of_rows:
        sum_nQ = jnp.where(sum_nQ > 0, sum_nQ, 1)
    out_nQD = run.out_nQD * old_nQ[..., None] + (out_nsQD * weight_nsQ[..., None]).sum(1)
    return Softmax(out_nQD / sum_nQ[..., None], new_lse_nQ + jnp.log(sum_nQ))


def _by_cudnn(q: Array, k: Array, v: Array, lengths: Array) -> tuple[Array, Array]:
    # jax.nn.dot_product_attention calls this too, but rounds the log-sum-exp to q's dtype: in bfloat16
    # weights of merged results would be wrong by up to 3 %.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    queries = jnp.full_like(lengths, q.shape[2])
    return dot_product_attention(
        q, k, v, None, None, queries, lengths, scale=1 / math.sqrt(q.shape[3]),
        mask_type=MaskType.PADDING, qkv_layout="BNTH", return_residual=True,
    )  # fmt: skip


def _by_xla(q: Array, k: Array, v: Array, lengths: Array) -> tuple[Array, Array]:
    # In float32, in which the log-sum-exp is not rounded.
    q, k, v = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (q, k, v))
    out, lse = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="xla", return_residual=True
    )
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)


BACKENDS = {"cudnn": _by_cudnn, "xla": _by_xla}
