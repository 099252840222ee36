"""Quantization of eight channels at a time to the E8 lattice: two bits per channel, less error than a grid.

Axes: B batch, H heads, T tokens, D head dim, G octets of channels, N octets in a row, K patterns.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, PRNGKeyArray, UInt8

from qvg_jax.codecs.base import Codec, EmptyState, Shape, check_span, per_element
from qvg_jax.codecs.number_format import FormatLike, format_name
from qvg_jax.codecs.quantize.scales import (
    load_scale,
    scale_format,
    span_exponent,
    store_scale,
    times_power_of_two,
)
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import Storage

__all__ = ["LatticePacked", "lattice_quantize", "patterns"]

OCTET = 8
# Scale with the least error for normal vectors, in units of the RMS; measured, see the tests.
_RATIO = 0.97
# Octets that are compared with all patterns at a time.
_CHUNK = 2**13
_HIGHEST = lax.Precision.HIGHEST


class LatticePacked(NamedTuple):
    """The packed form of `lattice_quantize`: per octet a pattern, and a byte of signs and shift."""

    patterns_BHTG: UInt8[Array, "B H T G"]
    signs_BHTG: UInt8[Array, "B H T G"]
    scales_BHT: Float[Array, "B H T"]
    exponents_BH: Int8[Array, "B H"] | None


@functools.cache
def patterns() -> Float[np.ndarray, "K 8"]:
    """Returns the 256 patterns of absolute values: all positive half-integers of norm^2 <= 10, some of 12.

    227 have norm^2 2 to 10; of the 224 of norm^2 12 the list is filled up with 29, evenly spaced in
    lexicographic order.
    """
    near, far = [], []
    for halves in itertools.product((0.5, 1.5, 2.5), repeat=OCTET):
        norm = sum(v * v for v in halves)
        if norm <= 12:
            (near if norm <= 10 else far).append(halves)
    filling = [far[i * len(far) // (256 - len(near))] for i in range(256 - len(near))]
    return np.asarray(near + filling, np.float32)


@factory
def lattice_quantize(
    *, scale_dtype: FormatLike = "e4m3", gain: float = 0.0, refine: int = 1
) -> Codec:
    """Rounds every eight channels to the nearest of 2^16 points of a shifted E8 lattice.

    x_octet ~ g_t (s * sigma + shift), with s one of 256 patterns of half-integers, sigma signs of
    which an even or odd number is negative, so that the sum of the entries is even (the points of
    D8 + 1/2), and shift +1/4 or -1/4 in all entries. 8 bits of pattern, 7 of signs, 1 of shift: 2
    bits per channel. g_t, one per token: `refine` times codes and least squares in turn, then
    least squares^(1 - gain) match^gain as in `grid_quantize`.

    A normal vector loses 0.090 of its energy, where the best grid of four levels loses 0.1175 and
    Shannon's bound is 0.0625. A rotation in front makes vectors more nearly normal.

    Decode, per octet: one read of a table of 256 x 8 entries of 2 bits (512 bytes: two registers
    per lane of a warp, or shared memory), the parity of 7 signs and of the pattern, 8 sign flips,
    8 additions of the shift; per element one multiplication by the scale. Encode, per element: 2 x
    256 multiply-adds and as many comparisons, for each of `refine` + 1 rounds.

    An all-zero token decodes to zero. A NaN counts as zero, an infinity as four times the RMS.

    Args:
        scale_dtype: "e4m3", "bf16" or "f32".
        gain: 0 (least squares) to 1 (match).
        refine: at least 1.

    Returns:
        A stateless codec of 2 bits per element and one scale per token.

    Raises:
        ValueError: an argument outside its range; on use, a head dim that is not a multiple of 8.

    Source: the idea of a 2-bit E8 codebook as patterns, signs and shift: Tseng et al., "QuIP#"
    (arXiv 2402.04396), its E8P. Differs: which patterns of norm^2 12 fill the list.
    """
    dtype = scale_format(scale_dtype)
    if not 0 <= gain <= 2:
        raise ValueError(f"gain={gain} is not accepted: give 0 (least squares) to 1 (match)")
    if refine < 1:
        raise ValueError(f"refine={refine} is not accepted: give 1 or more")

    def check(shape: Shape, x_dtype: Any = jnp.float32) -> None:
        check_span(shape, x_dtype)
        if shape[3] % OCTET:
            raise ValueError(f"head_dim={shape[3]} is not accepted: give a multiple of 8")

    def init(shape: Shape, x_dtype: Any = jnp.bfloat16) -> EmptyState:
        check(shape, x_dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[LatticePacked, EmptyState]:
        del key
        check(x_BHTD.shape, x_BHTD.dtype)
        exponent_BH = span_exponent(x_BHTD)
        x_BHTD = times_power_of_two(x_BHTD, -exponent_BH)
        x_BHTD = jnp.where(jnp.isnan(x_BHTD), 0, x_BHTD)
        known_BHTD = jnp.where(jnp.isfinite(x_BHTD), x_BHTD, 0)
        energy_BHT = jnp.sum(known_BHTD * known_BHTD, axis=3)
        rms_BHT = jnp.sqrt(energy_BHT / x_BHTD.shape[3])
        reach_BHT1 = 4 * rms_BHT[..., None]
        x_BHTD = jnp.where(jnp.isfinite(x_BHTD), x_BHTD, jnp.sign(x_BHTD) * reach_BHT1)
        scale_BHT = rms_BHT * _RATIO
        for _ in range(refine):
            point_BHTD = _points(*_nearest(x_BHTD, scale_BHT))
            along_BHT = jnp.sum(known_BHTD * point_BHTD, axis=3)
            square_BHT = jnp.sum(point_BHTD * point_BHTD, axis=3)
            decided_BHT = scale_BHT
            usable = along_BHT > 0
            along_BHT = jnp.where(usable, along_BHT, 1)
            lsq_BHT = jnp.where(usable, along_BHT / square_BHT, scale_BHT)
            scale_BHT = lsq_BHT
        if gain:
            match_BHT = jnp.where(usable, energy_BHT / along_BHT, scale_BHT)
            scale_BHT = lsq_BHT ** (1 - gain) * match_BHT**gain
        scales_BHT, exponents_BH, rounded_BHT = store_scale(scale_BHT, exponent_BH, dtype)
        # As in grid_quantize: a stretched scale does not decide codes again.
        codes = _nearest(x_BHTD, decided_BHT if gain else rounded_BHT)
        return LatticePacked(*codes, scales_BHT, exponents_BH), state

    def decode(packed: LatticePacked, dtype: Any = jnp.bfloat16) -> Array:
        scale_BHT = load_scale(packed.scales_BHT, packed.exponents_BH)
        point_BHTD = _points(packed.patterns_BHTG, packed.signs_BHTG)
        return (point_BHTD * scale_BHT[..., None]).astype(dtype)

    def nbytes(shape: Shape) -> int:
        check(shape)
        b, h, t, d = shape
        return b * h * (t * (d // 4 + dtype.itemsize) + (dtype.itemsize == 1))

    short = f"-gain{gain:g}" if gain else ""
    name, storage = f"e8{short}-{format_name(dtype)}", Storage("points of a lattice")
    return Codec(init, encode, decode, per_element(nbytes), name, nbytes, storage)


def _parity() -> np.ndarray:
    """Returns, per pattern, 1 if an odd number of signs must be negative for the sum to be even."""
    return (patterns().sum(1) % 2).astype(np.int32)


def _nearest(x_BHTD: Array, scale_BHT: Array) -> tuple[Array, Array]:
    """Returns pattern and sign byte (7 signs, the first one highest, then the shift) of every octet."""
    unit_BHT1 = jnp.where(scale_BHT > 0, scale_BHT, 1)[..., None]
    y_N8 = (x_BHTD / unit_BHT1).reshape(-1, OCTET)
    s_K8 = jnp.asarray(patterns())
    odd_K = jnp.asarray(_parity())
    norm_K = jnp.sum(s_K8 * s_K8, axis=1)
    place_8 = jnp.arange(OCTET, dtype=jnp.int32)

    def shifted(y_N8: Array, shift: float) -> tuple[Array, Array, Array]:
        z_N8 = y_N8 - shift
        size_N8 = jnp.abs(z_N8)
        minus_N8 = (z_N8 < 0).astype(jnp.int32)
        wrong_NK = (jnp.sum(minus_N8, axis=1)[:, None] + odd_K[None]) % 2 == 1
        dot_NK = jnp.matmul(size_N8, s_K8.T, precision=_HIGHEST)
        # If the signs have the wrong parity, the entry that costs least is flipped.
        flip_NK = size_N8[:, :1] * s_K8[None, :, 0]
        for i in range(1, OCTET):
            flip_NK = jnp.minimum(flip_NK, size_N8[:, i : i + 1] * s_K8[None, :, i])
        score_NK = 2 * dot_NK - norm_K[None] - jnp.where(wrong_NK, 4 * flip_NK, 0)
        best_N = jnp.argmax(score_NK, axis=1).astype(jnp.int32)
        score_N = jnp.max(score_NK, axis=1) - jnp.sum(z_N8 * z_N8, axis=1)
        s_N8 = s_K8[best_N]
        cheapest_N = jnp.argmin(size_N8 * s_N8, axis=1).astype(jnp.int32)
        wrong_N = (jnp.sum(minus_N8, axis=1) + odd_K[best_N]) % 2
        minus_N8 ^= (place_8[None] == cheapest_N[:, None]).astype(jnp.int32) * wrong_N[:, None]
        return score_N, best_N, minus_N8

    def octets(y_N8: Array) -> tuple[Array, Array]:
        up, down = shifted(y_N8, 0.25), shifted(y_N8, -0.25)
        lower_N = down[0] > up[0]
        best_N = jnp.where(lower_N, down[1], up[1])
        minus_N8 = jnp.where(lower_N[:, None], down[2], up[2])
        weight_8 = 1 << jnp.arange(OCTET - 1, -1, -1, dtype=jnp.int32)
        byte_N = jnp.sum(minus_N8[:, :7] * weight_8[None, :7], axis=1) + lower_N.astype(jnp.int32)
        return best_N.astype(jnp.uint8), byte_N.astype(jnp.uint8)

    total = y_N8.shape[0]
    size = -(-total // -(-total // _CHUNK))
    y_N8 = jnp.pad(y_N8, ((0, -total % size), (0, 0)))
    found = lax.map(octets, y_N8.reshape(-1, size, OCTET))
    b, h, t, d = x_BHTD.shape
    return tuple(code.reshape(-1)[:total].reshape(b, h, t, d // OCTET) for code in found)


def _points(patterns_BHTG: Array, signs_BHTG: Array) -> Array:
    """Returns the lattice points of codes, float32, octets joined."""
    b, h, t, g = patterns_BHTG.shape
    index = patterns_BHTG.astype(jnp.int32)
    s = jnp.asarray(patterns()).at[index].get(mode="promise_in_bounds")
    place_7 = jnp.arange(7, 0, -1, dtype=jnp.int32).reshape(1, 1, 1, 1, 7)
    byte = signs_BHTG.astype(jnp.int32)[..., None]
    minus = (byte >> place_7) & 1
    last = (jnp.sum(minus, axis=-1) + jnp.asarray(_parity())[index]) % 2
    minus = jnp.concatenate([minus, last[..., None]], axis=-1)
    shift = jnp.where((byte & 1) == 1, jnp.float32(-0.25), jnp.float32(0.25))
    return (jnp.where(minus == 1, -s, s) + shift).reshape(b, h, t, g * OCTET)
