"""Storage: what the bytes of a codec stand for, declared once for the kernels that read and write them.

    x = w ((code + dither - offset) scale + zero point) 2^exponent + sum of the token's centroids

A codec declares the terms of this that it has, and how it chooses them. Kernels that decode read the
terms; kernels that encode also read the `fit`s. What has another form is declared by a phrase that
names it, so that whoever cannot read it can say which part that is.
"""

import dataclasses

__all__ = [
    "Centroids",
    "DitheredFit",
    "LargestFit",
    "LeastSquaresFit",
    "Levels",
    "Lloyd",
    "Storage",
    "Values",
]


@dataclasses.dataclass(frozen=True)
class LargestFit:
    """The scale of a group is its largest magnitude over the largest level; codes are the nearest.

    With zero points, the smallest value is the zero point, and the scale the range over the number of steps.
    """


@dataclasses.dataclass(frozen=True)
class LeastSquaresFit:
    """Scale and codes are chosen in turn by least squares, as in `grid_quantize`.

    Attributes:
        ratio: the first scale over the root mean square of the group.
        refine: rounds of codes and least-squares scale.
        gain: p of the stored scale, lsq^(1 - p) match^p; with 0 the codes are those of the scale as
            stored, else those that the least-squares scale was computed from.
    """

    ratio: float
    refine: int
    gain: float


@dataclasses.dataclass(frozen=True)
class DitheredFit:
    """Deviations, middles, scales and codes are chosen as in `dithered_quantize`.

    Attributes:
        reach: steps from the smallest to the largest value of a token.
        gain: p of the stored scale, lsq^(1 - p) match^p.
    """

    reach: float
    gain: float


@dataclasses.dataclass(frozen=True)
class Levels:
    """Codes that stand for equally spaced levels, with a scale per group of channels.

    Attributes:
        bits: of a code; consecutive channels packed together, the first one highest.
        group: channels that share a scale; None is the whole vector.
        offset: the code of zero; half integers are the grids without a zero (mid-rise).
        scale_dtype: "e4m3", "bf16" or "f32".
        zero_points: whether every group also stores a zero point, in the dtype of the scales.
        exponents: whether scales and zero points have a power of two per head and span.
        dithered: whether a dither that is known from token and channel is added to the codes
            (`pallas_kernels.dequantize.dither`).
        deviations: whether every channel has a factor w, its deviation, per head and span.
        fit: how scales and codes are chosen, if kernels can do it.
    """

    bits: int
    group: int | None
    offset: int | float
    scale_dtype: str
    zero_points: bool = False
    exponents: bool = False
    dithered: bool = False
    deviations: bool = False
    fit: LargestFit | LeastSquaresFit | DitheredFit | None = None


@dataclasses.dataclass(frozen=True)
class Values:
    """Plain numbers of a dtype, by its short name."""

    dtype: str


@dataclasses.dataclass(frozen=True)
class Lloyd:
    """Centroids are chosen by Lloyd's algorithm, with these settings of `kmeans_smoothing`."""

    iters: int
    cold_iters: int
    warm_start: bool
    reseed: bool
    equalize: bool = False
    subsample: int = 1


@dataclasses.dataclass(frozen=True)
class Centroids:
    """Tables of centroids and, for every token and stage, the id of the row that is added.

    Attributes:
        num_centroids: rows of a table; ids take a byte up to 256, else two.
        stages: tables per head, and ids per token.
        dtype: of the rows: "bf16", "f16", "f32", "int8" with a bf16 step per channel, or "e4m3" with a
            power of two per table.
        fit: how they are chosen.
    """

    num_centroids: int
    stages: int
    dtype: str
    fit: Lloyd


@dataclasses.dataclass(frozen=True)
class Storage:
    """The declaration of a packed span: its codes, and what was taken out before them.

    Attributes:
        codes: what is stored of every channel, or the phrase that names another form.
        smoothings: what was taken out before, in order: centroids, or the phrase that names it.
        chained: whether `packed` is a tuple with one entry per smoothing and one for the codes.
        heads: heads of the span whose channels are one vector to the codec, one after the other.
    """

    codes: Levels | Values | str
    smoothings: tuple[Centroids | str, ...] = ()
    chained: bool = False
    heads: int = 1

    @property
    def by_head(self) -> bool:
        """Whether each head is encoded by itself and without randomness, as far as it is declared."""
        fitted = isinstance(self.codes, Levels) and self.codes.fit is not None
        known = fitted and all(isinstance(s, Centroids) for s in self.smoothings)
        return known and self.chained and self.heads == 1
