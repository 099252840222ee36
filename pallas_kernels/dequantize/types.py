"""Arguments of the decoding kernels: packed arrays, the rows to be decoded, and their rotation.

Axes: R rows (any leading axes of the cache, heads last, flattened), n rows that are decoded, T tokens,
D head dim, C code bytes of a token, G groups, S stages, K centroids, N spans, V rows of cosines and
sines, B videos of a batch, H heads.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8, UInt8

from pallas_kernels.dequantize.dither import FINE

__all__ = [
    "HEAD_DIMS",
    "PAD",
    "Encoded",
    "Rotation",
    "Scheme",
    "Source",
    "Spans",
    "Tokens",
    "Tuning",
    "Window",
    "padded",
    "picked",
    "width_of",
]

HEAD_DIMS = (64, 128, 256)  # the head dims that kernels read

# Workspaces hold a multiple of this many tokens, the largest tile of attention, with zeros behind the
# valid ones.
PAD = 256


def padded(tokens: int) -> int:
    """The size of a workspace for `tokens` tokens: the next multiple of `PAD`."""
    return -(-tokens // PAD) * PAD


def picked(x: Array, first_row: Array, rows: int) -> Array:
    """`rows` rows of x from `first_row` on, or from each of several first rows."""
    if first_row.ndim == 0:
        return lax.dynamic_slice_in_dim(x, first_row, rows, 0)
    row = (first_row[:, None] + jnp.arange(rows)[None]).reshape(-1)
    return x.at[row].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How codes become numbers.

    x = w ((code + dither - offset) scale + zero point) 2^exponent + sum of the centroids

    Attributes:
        bits: 1, 2, 3, 4 or 8 bits of a code; codes of consecutive channels are packed together, the
            first one in the highest bits.
        group: channels that share a scale.
        offset: code of zero; half integers are the grids without a zero (mid-rise).
        stages: centroids per token; 0 for none.
        dithered: whether the dither of token and channel is added to the code, see `dither`.
        zero_points: whether every group has a zero point.
        deviations: whether every channel of a row has a factor w.
    """

    bits: int
    group: int
    offset: float
    stages: int
    dithered: bool = False
    zero_points: bool = False
    deviations: bool = False

    @property
    def affine(self) -> bool:
        """Whether more than a scale and centroids makes numbers of codes."""
        return self.dithered or self.zero_points or self.deviations

    @property
    def reach(self) -> float:
        """The largest magnitude of a level, in steps."""
        top = 2**self.bits - 1 + (1 - 1 / FINE if self.dithered else 0)
        return max(self.offset, top - self.offset)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """Packed rows of keys or values; numbers in e4m3 are stored as bytes.

    Scales and zero points may have a power of two for each row. Centroids are bf16 or float32 numbers, int8 with a
    step per channel, or e4m3 with a power of two per row and stage.
    """

    codes_RTC: UInt8[Array, "R T C"]
    scales_RTG: UInt8[Array, "R T G"]
    ids_RST: UInt8[Array, "R S T"] | None
    centroids_RSKD: (
        Float[Array, "R S K D"] | Int8[Array, "R S K D"] | UInt8[Array, "R S K D"] | None
    )
    exponents_R: Int8[Array, "R"] | None = None
    steps_RS: Float[Array, "R S D"] | Int8[Array, "R S"] | None = None
    zeros_RTG: UInt8[Array, "R T G"] | None = None
    deviations_RD: Float[Array, "R D"] | None = None

    def centroids(self, first_row: Array, rows: int) -> Float[Array, "n S K D"]:
        """Centroids of the rows from `first_row` on in float32, or from each of several first rows."""
        pick = lambda x: picked(x, jnp.asarray(first_row), rows)  # noqa: E731
        x = pick(self.centroids_RSKD)
        if x.dtype == jnp.uint8:
            x = lax.bitcast_convert_type(x, jnp.float8_e4m3fn)
        x = x.astype(jnp.float32)
        if self.steps_RS is None:
            return x
        steps = pick(self.steps_RS)
        if steps.ndim == 3:
            return x * steps.astype(jnp.float32)[:, :, None]
        return x * jnp.exp2(steps.astype(jnp.float32))[:, :, None, None]


