"""Formats of residuals: the codes and the scales that they become."""

import dataclasses

__all__ = ["Integers", "Midrise"]


@dataclasses.dataclass(frozen=True)
class Integers:
    """Symmetric integers with an e4m3 scale per group: q = 2^(bits - 1) - 1, scale = max |r| / q.

    Attributes:
        bits: 2 or 4.
        group: channels that share a scale.
    """

    bits: int
    group: int


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
