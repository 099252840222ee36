"""Quantization levels for a normal density, computed from the density and not from tables.

Levels are in units of a scale; the scale is a multiple of the root mean square (RMS) of the values.
"""

import functools
import math

__all__ = ["best_ratio", "lloyd_max_levels", "midrise_levels", "normal_error"]


def midrise_levels(count: int) -> tuple[float, ...]:
    """Returns uniform levels with step 1 around zero: code - (count - 1) / 2.

    An even count has no level at zero (mid-rise: -3/2, -1/2, 1/2, 3/2); an odd one has one.
    """
    return tuple(code - (count - 1) / 2 for code in range(count))


def _cells(levels: tuple[float, ...]) -> list[tuple[float, float]]:
    """Returns, per level, its probability and its share of E[x], for nearest-level cells of N(0, 1)."""
    edges = [-math.inf, *((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)), math.inf]
    below = [0.5 * (1 + math.erf(e / math.sqrt(2))) for e in edges]
    density = [math.exp(-e * e / 2) / math.sqrt(2 * math.pi) for e in edges]
    return [
        (below[j + 1] - below[j], density[j] - density[j + 1])  # P(cell), integral of x over it
        for j in range(len(levels))
    ]


def normal_error(levels: tuple[float, ...], ratio: float = 1.0) -> float:
    """Returns the mean squared error of a standard normal value rounded to the nearest of ratio * levels.

    E = 1 - 2 sum_j l_j m_j + sum_j l_j^2 p_j with m_j = integral of x phi(x) over cell j and p_j
    its probability.

    Args:
        levels: ascending, in units of the scale.
        ratio: scale divided by the standard deviation.

    Returns:
        The share of the energy that is lost; 1 is everything.
    """
    scaled = tuple(ratio * l for l in levels)
    cells = _cells(scaled)
    return 1 + sum(l * l * p - 2 * l * m for l, (p, m) in zip(scaled, cells, strict=True))


@functools.cache
def best_ratio(levels: tuple[float, ...]) -> float:
    """Returns the scale, in units of the standard deviation, with the least `normal_error`.

    0.9957 for four mid-rise levels, 0.5860 for eight, 0.3352 for sixteen, 1.5958 for two; 1 for
    `lloyd_max_levels`. Found by golden-section search: the error has one minimum in the scale.

    Args:
        levels: ascending, in units of the scale.

    Returns:
        The ratio, to about eight digits.
    """
    golden = (math.sqrt(5) - 1) / 2
    low, high = 0.0, 8 / max(abs(l) for l in levels)
    while high - low > 1e-9 * high:
        a, b = high - golden * (high - low), low + golden * (high - low)
        if normal_error(levels, a) < normal_error(levels, b):
            high = b
        else:
            low = a
    return (low + high) / 2


@functools.cache
def lloyd_max_levels(count: int) -> tuple[float, ...]:
    """Returns the levels with the least mean squared error for a standard normal value.

    Fixed point of l_j = E[x | x in cell j] with cells between the midpoints.
    Four levels: +-0.4528, +-1.5104 (error 0.1175); three: 0, +-1.2240 (0.1902).

    Args:
        count: how many levels, at least 2.

    Returns:
        Ascending levels, in units of the standard deviation.

    Source: S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982);
    J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960).
    """
    levels = tuple(l * best_ratio(midrise_levels(count)) for l in midrise_levels(count))
    for _ in range(20_000):
        new = tuple(m / p for p, m in _cells(levels))
        new = tuple((a - b) / 2 for a, b in zip(new, reversed(new), strict=True))  # symmetric
        moved = max(abs(a - b) for a, b in zip(new, levels, strict=True))
        levels = new
        if moved < 1e-12:
            break
    return levels