def width_of(stored: Encoded | Array, scheme: Scheme | None) -> int:
    """Channels of packed or bf16 rows."""
    if isinstance(stored, Encoded):
        return stored.codes_RTC.shape[2] * 8 // scheme.bits
    return stored.shape[-1]


@dataclasses.dataclass(frozen=True)
class Spans:
    """Rows of one stored span, or of several spans that are laid one behind the other.

    Attributes:
        stored: packed rows, or bf16 rows (R, T, D) of a codec that stores them as they are.
        scheme: how codes become numbers; None with bf16 rows.
        first_row: the first row of the span, or of each span; may be traced.
        rows: how many rows from the first one on are decoded.
    """

    stored: Encoded | Float[Array, "R T D"]
    scheme: Scheme | None
    first_row: Int[Array, ""] | Int[Array, "N"] | int
    rows: int

    window: ClassVar[None] = None
    row_n: ClassVar[None] = None

    @property
    def tokens(self) -> int:
        """Tokens of a span."""
        packed = isinstance(self.stored, Encoded)
        return (self.stored.codes_RTC if packed else self.stored).shape[1]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Rows of bf16 tokens that no span holds, such as the new ones of a step.

    Attributes:
        stored: rows (R, T, D), or tokens with their heads (B, T, H, D), of which row b H + h is head
            h of video b.
        first_row: the first row that is decoded; may be traced.
        rows: how many rows from the first one on are decoded.
        row_n: which rows are decoded, where they do not follow one another; then `first_row` is not
            read. May be traced.
    """

    stored: Float[Array, "R T D"] | Float[Array, "B T H D"]
    first_row: Int[Array, ""] | int
    rows: int
    row_n: Int[Array, "n"] | None = None

    scheme: ClassVar[None] = None
    window: ClassVar[None] = None

    @property
    def tokens(self) -> int:
        """Tokens of a row."""
        return self.stored.shape[1]


@dataclasses.dataclass(frozen=True)
class Window:
    """Some consecutive tokens of the rows of a `Tokens`.

    Attributes:
        of: the rows.
        start: the first token; may be traced.
        tokens: how many there are; the window may reach beyond the last token of the rows.
    """

    of: Tokens
    start: Int[Array, ""] | int
    tokens: int

    scheme: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not isinstance(self.of, Tokens):
            raise ValueError(f"window of {type(self.of).__name__}; accepted: Tokens")

    @property
    def stored(self) -> Array:
        """All tokens of the rows."""
        return self.of.stored

    @property
    def first_row(self) -> Int[Array, ""] | int:
        """The first row that is decoded."""
        return self.of.first_row

    @property
    def rows(self) -> int:
        """How many rows are decoded."""
        return self.of.rows

    @property
    def row_n(self) -> Int[Array, "n"] | None:
        """Which rows are decoded, where they do not follow one another."""
        return self.of.row_n

    @property
    def window(self) -> tuple[Int[Array, ""] | int, int]:
        """The first token and the number of tokens."""
        return self.start, self.tokens


Source = Spans | Tokens | Window


@dataclasses.dataclass(frozen=True)
class Rotation:
    """RoPE on the way: cosines and sines of every token, and the pairs of channels that rotate.

    Attributes:
        cos_sin: cosines and sines in float32, (V, T, D / 2) each.
        pairing: "half" rotates channel j with j + D / 2, "interleaved" 2 j with 2 j + 1.
        batch: videos among the rows; the heads of a video share a row of `cos_sin`.
        first: the row of `cos_sin` of the first video, or for several spans that of each span.
    """

    cos_sin: tuple[Float[Array, "V T D/2"], Float[Array, "V T D/2"]]
    pairing: str = "half"
    batch: int = 1
    first: Int[Array, ""] | Int[Array, "N"] | int = 0


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes of the kernels that do not change the result.

    Attributes:
        tokens: tokens of a CTA; on Hopper at 128 channels, half as many at 256, twice as many at 64. A
            multiple of 16.
        heads: heads of a CTA, which share cosines and sines; the largest of 1, 2, 4 up to it that
            divides the heads is taken.
    """

    tokens: int = 64
    heads: int = 2
