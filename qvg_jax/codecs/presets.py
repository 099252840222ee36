"""One constructor per recipe, and the registry that names them.

    codec = presets.get("qvg", num_centroids=64)          # the same codec for K and V
    key_codec, value_codec = presets.pair("kivi")         # K and V may differ
    codec = presets.parse("qvg:num_centroids=64")         # the same from a text

Every keyword of a constructor can be overridden. Ratios below are against bf16, for a long span.
"""

from collections.abc import Callable
from typing import Any

from qvg_jax.codecs import own, published
from qvg_jax.codecs.base import Codec
from qvg_jax.codecs.base import identity as _identity
from qvg_jax.codecs.compose import chain, encoded_by, labelled
from qvg_jax.codecs.number_format import FormatLike
from qvg_jax.codecs.quantize.integer import residual_quantize
from qvg_jax.codecs.recipes import is_recipe, parse_call, parse_recipe, written
from qvg_jax.codecs.recommended import CAUTIOUS, MEASURED, recommended
from qvg_jax.codecs.smoothing.kmeans import kmeans_smoothing

__all__ = [
    "CAUTIOUS",
    "MEASURED",
    "PAIRS",
    "PRESETS",
    "auto",
    "get",
    "identity",
    "pair",
    "parse",
    "parse_pair",
    "qvg",
    "qvg_asymmetric",
    "qvg_pro",
    "recommended",
    "rtn",
]


def qvg(
    bits: int = 2,
    num_centroids: int = 256,
    group: int = 64,
    *,
    iters: int = 2,
    cold_iters: int = 5,
    stages: int = 1,
    mode: str = "symmetric",
    scale_dtype: FormatLike = "e4m3",
    centroid_dtype: FormatLike = "bf16",
    warm_start: bool = True,
    reseed: bool = True,
    subsample: int = 1,
    normalize: bool = False,
) -> Codec:
    """Quant VideoGen: one k-means stage, then symmetric integers, an e4m3 scale per 64 channels.

    bits per element = bits + 8/G + S (id bits / D + 16 K / T).
    At 2 bits and K = 256: 6.88x on a LongCat span (29,640 x 128), 6.97x on a Self-Forcing span
    (37,440 x 128), 5.84x on a WorldPlay span (7,040 x 256).

    Clips: residuals beyond +-448, where e4m3 ends, unless `normalize`; nothing below that.

    Args:
        bits: bits of a residual code: 2, 3, 4 or 8.
        num_centroids: K, at most the tokens of a span.
        group: G, channels per scale; divides the head dim.
        iters: k-means iterations of a warm span; the published runs use 2 for Self-Forcing and
            WorldPlay.
        cold_iters: k-means iterations of the first span.
        stages: S.
        mode: "symmetric" or "asymmetric".
        scale_dtype: "e4m3", "bf16" or "f32".
        centroid_dtype: storage dtype of the centroids.
        warm_start: start k-means from the previous span's centroids.
        reseed: restart unused centroids at badly served tokens.
        subsample: as in `kmeans_smoothing`: iterations before the last look at one token in so many.
        normalize: as in `residual_quantize`: for residuals that do not fit e4m3, at a byte a span.

    Returns:
        The codec.

    Differs from the paper: `reseed` and `cold_iters`; `reseed=False, cold_iters=iters` is the
    plain recipe. A plain warm start can be worse than a cold one, because centroids of content
    that is gone attract nothing. Relative L2 error of K | V after a round trip, five spans of
    1,024 tokens captured from a small trained model: K = 256: plain 0.178 | 0.313, never warm
    0.170 | 0.299, reseeded 0.164 | 0.290; K = 64: 0.242 | 0.430, 0.243 | 0.433, 0.240 | 0.429.

    Source: arXiv 2602.02958, Table 1 ("QVG"), and the settings of the released scripts.
    """
    return chain(
        kmeans_smoothing(
            num_centroids,
            iters,
            stages,
            cold_iters=cold_iters,
            centroid_dtype=centroid_dtype,
            warm_start=warm_start,
            reseed=reseed,
            subsample=subsample,
        ),
        residual_quantize(bits, group, mode, scale_dtype, normalize=normalize),
    )


