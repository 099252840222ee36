"""Formats of residuals: the codes and the scales that they become."""

import dataclasses

__all__ = ["Dithered", "Integers", "Midrise"]


@dataclasses.dataclass(frozen=True)
class Integers:
    """Integers with an e4m3 scale per group.

    Symmetric: q = 2^(bits - 1) - 1, scale = max |r| / q, codes -q .. q. With zero points:
    q = 2^bits - 1, zero = min r in e4m3, scale = (max r - min r) / q, codes 0 .. q of r - zero.

    Attributes:
        bits: 2 or 4.
        group: channels that share a scale.
        zero_points: whether codes begin at a zero point of the group, also stored in e4m3.
    """

    bits: int
    group: int
    zero_points: bool = False


@dataclasses.dataclass(frozen=True)
class Midrise:
    """Levels code - (n - 1) / 2 times one scale per token, n = 2^bits.

    Codes are the nearest levels; scale and codes are chosen in turn, see `reference.midrise`.

    Attributes:
        bits: 1, 2 or 4.
        ratio: first scale over the token's root mean square.
        refine: rounds of codes and least-squares scale.
        recode: whether codes are chosen once more for the least-squares scale rounded to e4m3's
            four bits, as it is stored; otherwise they are those that the scale was computed from.
    """

    bits: int
    ratio: float
    refine: int
    recode: bool


@dataclasses.dataclass(frozen=True)
class Dithered:
    """Even levels of a token that a dither known from its place shifts, with one scale per token.

    With n = 2^bits, the level of code c is c + (j + 1/2) / 64 - n / 2 steps from the token's middle, where j
    is the `dither` of token and channel; see `reference.dithered`.

    Attributes:
        bits: 2 or 4.
        reach: steps from the smallest to the largest value of a token.
        zero_points: whether a token has a middle other than zero.
    """

    bits: int
    reach: float
    zero_points: bool
