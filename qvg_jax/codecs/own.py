"""Recipes of this library's own, to be measured against the published ones.

Every constructor returns (key codec, value codec). Bits per element are for head dim 128.
"""

from typing import Any

from qvg_jax.codecs.base import Codec
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.number_format import FormatLike
from qvg_jax.codecs.quantize.by_energy import by_energy
from qvg_jax.codecs.quantize.dithered import dithered_quantize
from qvg_jax.codecs.quantize.grid import grid_quantize
from qvg_jax.codecs.quantize.heads import heads_as_tokens
from qvg_jax.codecs.quantize.lattice import lattice_quantize
from qvg_jax.codecs.quantize.trellis import trellis_quantize
from qvg_jax.codecs.smoothing.kmeans import kmeans_smoothing
from qvg_jax.codecs.smoothing.rotation import rotation
from qvg_jax.codecs.transform_codec import transform_codec

__all__ = [
    "dither",
    "dither_asymmetric",
    "klt",
    "klt_kmeans",
    "klt_tiny",
    "kmeans_e8",
    "midrise",
    "midrise2",
    "midrise_1bit",
    "midrise_k1v3",
    "midrise_k2v4",
    "trellis",
    "trellis_tiny",
]


def _behind_kmeans(
    quantizers: list[Codec], num_centroids: int, iters: int, stages: int, **settings: Any
) -> tuple[Codec, Codec]:
    """Returns the quantizers of K and V, each behind the same k-means; unused centroids restart."""
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
    centroid_dtype: FormatLike = "int8",
    warm_start: bool = True,
    subsample: int = 1,
    key_gain: str | float = "lsq",
    value_gain: str | float = "match",
    scale_dtype: FormatLike = "e4m3",
) -> tuple[Codec, Codec]:
    """Returns k-means and a mid-rise grid with one scale per token, gain-corrected for values.

    bits per element = bits + 8/D + S (8/D + 8 K / T): 2.18 at 2 bits and K = 256 in a span of
    37,440 tokens. Decodes with QVG's operations, (code - 1.5) scale + centroid.

    Clips: at 2 bits residuals beyond 2 root mean squares of their token, which become 1.5 of them;
    where tails are heavy, that is what matters.

    Args:
        bits: 1, 2, 3, 4 or 8.
        num_centroids: K, at most the tokens of a span.
        key_bits, value_bits: bits for one of them; None is `bits`.
        stages: S.
        iters, cold_iters, warm_start, subsample: as in `presets.qvg`; unused centroids always restart.
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
        subsample=subsample,
    )


def midrise_k1v3(
    key_bits: int = 1, value_bits: int = 3, key_gain: str | float = 0.5, **settings: Any
) -> tuple[Codec, Codec]:
    """Returns `midrise` with 1 bit for keys and 3 for values: as many bits, closest in pocket world's loop."""
    return midrise(key_bits=key_bits, value_bits=value_bits, key_gain=key_gain, **settings)


def midrise_k2v4(key_bits: int = 2, value_bits: int = 4, **settings: Any) -> tuple[Codec, Codec]:
    """Returns `midrise` with 2 bits for keys and 4 for values, which a CPU decodes almost as fast as it reads bf16.

    2 and 4 bits are unpacked in fewer steps than 1 and 3.
    """
    return midrise(key_bits=key_bits, value_bits=value_bits, **settings)


def midrise2(stages: int = 2, **settings: Any) -> tuple[Codec, Codec]:
    """Returns `midrise` with two k-means stages; 2.30 bits in a span of 37,440 tokens."""
    return midrise(stages=stages, **settings)


def midrise_1bit(bits: int = 1, stages: int = 2, **settings: Any) -> tuple[Codec, Codec]:
    """Returns `midrise2` with one bit, the sign; 1.30 bits in a span of 37,440 tokens."""
    return midrise(bits, stages=stages, **settings)


def dither(
    bits: int = 2,
    num_centroids: int = 256,
    *,
    asymmetric: bool = False,
    reach: float | None = None,
    stages: int = 1,
    iters: int = 2,
    cold_iters: int = 5,
    centroid_dtype: FormatLike = "int8",
    warm_start: bool = True,
    subsample: int = 1,
    key_gain: str | float = 0.5,
    value_gain: str | float = "match",
) -> tuple[Codec, Codec]:
    """Returns k-means and even levels that a dither shifts token by token, both with channels made equal.

    bits per element = bits + 8/D + S (8/D + 8 K / T) + 16/T: 2.18 at 2 bits and K = 256 in a span of
    37,440 tokens. Errors of tokens that are alike, as in frames that repeat, cancel in attention, and
    how loud a channel is makes no difference: factors of channels, folded into the weights, come out again.

    Clips: a token's largest value falls short by up to a step for some shifts of the grid, by 1/14 of a
    step on average; see `dithered_quantize`, `reach`.

    Args:
        bits: 2, 3 or 4.
        num_centroids: K, at most the tokens of a span.
        asymmetric, reach: as in `dithered_quantize`.
        stages: S.
        iters, cold_iters, warm_start, subsample, centroid_dtype: as in `midrise`.
        key_gain, value_gain: `gain` of `dithered_quantize` for K and for V.

    Returns:
        (key codec, value codec).

    Source: QVG's smoothing (arXiv 2602.02958); the grid: see `dithered_quantize`. Not a published
    recipe.
    """
    quantizers = [
        dithered_quantize(bits, asymmetric=asymmetric, reach=reach, gain=gain)
        for gain in (key_gain, value_gain)
    ]
    return _behind_kmeans(
        quantizers,
        num_centroids,
        iters,
        stages,
        cold_iters=cold_iters,
        centroid_dtype=centroid_dtype,
        warm_start=warm_start,
        subsample=subsample,
        equalize=True,
    )