def qvg_asymmetric(
    bits: int = 2, num_centroids: int = 256, group: int = 128, **overrides: Any
) -> Codec:
    """QVG's k-means, then asymmetric integers with all four levels, ends per 128 channels.

    2.30 bits at 2 bits in a span of 37,440 tokens, as QVG. Clips: residuals below -448, unless
    `normalize`; ends are the smallest and the largest value of a group.

    Args:
        bits, num_centroids, **overrides: as in `qvg`.
        group: channels per scale and zero point.

    Returns:
        The codec.

    Source: the asymmetric mode of the released QVG code (arXiv 2602.02958).
    """
    return qvg(bits, num_centroids, group, **{"mode": "asymmetric", **overrides})


def qvg_pro(
    bits: int = 2,
    num_centroids: int = 256,
    group: int = 16,
    *,
    stages: int = 4,
    iters: int = 5,
    cold_iters: int = 5,
    **overrides: Any,
) -> Codec:
    """QVG-Pro: four k-means stages (progressive residual quantization) and a scale per 16 channels.

    About 3.3 bits per element at 2 bits and K = 256 on a LongCat span.

    Args:
        bits, num_centroids, group, stages, iters, cold_iters, **overrides: as in `qvg`.

    Returns:
        The codec.

    Source: arXiv 2602.02958, Table 1 ("QVG-Pro").
    """
    return qvg(
        bits, num_centroids, group, stages=stages, iters=iters, cold_iters=cold_iters, **overrides
    )


def rtn(
    bits: int = 2, group: int = 16, mode: str = "symmetric", scale_dtype: FormatLike = "e4m3"
) -> Codec:
    """Round to nearest, the baseline without smoothing: integers, an e4m3 scale per 16 channels.

    bits per element = bits + 8/G: 2.5 (6.40x) and 4.5 (3.56x), the ratios the paper lists for RTN.
    `group=64, mode="asymmetric"` is the stronger variant of equal size to QVG (2.25 bits).
    Clips: values beyond +-448, where e4m3 ends.

    Args:
        bits, group, mode, scale_dtype: as in `residual_quantize`.

    Returns:
        The codec.

    Source: arXiv 2602.02958, Table 1 ("RTN").
    """
    return chain(residual_quantize(bits, group, mode, scale_dtype))


def auto(model: str | None = None, **overrides: Any) -> tuple[Codec, Codec]:
    """Returns the default: what was best in the loop of `model`, the cautious `dither` for any other.

    `dither` spends as many bits on keys as on values, and its scales follow a token's largest value. Its
    errors of attention are about half of those of `midrise` and of asymmetric integers, on made-up and on
    real tensors. What loud channels do to other grids does not happen to it: pocket world's loop with
    outliers folded into its weights gives the same frames (docs/benchmarks/evidence.md). GPU kernels read
    and write it. `trellis` is 14 dB closer in that loop, but with keys of less than a
    bit, which is known to be enough for that model only: `qvg capture` and `qvg tune` tell for others.

    Args:
        model: as in `recommended`.
        **overrides: keywords of the recipe's constructor.

    Returns:
        (key codec, value codec).
    """
    return pair(recommended(model), **overrides)


def identity(dtype: FormatLike = "bf16") -> Codec:
    """Returns the codec without compression: the values in `dtype`."""
    return _identity(dtype)


def _at_4_bits(constructor: Callable[..., Codec]) -> Callable[..., Codec]:
    def four(bits: int = 4, **overrides: Any) -> Codec:
        return constructor(bits, **overrides)

    four.__doc__ = constructor.__doc__
    return four


# One codec for K and V.
PRESETS: dict[str, Callable[..., Codec]] = {
    "qvg": qvg,
    "qvg-4bit": _at_4_bits(qvg),
    "qvg-pro": qvg_pro,
    "qvg-pro-4bit": _at_4_bits(qvg_pro),
    "qvg-asym": qvg_asymmetric,
    "rtn": rtn,
    "rtn-4bit": _at_4_bits(rtn),
    "quarot": published.quarot,
    "turboquant": published.turboquant,
    "pca": published.pca,
    "nvfp4": published.nvfp4,
    "bf16": identity,
}

