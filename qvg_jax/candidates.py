"""Recipes of this library's own, to be measured against the published ones.

Every constructor returns (key codec, value codec). Bits per element are for head dim 128.
"""

from typing import Any

from qvg_jax.codec import Codec, chain
from qvg_jax.quantize.grid import grid_quantize
from qvg_jax.quantize.lattice import lattice_quantize
from qvg_jax.smoothing.kmeans import kmeans_smoothing
from qvg_jax.transform_codec import transform_codec

__all__ = ["klt", "klt_kmeans", "klt_tiny", "kmeans_e8", "midrise", "midrise2", "midrise_1bit"]


def _behind_kmeans(
    quantizers: list[Codec], num_centroids: int, iters: int, stages: int, **settings: Any
) -> tuple[Codec, Codec]:
    """The quantizers of K and V, each behind the same k-means; unused centroids restart."""
    smoothing = kmeans_smoothing(num_centroids, iters, stages, reseed=True, **settings)
    key_codec, value_codec = (chain(smoothing, quantizer) for quantizer in quantizers)
    return key_codec, value_codec


def midrise(
    bits: int = 2,
    num_centroids: int = 256,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    stages: int = 1,
    iters: int = 2,
    cold_iters: int = 5,
    centroid_dtype: Any = "int8",
    warm_start: bool = True,
    key_gain: str | float = "lsq",
    value_gain: str | float = "match",
    scale_dtype: Any = "e4m3",
) -> tuple[Codec, Codec]:
    """K-means, then a mid-rise grid with one scale per token, gain-corrected for values.

    bits per element = bits + 8/D + S (8/D + 8 K / T): 2.18 at 2 bits and K = 256 in a span of
    37,440 tokens. Decodes with QVG's operations, (code - 1.5) scale + centroid.

    Args:
        bits: 1, 2, 3, 4 or 8.
        num_centroids: K, at most the tokens of a span.
        key_bits, value_bits: bits for one of them; None is `bits`.
        stages: S.
        iters, cold_iters, warm_start: as in `presets.qvg`; unused centroids always restart.
        centroid_dtype: as in `kmeans_smoothing`; int8 leaves the same error as bfloat16.
        key_gain, value_gain: `gain` of `grid_quantize` for K and for V.
        scale_dtype: "e4m3", "bf16" or "f32".

    Returns:
        (key codec, value codec).

    Source: QVG's smoothing (arXiv 2602.02958); the grid and its gain: see `grid_quantize`. Not a
    published recipe.
    """
    parts = ((key_bits or bits, key_gain), (value_bits or bits, value_gain))
    quantizers = [grid_quantize(n, gain=gain, scale_dtype=scale_dtype) for n, gain in parts]
    return _behind_kmeans(
        quantizers,
        num_centroids,
        iters,
        stages,
        cold_iters=cold_iters,
        centroid_dtype=centroid_dtype,
        warm_start=warm_start,
    )


def midrise_k1v3(
    key_bits: int = 1, value_bits: int = 3, key_gain: str | float = 0.5, **settings: Any
) -> tuple[Codec, Codec]:
    """`midrise` with 1 bit for keys and 3 for values: the same bits, closest in pocket world's loop."""
    return midrise(key_bits=key_bits, value_bits=value_bits, key_gain=key_gain, **settings)


def midrise2(stages: int = 2, **settings: Any) -> tuple[Codec, Codec]:
    """`midrise` with two k-means stages; 2.30 bits in a span of 37,440 tokens."""
    return midrise(stages=stages, **settings)


def midrise_1bit(bits: int = 1, stages: int = 2, **settings: Any) -> tuple[Codec, Codec]:
    """`midrise2` with one bit, the sign; 1.30 bits in a span of 37,440 tokens."""
    return midrise(bits, stages=stages, **settings)


def kmeans_e8(
    num_centroids: int = 256,
    *,
    stages: int = 1,
    iters: int = 2,
    cold_iters: int = 5,
    centroid_dtype: Any = "int8",
    warm_start: bool = True,
    key_gain: float = 0.0,
    value_gain: float = 1.0,
    scale_dtype: Any = "e4m3",
) -> tuple[Codec, Codec]:
    """K-means, then two bits per channel on the E8 lattice, gain-corrected for values.

    The bits of `midrise`, an eighth less error, and a table of 512 bytes in the decoder.

    Args:
        num_centroids, stages, iters, cold_iters, centroid_dtype, warm_start: as in `midrise`.
        key_gain, value_gain: `gain` of `lattice_quantize` for K and for V, 0 to 1.
        scale_dtype: "e4m3", "bf16" or "f32".

    Returns:
        (key codec, value codec).

    Source: QVG's smoothing (arXiv 2602.02958), QuIP#'s codebook (arXiv 2402.04396). Not a
    published recipe.
    """
    gains = (key_gain, value_gain)
    quantizers = [lattice_quantize(scale_dtype=scale_dtype, gain=gain) for gain in gains]
    return _behind_kmeans(
        quantizers,
        num_centroids,
        iters,
        stages,
        cold_iters=cold_iters,
        centroid_dtype=centroid_dtype,
        warm_start=warm_start,
    )


def klt(
    budget: float = 2.33,
    *,
    value_share: float = 0.5,
    key_gain: float = 0.0,
    value_gain: float = 0.0,
    **settings: Any,
) -> tuple[Codec, Codec]:
    """Transform coding: each span's principal axes, bits by energy, within a budget of 2.33 bits.

    Args:
        budget: bits per element of K and V together, everything counted, whatever the span.
        value_share: share of the bits that goes to V; at 0.5 both have `budget`.
        key_gain, value_gain: `gain` of `allocated_quantize` for K and for V.
        **settings: as in `transform_codec`, such as `num_centroids=64` for long spans.

    Returns:
        (key codec, value codec).

    Source: classical transform coding; see `klt_rotation` and `allocated_quantize`. Not a published
    recipe for video caches.
    """
    if not 0 < value_share < 1:
        raise ValueError(f"value_share={value_share} is not accepted: give more than 0, below 1")
    shares, gains = (2 - 2 * value_share, 2 * value_share), (key_gain, value_gain)
    key_codec, value_codec = (
        transform_codec(budget * share, gain=gain, **settings)
        for share, gain in zip(shares, gains, strict=True)
    )
    same = key_gain == value_gain and value_share == 0.5
    return key_codec, key_codec if same else value_codec


def klt_tiny(budget: float = 1.6, **settings: Any) -> tuple[Codec, Codec]:
    """`klt` at a tenth of bf16: 1.6 bits per element, everything counted."""
    return klt(budget, **settings)


def klt_kmeans(num_centroids: int = 64, **settings: Any) -> tuple[Codec, Codec]:
    """`klt` behind k-means: for spans of some thousand tokens, 2.33 bits in all."""
    return klt(num_centroids=num_centroids, **settings)
