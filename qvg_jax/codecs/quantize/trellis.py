"""Trellis-coded quantization: codes that overlap in a shift register, chosen by Viterbi's algorithm.

Axes: B batch, H heads, T tokens, D head dim, N tokens of a piece, C code bytes of one token.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, PRNGKeyArray, UInt8

from qvg_jax.codecs.base import Codec, EmptyState, Shape, check_span, per_element
from qvg_jax.codecs.number_format import FormatLike, format_name
from qvg_jax.codecs.quantize.bitstream import pack_bits
from qvg_jax.codecs.quantize.grid import power_of_gain
from qvg_jax.codecs.quantize.scales import (
    load_scale,
    scale_format,
    span_exponent,
    store_scale,
    times_power_of_two,
)
from qvg_jax.codecs.quantize.trellis_levels import ERRORS, MEMORY, trellis_levels
from qvg_jax.codecs.quantize.viterbi import closed_path
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import Storage

__all__ = ["TrellisPacked", "trellis_quantize"]

# Tokens whose paths are found together: on a CPU what fits its cache, elsewhere what fills it.
_PIECES = {"cpu": 512, "default": 2**15}


class TrellisPacked(NamedTuple):
    """The packed form of `trellis_quantize`. `exponents_BH` is None unless scales are e4m3."""

    codes_BHTC: UInt8[Array, "B H T C"]
    scales_BHT: Float[Array, "B H T"]
    exponents_BH: Int8[Array, "B H"] | None


@factory
def trellis_quantize(
    bits: int = 2, *, scale_dtype: FormatLike = "e4m3", gain: str | float = "match"
) -> Codec:
    """Stores k bits per element, each decoded from the eight latest bits of the stream.

    The codes of a token are one ring of k D bits. Element d is levels[w_d] scale with w_d the eight
    bits that end with its own k: every bit takes part in 8 / k elements, and the choice of all of
    them together is a path through a trellis of 256 states (`closed_path`). `trellis_levels` is
    trained for normal values, so put a rotation in front. The scale is the token's RMS.

    Share of a normal token's energy that is lost, beside a scalar grid and Shannon's bound:
        bits       1      2      3      4       5
        trellis    0.289  0.078  0.0215 0.00603 0.00191
        mid-rise   0.363  0.119  0.0374 0.0115  0.0035
        bound      0.25   0.0625 0.0156 0.0039  0.00098
    Registers of 10 and 12 bits lose 0.0194 and 0.0177 at 3 bits, for 4 and 16 times the encoding.

    Gain: the codes are those of least squares; levels are stretched afterwards by (1 - E)^-p, E the
    error above, which is nothing to compute and at p = 1 makes <x, x_hat> = <x, x> on average; see
    `grid_quantize`. (There the scale itself is fitted to each token. Here e4m3 would round away
    what that gains: at 4 bits its three bits of mantissa cost a tenth of the whole error, unless the
    codes know the scale as stored, and they do.)

    Decode, per element: a shift and a mask (of two bytes of the stream, in a register), a read of a
    table of 256 one-byte levels, a conversion, a multiplication. Nothing serial, no state.
    Encode, per element: 1.25 times about 5 x 256 operations, as D + 32 serial steps over all tokens.
    On two CPU cores 0.1 seconds for 3 heads x 1,536 tokens x 128.

    An all-zero token decodes to zero. A NaN counts as zero, an infinity as four times the RMS.

    Args:
        bits: k, 1 to 5.
        scale_dtype: "e4m3", "bf16" or "f32".
        gain: "lsq", "match", or p, where 0 is lsq and 1 match.

    Returns:
        A stateless codec. Per token it stores k D / 8 bytes and a scale; with e4m3 one byte per head
        and span on top.

    Raises:
        ValueError: an argument outside its set; on use, a head dim with k D not a multiple of 8,
            or below 16.

    Source: trellis-coded quantization: Marcellin & Fischer, IEEE Trans. Communications 38 (1990);
    levels read from a shift register, so that decoding is parallel, and a ring instead of a start:
    Tseng et al., "QTIP" (arXiv 2406.11235). Differs from QTIP: a register of 8 bits and a trained
    table of 256 bytes, where it has larger registers, and levels computed or from larger tables.
    """
    if bits not in ERRORS or isinstance(bits, bool):
        raise ValueError(f"bits={bits} is not accepted: give 1 to 5")
    dtype, power = scale_format(scale_dtype), power_of_gain(gain)
    if power is None:
        raise ValueError("gain='none' is not accepted: give lsq, match or a number 0 to 2")
    stretch = (1 - ERRORS[bits]) ** -power

    def width(shape: Shape, x_dtype: Any = jnp.float32) -> int:
        check_span(shape, x_dtype)
        if shape[3] * bits % 8 or shape[3] < 16:
            raise ValueError(
                f"head_dim={shape[3]} is not accepted at bits={bits}: give 16 or more, with whole "
                "bytes of codes"
            )
        return shape[3] * bits // 8

    def init(shape: Shape, x_dtype: Any = jnp.bfloat16) -> EmptyState:
        width(shape, x_dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[TrellisPacked, EmptyState]:
        del key
        width(x_BHTD.shape, x_BHTD.dtype)
        d = x_BHTD.shape[3]
        exponent_BH = span_exponent(x_BHTD)
        x_BHTD = times_power_of_two(x_BHTD, -exponent_BH)
        x_BHTD = jnp.where(jnp.isnan(x_BHTD), 0, x_BHTD)
        known_BHTD = jnp.where(jnp.isfinite(x_BHTD), x_BHTD, 0)
        rms_BHT = jnp.sqrt(jnp.sum(known_BHTD * known_BHTD, axis=3) / d)
        scales_BHT, exponents_BH, rounded_BHT = store_scale(rms_BHT, exponent_BH, dtype)
        unit_BHT1 = jnp.where(rounded_BHT > 0, rounded_BHT, 1)[..., None]
        # Codes are chosen for the scale as stored. Beyond four deviations no level is nearer.
        z_BHTD = jnp.clip(x_BHTD / unit_BHT1, -4, 4)
        states_ND = _paths(z_BHTD.reshape(-1, d), bits)
        codes_ND = (states_ND & (2**bits - 1)).astype(jnp.uint8)
        codes_BHTC = pack_bits(codes_ND.reshape(x_BHTD.shape), bits)
        return TrellisPacked(codes_BHTC, scales_BHT, exponents_BH), state

    def decode(packed: TrellisPacked, dtype: Any = jnp.bfloat16) -> Array:
        levels = jnp.asarray(trellis_levels(bits) * stretch, jnp.float32)
        scale_BHT = load_scale(packed.scales_BHT, packed.exponents_BH)
        index_BHTD = _windows(packed.codes_BHTC, bits).astype(jnp.int32)
        x_BHTD = levels.at[index_BHTD].get(mode="promise_in_bounds")
        return (x_BHTD * scale_BHT[..., None]).astype(dtype)

    def nbytes(shape: Shape) -> int:
        b, h, t, _ = shape
        return b * h * (t * (width(shape) + dtype.itemsize) + (dtype.itemsize == 1))

    def deficit(packed: TrellisPacked) -> Array:
        """Returns v - v_hat of `key_bias` for normal channels."""
        scale_BHT = load_scale(packed.scales_BHT, packed.exponents_BH)
        return jnp.square(scale_BHT) * (1 - (1 - ERRORS[bits]) ** (1 - 2 * power))

    short = {0.0: "lsq", 1.0: "match"}.get(power, f"gain{power:g}")
    name = f"trellis{bits}-{short}-{format_name(dtype)}"
    return Codec(
        init,
        encode,
        decode,
        per_element(nbytes),
        name,
        nbytes,
        Storage("codes of a trellis"),
        deficit,
    )


def _paths(z_ND: Array, bits: int) -> Array:
    """Returns `closed_path` piece by piece, so that costs of 256 states per token take bounded memory."""
    total = z_ND.shape[0]
    levels_S = jnp.asarray(trellis_levels(bits))

    def by(most: int, z_ND: Array) -> Array:
        size = -(-total // -(-total // most))
        pieces = jnp.pad(z_ND, ((0, -total % size), (0, 0))).reshape(-1, size, z_ND.shape[1])
        return lax.map(lambda z: closed_path(z, levels_S, bits), pieces).reshape(-1, z_ND.shape[1])[
            :total
        ]

    branches = {name: lambda z, most=most: by(most, z) for name, most in _PIECES.items()}
    return lax.platform_dependent(z_ND, **branches)


def _windows(codes_BHTC: Array, bits: int) -> Array:
    """Returns the `MEMORY` = 8 bits that end with each element's code, uint8, around the ring."""
    *lead, width = codes_BHTC.shape
    nbytes = bits // math.gcd(bits, 8)  # elements and bytes repeat together
    before = jnp.roll(codes_BHTC, 1, axis=-1).astype(jnp.uint16)
    word = before << jnp.uint16(8) | codes_BHTC.astype(jnp.uint16)
    word = word.reshape(*lead, width // nbytes, nbytes)
    ends = range(bits, 8 * nbytes + 1, bits)
    fields = [word[..., (e - 1) // 8] >> jnp.uint16(-e % 8) for e in ends]
    mask = jnp.uint16(2**MEMORY - 1)
    windows = jnp.stack([(f & mask).astype(jnp.uint8) for f in fields], axis=-1)
    return windows.reshape(*lead, 8 * width // bits)