# One for K and one for V.
PAIRS: dict[str, Callable[..., tuple[Codec, Codec]]] = {
    "auto": auto,
    "kivi": published.kivi,
    "midrise": own.midrise,
    "dither": own.dither,
    "dither-asym": own.dither_asymmetric,
    "midrise-k1v3": own.midrise_k1v3,
    "midrise-k2v4": own.midrise_k2v4,
    "midrise2": own.midrise2,
    "midrise-1bit": own.midrise_1bit,
    "kmeans-e8": own.kmeans_e8,
    "klt": own.klt,
    "klt-kmeans": own.klt_kmeans,
    "klt-tiny": own.klt_tiny,
    "trellis": own.trellis,
    "trellis-tiny": own.trellis_tiny,
}


def get(name: str, **overrides: Any) -> Codec:
    """Returns the codec of the recipe called `name`, with some of its settings overridden.

    Args:
        name: a key of `PRESETS`.
        **overrides: keywords of its constructor, e.g. `num_centroids=64`, and `encoder`: what a
            chain encodes with, "xla", "mosaic" or "triton"; see `chain` for what it is otherwise.

    Returns:
        The codec; its name is the recipe's, and `str(codec)` the recipe with its overrides.

    Raises:
        ValueError: an unknown name, an override the recipe does not have, a bad value, or a recipe
            of `PAIRS`, which has one codec for K and another for V.
    """
    if name in PAIRS:
        raise ValueError(f"codec={name!r} has one codec for K and one for V: use presets.pair")
    return labelled(name, _built(name, PRESETS, overrides), written(name, overrides))


def pair(name: str, **overrides: Any) -> tuple[Codec, Codec]:
    """Returns the codecs for K and for V of any recipe.

    Args:
        name: a key of `PRESETS`, whose codec serves both, or of `PAIRS`.
        **overrides: keywords of its constructor, and `encoder`.

    Returns:
        (key codec, value codec); both have the recipe's name. Of a recipe of `PAIRS` they are
        written "kivi.key" and "kivi.value", with the overrides behind.

    Raises:
        ValueError: an unknown name, an override the recipe does not have, or a bad value.
    """
    if name in PRESETS:
        codec = get(name, **overrides)
        return codec, codec
    key_codec, value_codec = _built(name, PAIRS, overrides)
    return (
        labelled(name, key_codec, written(f"{name}.key", overrides)),
        labelled(name, value_codec, written(f"{name}.value", overrides)),
    )


def parse(text: str) -> Codec:
    """Returns the codec of a text; `parse(str(codec)) == codec` for every codec that factories made.

    Args:
        text: a recipe of `PRESETS` with its overrides, "qvg:group=32"; one half of a recipe of
            `PAIRS`, "kivi.key:bits=4" or "kivi.value:bits=4"; or what is composed by hand,
            "kmeans_smoothing(num_centroids=64) > residual_quantize(bits=2, group=64)".

    Raises:
        ValueError: text that is none of these, or a setting that is not accepted.
    """
    if not is_recipe(text):
        codec = parse_call(text, parse)
        if not isinstance(codec, Codec):
            raise ValueError(f"codec={text!r} is a smoothing; accepted: smoothings > a codec")
        return codec
    name, settings = parse_recipe(text)
    name, dot, part = name.partition(".")
    if not dot:
        return get(name, **settings)
    if name not in PAIRS or part not in ("key", "value"):
        raise ValueError(f"codec={text!r} is not known; accepted: NAME.key or NAME.value of a pair")
    return pair(name, **settings)[part == "value"]


def parse_pair(text: str) -> tuple[Codec, Codec]:
    """Returns the codecs for K and for V of one text: any recipe, or one codec that serves both.

    Args:
        text: "midrise:num_centroids=64", or as for `parse`.

    Raises:
        ValueError: as for `parse`.
    """
    if is_recipe(text) and "." not in text.partition(":")[0]:
        name, settings = parse_recipe(text)
        return pair(name, **settings)
    codec = parse(text)
    return codec, codec


def _built(name: str, recipes: dict[str, Callable[..., Any]], overrides: dict[str, Any]) -> Any:
    if name not in recipes:
        known = ", ".join([*PRESETS, *PAIRS])
        raise ValueError(f"codec={name!r} is not known; accepted: {known}")
    settings = dict(overrides)
    encoder = settings.pop("encoder", None)
    try:
        built = recipes[name](**settings)
    except TypeError as error:
        raise ValueError(f"codec={name!r} does not accept {settings}: {error}") from None
    if encoder is None:
        return built
    if isinstance(built, Codec):
        return encoded_by(built, encoder)
    return tuple(encoded_by(codec, encoder) for codec in built)
