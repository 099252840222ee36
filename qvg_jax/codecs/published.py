"""Published ways of quantizing a KV cache, beside QVG's own: what they do, and what differs here.

Every constructor returns one codec, or a pair (key codec, value codec) where K and V differ. Bits
per element are for head dim 128 and a long span.
"""

from qvg_jax.codecs.base import Codec
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.number_format import FormatLike
from qvg_jax.codecs.quantize.grid import grid_quantize
from qvg_jax.codecs.quantize.integer import residual_quantize
from qvg_jax.codecs.quantize.minmax import minmax_quantize
from qvg_jax.codecs.quantize.nvfp4 import nvfp4_quantize
from qvg_jax.codecs.smoothing.low_rank import low_rank_smoothing
from qvg_jax.codecs.smoothing.rotation import rotation

__all__ = ["kivi", "nvfp4", "pca", "quarot", "turboquant"]


def kivi(
    bits: int = 2,
    group: int = 128,
    *,
    value_group: int | None = None,
    scale_dtype: FormatLike = "bf16",
    clip: float = 1.0,
    percentile: float = 0.0,
) -> tuple[Codec, Codec]:
    """KIVI: keys per channel in blocks of 128 tokens, values per token; no residual of any kind.

    2.25 bits for both K and V at 2 bits, groups of 128 and bfloat16 scale and zero point. Clips:
    nothing, unless `clip` or `percentile` say so.

    Args:
        bits: 2, 3, 4 or 8.
        group: tokens of a key group.
        value_group: channels of a value group; None is `group`.
        scale_dtype, clip, percentile: as in `minmax_quantize`.

    Returns:
        (key codec, value codec).

    Source: Liu et al., arXiv 2402.02750. Its residual window of full-precision recent tokens is the
    cache's window. Differs: groups of 128 where the paper has 32 (3 bits in all); bfloat16 where it
    has float16; keys before RoPE, which is how the cache stores them and better by far than after.
    """
    return (
        minmax_quantize(
            bits, group, "channel", clip=clip, percentile=percentile, scale_dtype=scale_dtype
        ),
        minmax_quantize(
            bits,
            group if value_group is None else value_group,
            "token",
            clip=clip,
            percentile=percentile,
            scale_dtype=scale_dtype,
        ),
    )


def quarot(
    bits: int = 2, group: int = 128, *, scale_dtype: FormatLike = "e4m3", seed: int = 0
) -> Codec:
    """QuaRot: a randomised Hadamard rotation, then asymmetric integers per token.

    2.125 bits at 2 bits with e4m3 scale and zero point per 128 channels (group=64: 2.25). Clips:
    rotated values below -448, where e4m3 ends.

    Args:
        bits: 2, 3, 4 or 8.
        group: channels of a group.
        scale_dtype: "e4m3", "bf16" or "f32".
        seed: of the rotation.

    Returns:
        The codec.

    Source: Ashkboos et al., arXiv 2404.00456 (its KV-cache part). Differs: K and V are rotated back
    when they are read, where QuaRot rotates queries and output weights; the same numbers, but it
    works in a model with RoPE between cache and query. No clipping search.
    """
    return chain(
        rotation("hadamard", seed), residual_quantize(bits, group, "asymmetric", scale_dtype)
    )


def turboquant(bits: int = 2, *, scale_dtype: FormatLike = "e4m3", seed: int = 0) -> Codec:
    """TurboQuant-style: a random rotation, then the Lloyd-Max grid of a normal density.

    2.0625 bits at 2 bits with the token's RMS in e4m3. Clips: rotated values beyond 1.5 of it.

    Args:
        bits: 1, 2, 3 or 4.
        scale_dtype: "e4m3", "bf16" or "f32".
        seed: of the rotation.

    Returns:
        The codec.

    Source: Zandieh et al., arXiv 2504.19874, the variant for mean squared error. Differs: a
    randomised Hadamard in place of a dense random rotation; levels of the normal density, which the
    coordinates of a random rotation approach, in place of the exact one; no split of channels into
    outliers and others; no 1-bit sketch of the residual for inner products.
    """
    return chain(
        rotation("hadamard", seed),
        grid_quantize(bits, "lloyd_max", gain="none", scale_dtype=scale_dtype),
    )


def pca(
    bits: int = 2,
    group: int = 128,
    *,
    rank: int = 4,
    iters: int = 4,
    coefficient_bits: int = 2,
    axis: str = "channel",
    scale_dtype: FormatLike = "bf16",
) -> Codec:
    """Mean and rank-4 principal components per span, then asymmetric integers per channel.

    2.33 bits at 2 bits with 2-bit coefficients and bfloat16 ends per 128 tokens of a channel. Clips:
    nothing of the residual.

    Args:
        bits: 2, 3, 4 or 8.
        group: tokens of a channel (or channels of a token) that share their ends.
        rank, iters, coefficient_bits: as in `low_rank_smoothing`.
        axis, scale_dtype: as in `minmax_quantize`.

    Returns:
        The codec.

    Source: the low-rank smoothing that independent reproductions of QVG compare with. Differs: the
    coefficients' error stays in the residual and is quantized with it.
    """
    return chain(
        low_rank_smoothing(rank, iters, coefficient_bits),
        minmax_quantize(bits, group, axis, scale_dtype=scale_dtype),
    )


def nvfp4() -> Codec:
    """NVFP4: E2M1 values, an e4m3 scale per 16 channels, a float32 scale per span; 4.5 bits.

    Clips: nothing, scales follow the largest value.

    Returns:
        The codec.

    Source: NVIDIA, "Introducing NVFP4" (2025); see `nvfp4_quantize` for what differs.
    """
    return chain(nvfp4_quantize())
