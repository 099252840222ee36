"""Attention over all tokens at once, without a cache: in pieces that fit, or by a fused kernel."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

# Float32 logits that exist at once. 37,440 tokens and 64 heads would take 359 GB of them.
LOGITS_BYTES = 2**29


def with_attention(model: Any, way: str | None, precision: str | None = None) -> Any:
    """A model of the same arrays whose attention to the cache is done another way.

    Args:
        model: with a frozen `config` that has the fields `attention` and `precision`.
        way: implementation, see `qvg_jax.attend`.
        precision: of its matrix products, likewise.
    """
    other = nnx.merge(*nnx.split(model))
    other.config = dataclasses.replace(model.config, attention=way, precision=precision)
    return other


def dense_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BUHD: Float[Array, "B U H D"],
    v_BUHD: Float[Array, "B U H D"],
    bias_BU: Float[Array, "B U"] | None = None,
    *,
    logits_bytes: int = LOGITS_BYTES,
) -> Float[Array, "B T H D"]:
    """softmax(q k / sqrt(D) + bias) v; the softmax in float32.

    Without a bias it is one kernel of cuDNN where that works; else XLA does it in pieces.

    Args:
        q_BTHD, k_BUHD, v_BUHD: queries, keys and values.
        bias_BU: added to the logits of each key, float32; -inf hides a key. ln(n) makes one key
            count as n equal ones.
        logits_bytes: queries are taken in pieces whose logits need no more than this.
    """
    B, T, H, D = q_BTHD.shape
    if bias_BU is None and cudnn_works(q_BTHD.dtype.name, D):
        return fused_attention(q_BTHD, k_BUHD, v_BUHD, implementation="cudnn")
    rows = max(1, logits_bytes // (4 * B * H * k_BUHD.shape[1]))
    pieces = -(-T // rows)
    if pieces == 1:
        return _softmax_average(q_BTHD, k_BUHD, v_BUHD, bias_BU)
    size = -(-T // pieces)
    padded = jnp.pad(q_BTHD, ((0, 0), (0, pieces * size - T), (0, 0), (0, 0)))
    q_NBTHD = jnp.moveaxis(padded.reshape(B, pieces, size, H, D), 1, 0)
    o_NBTHD = jax.lax.map(lambda q: _softmax_average(q, k_BUHD, v_BUHD, bias_BU), q_NBTHD)
    return jnp.moveaxis(o_NBTHD, 0, 1).reshape(padded.shape)[:, :T]


def _softmax_average(q_BTHD, k_BUHD, v_BUHD, bias_BU):
    f32 = jnp.float32
    s_BHTU = jnp.einsum("bthd,buhd->bhtu", q_BTHD, k_BUHD, preferred_element_type=f32)
    s_BHTU = s_BHTU * f32(1 / math.sqrt(q_BTHD.shape[-1]))
    if bias_BU is not None:
        s_BHTU = s_BHTU + bias_BU[:, None, None]
    p_BHTU = jnp.exp(s_BHTU - s_BHTU.max(-1, keepdims=True))
    p_BHTU = p_BHTU / p_BHTU.sum(-1, keepdims=True)
    p_BHTU = p_BHTU.astype(v_BUHD.dtype)
    o_BTHD = jnp.einsum("bhtu,buhd->bthd", p_BHTU, v_BUHD, preferred_element_type=f32)
    return o_BTHD.astype(q_BTHD.dtype)


def fused_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BUHD: Float[Array, "B U H D"],
    v_BUHD: Float[Array, "B U H D"],
    mask: Bool[Array, "1 1 T U"] | None = None,
    *,
    valid_B: Int[Array, "B"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """softmax(q k / sqrt(D)) v by `jax.nn.dot_product_attention`; the softmax in float32.

    Args:
        q_BTHD, k_BUHD, v_BUHD: queries, keys and values.
        mask: True where a query sees a key.
        valid_B: how many of the keys count, the first ones; None is all of them.
        implementation: "cudnn" (fused, 16-bit floats, a GPU of compute capability 8.0 or more),
            "xla" (anywhere; holds all logits in float32), or None: cudnn if it works here.
    """
    if implementation is None:
        implementation = "cudnn" if cudnn_works(q_BTHD.dtype.name, q_BTHD.shape[-1]) else "xla"
    # JAX's own function mixes dtypes inside and fails where promotion is set to strict.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q_BTHD,
            k_BUHD,
            v_BUHD,
            mask=mask,
            key_value_seq_lengths=valid_B,
            implementation=implementation,
        )


@functools.cache
def cudnn_works(dtype: str, head_dim: int) -> bool:
    """Whether "cudnn" does here. Tries it once: versions, sizes and devices are too many to list."""
    if jax.default_backend() != "gpu" or dtype not in ("bfloat16", "float16"):
        return False
    with jax.ensure_compile_time_eval():
        x = jnp.zeros((1, 64, 1, head_dim), dtype)
        try:
            jax.nn.dot_product_attention(x, x, x, implementation="cudnn").block_until_ready()
        except (RuntimeError, ValueError, NotImplementedError):
            return False
    return True
