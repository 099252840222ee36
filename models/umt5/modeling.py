"""The umT5 encoder: T5 with a relative position table in every layer.

Legend: B batch, L layers, T tokens, H heads, D head dim, C channels. The blocks' parameters are
stacked on a leading axis L and scanned over.

Source: UniMax / umT5 (arXiv 2304.09151); T5 (arXiv 1910.10683), section 2.1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.umt5.config import UMT5Config


def relative_buckets(
    distance: Int[np.ndarray, "*shape"], buckets: int = 32, max_distance: int = 128
) -> Int[np.ndarray, "*shape"]:
    """Buckets of relative positions, exact when near and logarithmic when far.

    With n = buckets / 2, e = n / 2 and a = |distance|, for distance = key - query:

        a                                                       if a < e
        min(n - 1, e + floor(ln(a / e) / ln(max_distance / e) * (n - e)))   otherwise

    plus n if distance > 0. The logarithm is float32, as in the model's training.

    Args:
        distance: integer offsets in tokens.
        buckets: number of buckets.
        max_distance: distance in tokens from which on the last bucket is used.

    Returns:
        int32 bucket numbers, 0 to buckets - 1.

    Source: T5 (arXiv 1910.10683), section 2.1.
    """
    n = buckets // 2
    exact = n // 2
    a = np.abs(distance)
    ratio = np.log(np.maximum(a, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(np.log(max_distance / exact)) * (n - exact)).astype(np.int32)
    near_or_far = np.where(a < exact, a, np.minimum(far, n - 1))
    return (near_or_far + np.where(distance > 0, n, 0)).astype(np.int32)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon) * weight`: float32 statistics, cast back before the weight."""

    def __init__(self, config: UMT5Config):
        self.weight = nnx.Param(jnp.ones((config.width,), config.dtype))
        self.epsilon = config.epsilon

    def __call__(self, x_BTC):
        x = x_BTC.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
        weight_C = self.weight[...]
        return x.astype(weight_C.dtype) * weight_C.reshape(1, 1, -1)


class Block(nnx.Module):
    """Self-attention, then a gated feed-forward part; both read the norm of what they add to."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        width, inner = config.width, config.heads * config.head_dim
        self.heads = config.heads
        self.norm1 = RMSNorm(config)
        self.q = _linear(width, inner, config, rngs)
        self.k = _linear(width, inner, config, rngs)
        self.v = _linear(width, inner, config, rngs)
        self.o = _linear(inner, width, config, rngs)
        shape = (config.buckets, config.heads)
        self.position_bias = nnx.Param(
            nnx.initializers.normal(1.0)(rngs.params(), shape, config.dtype)
        )
        self.norm2 = RMSNorm(config)
        self.gate = _linear(width, config.ffn_width, config, rngs)
        self.up = _linear(width, config.ffn_width, config, rngs)
        self.down = _linear(config.ffn_width, width, config, rngs)

    def bias(self, bucket_TT: Int[Array, "T T"]) -> Float[Array, "H T T"]:
        """Position bias of each head, for query rows and key columns."""
        return jnp.moveaxis(self.position_bias[...][bucket_TT], -1, 0)

    def attention(self, x_BTC, mask_BT, bucket_TT) -> Float[Array, "B T C"]:
        """Attention without the usual factor 1 / sqrt(D).

        Logits are summed in the compute dtype, as the released bfloat16 model does, and the softmax
        is float32.
        """
        b, t, _ = x_BTC.shape
        q, k, v = (f(x_BTC).reshape(b, t, self.heads, -1) for f in (self.q, self.k, self.v))
        logits = jnp.einsum("BTHD,BSHD->BHTS", q, k) + self.bias(bucket_TT)[None]
        # The lowest finite number, not -inf: a row without any valid key stays finite.
        logits = jnp.where(mask_BT[:, None, None, :], logits, jnp.finfo(logits.dtype).min)
        weight = jax.nn.softmax(logits.astype(jnp.float32), -1).astype(logits.dtype)
        return self.o(jnp.einsum("BHTS,BSHD->BTHD", weight, v).reshape(b, t, -1))

    def feed_forward(self, x_BTC) -> Float[Array, "B T C"]:
        """`down(up(x) * gelu_tanh(gate(x)))`."""
        return self.down(self.up(x_BTC) * jax.nn.gelu(self.gate(x_BTC), approximate=True))

    def __call__(self, x_BTC, mask_BT, bucket_TT) -> Float[Array, "B T C"]:
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC), mask_BT, bucket_TT)
        return x_BTC + self.feed_forward(self.norm2(x_BTC))


class UMT5(nnx.Module):
    """Token ids to embeddings."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = nnx.Embed(
            config.vocabulary, config.width, param_dtype=config.dtype, rngs=rngs
        )
        self.blocks = nnx.vmap(lambda rngs: Block(config, rngs))(rngs.split(config.layers))
        self.norm = RMSNorm(config)

    def buckets(self, tokens: int) -> Int[Array, "T T"]:
        """Bucket of every (query row, key column) pair of a text of `tokens` tokens."""
        position = np.arange(tokens)
        distance_TT = position[None, :] - position[:, None]
        return jnp.asarray(
            relative_buckets(distance_TT, self.config.buckets, self.config.max_distance)
        )

    def __call__(
        self, ids_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | Int[Array, "B T"]
    ) -> Float[Array, "B T C"]:
        """Embeddings of all positions; no token attends to a masked one.

        Args:
            ids_BT: token ids; an id outside the vocabulary gives NaN.
            mask_BT: true (or not 0) where there is text, false in the padding.

        Returns:
            Embeddings in the parameters' dtype. Rows in the padding are not 0, see `encode`.
        """
        if ids_BT.shape != mask_BT.shape:
            raise ValueError(f"{mask_BT.shape=} must equal {ids_BT.shape=}")
        mask_BT = mask_BT.astype(bool)
        bucket_TT = self.buckets(ids_BT.shape[1])
        x_BTC = self.token_embedding(ids_BT)
        x_BTC, _ = jax.lax.scan(
            lambda x, block: (block(x, mask_BT, bucket_TT), None), x_BTC, self.blocks
        )
        return self.norm(x_BTC)

    def encode(
        self, ids_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | Int[Array, "B T"]
    ) -> Float[Array, "B T C"]:
        """Like calling the model, with 0 in the padding: what Wan's transformer reads."""
        x_BTC = self(ids_BT, mask_BT)
        return jnp.where(mask_BT.astype(bool)[..., None], x_BTC, jnp.zeros((), x_BTC.dtype))


def _linear(channels_in, channels_out, config, rngs):
    return nnx.Linear(
        channels_in, channels_out, use_bias=False, param_dtype=config.dtype, rngs=rngs
    )