def dither_asymmetric(asymmetric: bool = True, **settings: Any) -> tuple[Codec, Codec]:
    """Returns `dither` with a middle per token: 1/16 bit more, less error where tails have one side."""
    return dither(asymmetric=asymmetric, **settings)


def kmeans_e8(
    num_centroids: int = 256,
    *,
    stages: int = 1,
    iters: int = 2,
    cold_iters: int = 5,
    centroid_dtype: FormatLike = "int8",
    warm_start: bool = True,
    key_gain: float = 0.0,
    value_gain: float = 1.0,
    scale_dtype: FormatLike = "e4m3",
) -> tuple[Codec, Codec]:
    """Returns k-means and two bits per channel on the E8 lattice, gain-corrected for values.

    The bits of `midrise`, an eighth less error, and a table of 512 bytes in the decoder. Clips: as
    `midrise`, residuals outside the lattice's ball.

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
    """Returns transform coding: each span's principal axes, bits by energy, within a budget of 2.33 bits.

    Clips: coefficients beyond about 1.5 to 2.5 deviations of their axis, by the bits that it has.

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
    """Returns `klt` at a tenth of bf16: 1.6 bits per element, everything counted."""
    return klt(budget, **settings)


def klt_kmeans(num_centroids: int = 64, **settings: Any) -> tuple[Codec, Codec]:
    """Returns `klt` behind k-means: for spans of some thousand tokens, 2.33 bits in all."""
    return klt(num_centroids=num_centroids, **settings)


def trellis(
    key_budget: float = 0.84,
    value_bits: float = 3.5,
    num_centroids: int = 32,
    *,
    tokens_per_axis: int = 24,
    vector_bits: int = 5,
    across_heads: bool = True,
    key_gain: float = 1.0,
    value_gain: str | float = "match",
    iters: int = 2,
    cold_iters: int = 5,
    seed: int = 0,
) -> tuple[Codec, Codec]:
    """Returns `klt` below 1 bit for keys; for values k-means, signs per token, and trellis codes by energy.

    2.33 bits in a span of 1,536 tokens, 2.24 in one of 37,440: 0.84 for keys, the rest for values, which
    all heads of a layer share (`heads_as_channels`, `heads_as_tokens`). For models like pocket world,
    where values are what hurts; see BENCHMARKS.md. Clips: values beyond the largest entry of the
    trellis's table, a few root mean squares of the token, and keys as `klt`.

    Decode of V, per element: shift, mask, a read of a table of 256 bytes, a multiplication, log2 D
    additions of the Hadamard transform, a sign, an addition of the centroid; a row index per token.
    Of K: as in `transform_codec`.

    Args:
        key_budget: bits per element of K, everything counted.
        value_bits: bits of V's codes: a whole number k for `trellis_quantize(k)`, or k + 1/2 for four
            classes of tokens `by_energy` with k + 2, k + 1, k and k - 1 bits: 1 to 5 bits each.
        num_centroids: of V, at most the tokens of a span.
        tokens_per_axis, vector_bits: of K, as in `transform_codec`.
        across_heads: False gives every head its own budget, for caches divided by heads.
        key_gain: `gain` of `allocated_quantize` for K.
        value_gain: `gain` of `trellis_quantize` for V.
        iters, cold_iters: as in `presets.qvg`; unused centroids always restart.
        seed: of the signs.

    Returns:
        (key codec, value codec).

    Raises:
        ValueError: bits outside their range.

    Source: see the parts. Not a published recipe.
    """
    if value_bits not in (1, 2, 3, 4, 5, 2.5, 3.5):
        raise ValueError(f"value_bits={value_bits} is not accepted: give 1 to 5, 2.5 or 3.5")
    low = int(value_bits)
    if low == value_bits:
        quantizer = trellis_quantize(low, gain=value_gain)
    else:
        most, more, less, least = (
            trellis_quantize(n, gain=value_gain) for n in (low + 2, low + 1, low, low - 1)
        )
        quantizer = by_energy(by_energy(most, more), by_energy(less, least))
    if across_heads:
        quantizer = heads_as_tokens(quantizer)
    smoothing = kmeans_smoothing(
        num_centroids, iters, cold_iters=cold_iters, centroid_dtype="int8", reseed=True
    )
    key_codec = transform_codec(
        key_budget,
        tokens_per_axis=tokens_per_axis,
        vector_bits=vector_bits,
        gain=key_gain,
        across_heads=across_heads,
    )
    return key_codec, chain(smoothing, rotation(seed=seed, signs="token"), quantizer)


def trellis_tiny(
    key_budget: float = 0.8, value_bits: float = 2.0, **settings: Any
) -> tuple[Codec, Codec]:
    """Returns `trellis` at a tenth of bf16: 1.55 bits in a span of 1,536 tokens, 1.46 in one of 37,440."""
    return trellis(key_budget, value_bits, **settings)
