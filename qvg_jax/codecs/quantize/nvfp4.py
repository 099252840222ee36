"""NVFP4: four-bit floats with a scale per 16 channels and one per span.

Axes: B batch, H heads, T tokens, D head dim, G groups of 16 channels, C code bytes of one token.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from qvg_jax.codecs.base import Codec, EmptyState, Shape, check_span, per_element
from qvg_jax.codecs.quantize.packing import pack, unpack
from qvg_jax.codecs.quantize.scales import span_exponent, times_power_of_two
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import Storage

__all__ = ["NVFP4Packed", "nvfp4_quantize"]

BLOCK = 16
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 without its sign
_E4M3_MAX = 448.0


class NVFP4Packed(NamedTuple):
    """The packed form of `nvfp4_quantize`: code = sign << 3 | E2M1, the first channel of a pair in the high half."""

    codes_BHTC: UInt8[Array, "B H T C"]
    scales_BHTG: Float[Array, "B H T G"]
    span_scale_BH: Float[Array, "B H"]


@factory
def nvfp4_quantize() -> Codec:
    """E2M1 values, one e4m3 scale per 16 channels, one float32 scale per head and span.

    s = max|x| over the span / (6 * 448), s_g = e4m3(max|x_g| / (6 s)),
    value = E2M1 nearest to x / (s_g s), ties to the even mantissa. x ~ value s_g s.
    The format's 16 codes are 15 values (zero has two codes): 4.5 bits per element.

    Decode, per element: unpack, convert E2M1 (one instruction on Blackwell; elsewhere exponent and
    mantissa moved into place), one multiplication by s_g s.

    A NaN is stored as zero, an infinity as +-6 of its block, and neither counts for the scales.
    Spans beyond 1e36 saturate.

    Returns:
        A stateless codec.

    Raises:
        ValueError: on use, a head dim that is not a multiple of 16.

    Source: NVIDIA, "Introducing NVFP4" (2025). Differs: one global scale per head and span, where
    the format has one per tensor; plain rounding, without search for better scales.
    """

    def check(shape: Shape, dtype: Any = jnp.float32) -> None:
        check_span(shape, dtype)
        if shape[3] % BLOCK:
            raise ValueError(f"head_dim={shape[3]} is not accepted: NVFP4 needs a multiple of 16")

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> EmptyState:
        check(shape, dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[NVFP4Packed, EmptyState]:
        del key
        check(x_BHTD.shape, x_BHTD.dtype)
        b, h, t, d = x_BHTD.shape
        exponent_BH = span_exponent(x_BHTD)
        x_BHTD = times_power_of_two(x_BHTD, -exponent_BH)
        x_BHTGg = jnp.where(jnp.isnan(x_BHTD), 0, x_BHTD).reshape(b, h, t, d // BLOCK, BLOCK)
        size_BHTGg = jnp.where(jnp.isfinite(x_BHTGg), jnp.abs(x_BHTGg), 0)
        top_BHTG = jnp.max(size_BHTGg, axis=-1)
        span_BH = jnp.max(top_BHTG, axis=(2, 3)) / (_VALUES[-1] * _E4M3_MAX)
        span_BH11 = jnp.where(span_BH > 0, span_BH, 1)[:, :, None, None]
        scale_BHTG = jnp.minimum(top_BHTG / (_VALUES[-1] * span_BH11), _E4M3_MAX)
        scale_BHTG = scale_BHTG.astype(jnp.float8_e4m3fn)
        unit_BHTG = scale_BHTG.astype(jnp.float32) * span_BH11
        ratio = jnp.abs(x_BHTGg) / jnp.where(unit_BHTG > 0, unit_BHTG, 1)[..., None]
        codes = jnp.zeros(ratio.shape, jnp.uint8)
        for i, (low, high) in enumerate(zip(_VALUES, _VALUES[1:], strict=False)):
            middle = (low + high) / 2
            # Code i + 1 has an even mantissa bit, and so wins ties, for odd i.
            codes += (ratio >= middle if i % 2 else ratio > middle).astype(jnp.uint8)
        codes |= (x_BHTGg < 0).astype(jnp.uint8) << jnp.uint8(3)
        codes_BHTC = pack(codes.reshape(b, h, t, d), 4)
        return NVFP4Packed(codes_BHTC, scale_BHTG, times_power_of_two(span_BH, exponent_BH)), state

    def decode(packed: NVFP4Packed, dtype: Any = jnp.bfloat16) -> Array:
        codes_BHTD = unpack(packed.codes_BHTC, 4)
        size_BHTD = jnp.zeros(codes_BHTD.shape, jnp.float32)
        magnitude = codes_BHTD & jnp.uint8(7)
        for i, value in enumerate(_VALUES):
            size_BHTD = jnp.where(magnitude == i, jnp.float32(value), size_BHTD)
        x_BHTD = jnp.where(codes_BHTD >= 8, -size_BHTD, size_BHTD)
        b, h, t, d = x_BHTD.shape
        scale_BHTG = packed.scales_BHTG.astype(jnp.float32)
        scale_BHTG *= packed.span_scale_BH[:, :, None, None]
        x_BHTGg = x_BHTD.reshape(b, h, t, d // BLOCK, BLOCK) * scale_BHTG[..., None]
        return x_BHTGg.reshape(b, h, t, d).astype(dtype)

    def nbytes(shape: Shape) -> int:
        check(shape)
        b, h, t, d = shape
        return b * h * (t * (d // 2 + d // BLOCK) + 4)

    return Codec(init, encode, decode, per_element(nbytes), "nvfp4", nbytes, Storage("E2M1 values"))
