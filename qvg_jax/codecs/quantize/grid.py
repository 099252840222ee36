"""Quantization to a fixed grid of levels times one stored scale: RMS steps and gain correction.

Axes: B batch, H heads, T tokens, D head dim, G groups of one token, g channels of one group,
C code bytes of one token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from qvg_jax.codecs.base import Codec, EmptyState, Shape, check_span, per_element
from qvg_jax.codecs.number_format import FormatLike, format_name
from qvg_jax.codecs.quantize.levels import (
    best_ratio,
    lloyd_max_levels,
    midrise_levels,
    normal_error,
)
from qvg_jax.codecs.quantize.radix import (
    LEVEL_COUNTS,
    code_bits,
    pack_levels,
    packed_levels_width,
    unpack_levels,
)
from qvg_jax.codecs.quantize.scales import (
    gained,
    load_scale,
    scale_format,
    span_exponent,
    store_scale,
    times_power_of_two,
)
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import LeastSquaresFit, Levels, Storage

__all__ = ["GridPacked", "grid_quantize"]

_GAINS = {"lsq": 0.0, "match": 1.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GridPacked:
    """The packed form of `grid_quantize`. `exponents_BH` is None unless scales are e4m3."""

    codes_BHTC: Any  # uint8
    scales_BHTG: Any
    exponents_BH: Any  # int8
    head_dim: int = dataclasses.field(metadata=dict(static=True))  # bytes of trits do not tell


@factory
def grid_quantize(
    bits: int | None = None,
    grid: str | tuple[float, ...] = "midrise",
    group: int | None = None,
    *,
    levels: int | None = None,
    scale_dtype: FormatLike = "e4m3",
    gain: str | float = "match",
    refine: int = 2,
) -> Codec:
    """Rounds each group of channels to the nearest of n levels times one scale.

    x ~ level[code] scale. "midrise": level = code - (n - 1) / 2, for n = 4 the levels -3/2, -1/2,
    1/2, 3/2: no zero point, and no level spent on zero (an odd n has one there). The first scale
    is the multiple of the group's RMS with the least error for a normal density (0.9957 for n = 4).
    Then `refine` times: codes = nearest levels, l = level[code], scale = <x, l> / <l, l>, which is
    least squares. What is stored:
        gain "none":  the first scale, without refinement
        gain "lsq":   the last scale; codes are the nearest levels under the scale *as stored*
        gain "match": <x, x> / <x, l> for the last codes, so that <x, x_hat> = <x, x>
        gain p:       lsq^(1 - p) match^p
    Least-error grids shrink vectors (<x, x_hat> = <x_hat, x_hat> < <x, x>), which flattens what
    attention reads; "match" undoes that at the price of error. Its codes stay those of least
    squares, because at <x, x_hat> = <x, x> the error is |x|^2 (1 / cos^2 - 1) and they have the
    largest cosine: 0.132 of a normal vector's energy at 2 bits; deciding codes again for the
    stretched scale gives 0.138 and, iterated, 0.152. Least squares has 0.117.

    Scales in e4m3 come with one power of two per span and head: groups whose RMS is less than about
    2^-15 of the span's largest entry decode to zero, and nothing saturates below 1e36.

    Decode, per element: unpack (2 bits: a shift and a mask), convert, one multiply-add (code *
    scale - offset * scale, the product once per group); "lloyd_max" and explicit levels: n - 1
    compare-and-adds and a multiplication. The power of two: once per scale.
    Encode, per element: `refine` + 1 roundings and about 3 `refine` + 2 multiply-adds.

    An all-zero group decodes to zero. What is not finite: a NaN is stored as the code nearest
    zero, an infinity as the largest or smallest code, and neither counts for the scale.

    Args:
        bits: 1, 2, 3, 4 or 8; n = 2**bits. Default 2, unless `levels` is given.
        grid: "midrise"; "lloyd_max", the n levels with the least error for a normal density; or
            the levels themselves, ascending, in any unit.
        group: channels that share a scale; divides the head dim. None is the head dim: one scale
            per token.
        levels: n, in place of bits: 2 to 16, or 256. 3 packs five codes a byte (1.6 bits), 5 and
            6 pack three.
        scale_dtype: "e4m3", "bf16" or "f32".
        gain: "none", "lsq", "match", or p, where 0 is lsq and 1 match.
        refine: how often codes and least-squares scale are chosen in turn, at least 1.

    Returns:
        A stateless codec. Per token it stores D codes and D / group scales; with e4m3 one byte
        per head and span on top.

    Raises:
        ValueError: an argument outside its set; on use, a head dim that `group` does not divide
            or whose codes do not fill whole bytes.

    Source: the scale |x|^2 / <x, l>: Vargaftik et al., DRIVE (arXiv 2105.08339) and EDEN
    (ICML 2022), there after a random rotation, which makes it unbiased. Least-squares
    alternation: Lloyd's for one parameter.
    """
    levels_n = _levels(bits, grid, levels)
    n, uniform = len(levels_n), grid == "midrise"
    ratio = best_ratio(levels_n)
    dtype = scale_format(scale_dtype)
    gain_power = power_of_gain(gain)
    if group is not None and group < 1:
        raise ValueError(f"group={group} is not accepted: give 1 or more channels, or None")
    if refine < 1:
        raise ValueError(f"refine={refine} is not accepted: give 1 or more (gain 'none' has none)")

    def groups(shape: Shape, x_dtype: Any = jnp.float32) -> int:
        check_span(shape, x_dtype)
        d = shape[3]
        g = d if group is None else group
        if d % g:
            raise ValueError(f"group={g} must divide head_dim={d}; got remainder {d % g}")
        packed_levels_width(d, n)
        return d // g

    def to_codes(x_BHTGg: Array, scale_BHTG: Array) -> Array:
        # Where the scale is zero every level decodes to zero.
        scale_BHTG1 = jnp.where(scale_BHTG > 0, scale_BHTG, 1)[..., None]
        return nearest_level(x_BHTGg / scale_BHTG1, levels_n, uniform)

    def init(shape: Shape, x_dtype: Any = jnp.bfloat16) -> EmptyState:
        groups(shape, x_dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[GridPacked, EmptyState]:
        del key
        g = groups(x_BHTD.shape, x_BHTD.dtype)
        b, h, t, d = x_BHTD.shape
        exponent_BH = span_exponent(x_BHTD)
        x_BHTD = times_power_of_two(x_BHTD, -exponent_BH)
        x_BHTGg = jnp.where(jnp.isnan(x_BHTD), 0, x_BHTD).reshape(b, h, t, g, d // g)
        known_BHTGg = jnp.where(jnp.isfinite(x_BHTGg), x_BHTGg, 0)
        energy_BHTG = jnp.sum(known_BHTGg * known_BHTGg, axis=-1)
        scale_BHTG = jnp.sqrt(energy_BHTG * (g / d)) * ratio
        decided_BHTG = None
        if gain_power is not None:
            for _ in range(refine):
                decided_BHTG = scale_BHTG
                l_BHTGg = level_of(to_codes(known_BHTGg, scale_BHTG), levels_n, uniform)
                along_BHTG = jnp.sum(known_BHTGg * l_BHTGg, axis=-1)
                square_BHTG = jnp.sum(l_BHTGg * l_BHTGg, axis=-1)
                scale_BHTG = _ratio(along_BHTG, square_BHTG, scale_BHTG)
        if gain_power:
            match_BHTG = _ratio(energy_BHTG, along_BHTG, scale_BHTG)
            scale_BHTG = gained(scale_BHTG, match_BHTG, gain_power)
        stored_BHTG, exponents_BH, rounded_BHTG = store_scale(scale_BHTG, exponent_BH, dtype)
        # A stretched scale does not decide codes again: theirs is the best cosine there is.
        codes_BHTGg = to_codes(x_BHTGg, decided_BHTG if gain_power else rounded_BHTG)
        codes_BHTC = pack_levels(codes_BHTGg.reshape(b, h, t, d), n)
        return GridPacked(codes_BHTC, stored_BHTG, exponents_BH, d), state

    def decode(packed: GridPacked, dtype: Any = jnp.bfloat16) -> Array:
        b, h, t, g = packed.scales_BHTG.shape
        d = packed.head_dim
        scale_BHTG = load_scale(packed.scales_BHTG, packed.exponents_BH)
        codes_BHTD = unpack_levels(packed.codes_BHTC, n, d)
        l_BHTGg = level_of(codes_BHTD, levels_n, uniform).reshape(b, h, t, g, d // g)
        return (l_BHTGg * scale_BHTG[..., None]).reshape(b, h, t, d).astype(dtype)

    def nbytes(shape: Shape) -> int:
        g = groups(shape)
        b, h, t, d = shape
        exponents = b * h if dtype.itemsize == 1 else 0
        return b * h * t * (packed_levels_width(d, n) + g * dtype.itemsize) + exponents

    lost = normal_error(levels_n, ratio)  # share of the energy, at least squares

    def deficit(packed: GridPacked) -> Array:
        """Returns v - v_hat of `key_bias` for normal channels: the mean over the groups of a token."""
        p, scale_BHTG = gain_power or 0.0, load_scale(packed.scales_BHTG, packed.exponents_BH)
        variance_BHTG = jnp.square(scale_BHTG / ratio) * (1 - lost) ** (2 * p)
        return jnp.mean(variance_BHTG, axis=3) * (1 - (1 - lost) ** (1 - 2 * p))

    bits_each, fit = code_bits(n), None
    if gain_power is not None and group is None and dtype.itemsize == 1 and n & (n - 1) == 0:
        fit = LeastSquaresFit(ratio, refine, gain_power)
    if bits_each is None:
        codes = f"digits of base {n}, several to a byte"
    elif not uniform:
        codes = (
            f"{grid if isinstance(grid, str) else 'chosen'} levels, which are not equally spaced"
        )
    else:
        codes = Levels(
            bits_each,
            group,
            offset=(n - 1) / 2,
            scale_dtype=format_name(dtype),
            exponents=dtype.itemsize == 1,
            fit=fit,
        )
    short = {None: "none", 0.0: "lsq", 1.0: "match"}.get(gain_power, f"gain{gain_power}")
    what = grid if isinstance(grid, str) else "levels"
    name = f"{what}{n}-g{group or 'all'}-{short}-{format_name(dtype)}"
    return Codec(init, encode, decode, per_element(nbytes), name, nbytes, Storage(codes), deficit)


def nearest_level(x: Array, levels: tuple[float, ...], uniform: bool) -> UInt8[Array, "..."]:
    """Returns the index of the level nearest to each x; halfway, the upper one. `uniform`: step 1 around 0."""
    n = len(levels)
    if uniform:
        return jnp.clip(jnp.floor(x + n / 2), 0, n - 1).astype(jnp.uint8)
    codes = jnp.zeros(x.shape, jnp.uint8)
    for a, b in zip(levels, levels[1:], strict=False):
        codes += (x >= (a + b) / 2).astype(jnp.uint8)
    return codes


def level_of(codes: Array, levels: tuple[float, ...], uniform: bool) -> Float[Array, "..."]:
    """Returns the levels of codes, float32; the inverse of `nearest_level` without a table look-up."""
    if uniform:
        return codes.astype(jnp.float32) - (len(levels) - 1) / 2
    x = jnp.full(codes.shape, levels[0], jnp.float32)
    for j, level in enumerate(levels[1:], 1):
        x = jnp.where(codes >= j, jnp.float32(level), x)
    return x


def _ratio(top: Array, bottom: Array, otherwise: Array) -> Array:
    usable = (top > 0) & (bottom > 0)
    return jnp.where(usable, top / jnp.where(usable, bottom, 1), otherwise)


def _levels(bits: int | None, grid: Any, count: int | None) -> tuple[float, ...]:
    if not isinstance(grid, str):
        levels = tuple(float(l) for l in grid)
        ascending = all(a < b for a, b in zip(levels, levels[1:], strict=False))
        if not 2 <= len(levels) <= 16 or not ascending or bits or count:
            raise ValueError(
                f"grid={grid} with bits={bits}, levels={count} is not accepted: give 2 to 16 "
                "ascending levels, and neither bits nor levels"
            )
        return levels
    if grid not in ("midrise", "lloyd_max"):
        raise ValueError(f"grid={grid!r} is not accepted: give 'midrise', 'lloyd_max' or levels")
    if bits is not None and count is not None:
        raise ValueError(f"bits={bits} and levels={count} are both given; accepted: one of them")
    if count is None:
        bits = 2 if bits is None else bits
        if bits not in (1, 2, 3, 4, 8):
            raise ValueError(f"bits={bits} is not accepted: give 1, 2, 3, 4 or 8")
        count = 2**bits
    if count not in LEVEL_COUNTS or (grid == "lloyd_max" and count > 16):
        raise ValueError(f"levels={count} is not accepted: give 2 to 16, or 256 midrise")
    return midrise_levels(count) if grid == "midrise" else lloyd_max_levels(count)


def power_of_gain(gain: Any) -> float | None:
    """Returns p of lsq^(1 - p) match^p for a setting `gain`, or None for no refinement."""
    if isinstance(gain, str) and gain in ("none", *_GAINS):
        return _GAINS.get(gain)
    if isinstance(gain, int | float) and not isinstance(gain, bool) and 0 <= gain <= 2:
        return float(gain)
    raise ValueError(f"gain={gain!r} is not accepted: give none, lsq, match or a number 0 to 2")
