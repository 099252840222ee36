"""Asymmetric integers between a smallest and a largest value, per channel or per token.

Axes: B batch, H heads, T tokens, D head dim, N groups (of tokens of one channel, or of channels of
one token), M the other axis, g members of one group, C code bytes of one token.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, PRNGKeyArray, UInt8

from qvg_jax.codecs.base import Codec, EmptyState, Shape, check_span, per_element
from qvg_jax.codecs.number_format import FormatLike, format_name
from qvg_jax.codecs.quantize.packing import BITS, pack, packed_width, unpack
from qvg_jax.codecs.quantize.scales import (
    load_scale,
    scale_format,
    span_exponent,
    store_scale,
    times_power_of_two,
)
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import Levels, Storage

__all__ = ["MinMaxPacked", "minmax_quantize"]

_AXES = ("channel", "token")


class MinMaxPacked(NamedTuple):
    """The packed form of `minmax_quantize`; scales and zeros are (B, H, M, N), see `axis`."""

    codes_BHTC: UInt8[Array, "B H T C"]
    scales_BHMN: Float[Array, "B H M N"]
    zeros_BHMN: Float[Array, "B H M N"]
    exponents_BH: Int8[Array, "B H"] | None


@factory
def minmax_quantize(
    bits: int = 2,
    group: int = 128,
    axis: str = "channel",
    *,
    clip: float = 1.0,
    percentile: float = 0.0,
    scale_dtype: FormatLike = "bf16",
) -> Codec:
    """Rounds each group to q + 1 = 2^bits even steps between its ends, which are stored.

    zero = low, scale = (high - low) / q, code = round((x - zero) / scale) in 0..q; x ~ code scale
    + zero. low and high are the group's smallest and largest value, moved inwards by `percentile`
    (of the members are left outside on each side) and then by `clip` (the range shrinks to that
    share, around its middle). Both are rounded to storage before the codes are computed; scale
    after zero, so that the upper end is met although the lower one moved.

    axis="channel": a group is `group` consecutive tokens of one channel. Channels of large and
    steady size, as keys have before RoPE, then cost nothing; the last group of a span may be
    shorter. axis="token": a group is `group` channels of one token.

    Decode, per element: unpack (a shift and a mask at 2 bits), convert, one multiply-add.

    What is not finite: a NaN is stored as the code nearest zero, an infinity as the largest or
    smallest code, and neither counts for the ends. An all-zero group decodes to zero.

    Args:
        bits: 2, 3, 4 or 8.
        group: members of a group; on the token axis it divides the head dim.
        axis: "channel" or "token".
        clip: share of the range that is kept, above 0, at most 1.
        percentile: share of the members outside on each side, 0 to below 0.5.
        scale_dtype: storage of scale and zero: "bf16", "f32", or "e4m3" (with one power of two per
            head and span).

    Returns:
        A stateless codec: 2 itemsize(scale_dtype) bytes per group beside the codes.

    Raises:
        ValueError: an argument outside its set; on use, a head dim that the group does not divide
            (token axis) or whose codes do not fill whole bytes.

    Source: Liu et al., "KIVI" (arXiv 2402.02750): keys per channel, values per token. Percentile
    clipping: Hooper et al., "KVQuant" (arXiv 2401.18079), without its separate store of outliers.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits} is not accepted: give 2, 3, 4 or 8")
    if group < 1:
        raise ValueError(f"group={group} is not accepted: give 1 or more")
    if axis not in _AXES:
        raise ValueError(f"axis={axis!r} is not accepted: give 'channel' or 'token'")
    if not 0 < clip <= 1:
        raise ValueError(f"clip={clip} is not accepted: give more than 0, at most 1")
    if not 0 <= percentile < 0.5:
        raise ValueError(f"percentile={percentile} is not accepted: give 0 to below 0.5")
    dtype = scale_format(scale_dtype)
    q, by_channel = 2**bits - 1, axis == "channel"

    def groups(shape: Shape, x_dtype: Any = jnp.float32) -> int:
        check_span(shape, x_dtype)
        _, _, t, d = shape
        packed_width(d, bits)
        if by_channel:
            return -(-t // min(group, t))
        if d % group:
            raise ValueError(f"group={group} must divide head_dim={d}; got remainder {d % group}")
        return d // group

    def split(x_BHTD: Array, n: int) -> Array:
        """Returns (B, H, M, N, g): the grouped axis last, its last group filled up with its last member."""
        x_BHMT = jnp.swapaxes(x_BHTD, 2, 3) if by_channel else x_BHTD
        b, h, m, t = x_BHMT.shape
        g = min(group, t)
        padding = ((0, 0), (0, 0), (0, 0), (0, n * g - t))
        return jnp.pad(x_BHMT, padding, mode="edge").reshape(b, h, m, n, g)

    def join(x_BHMNg: Array, size: int) -> Array:
        b, h, m, n, g = x_BHMNg.shape
        x_BHMT = x_BHMNg.reshape(b, h, m, n * g)[..., :size]
        return jnp.swapaxes(x_BHMT, 2, 3) if by_channel else x_BHMT

    def ends(x_BHMNg: Array) -> tuple[Array, Array]:
        known = jnp.where(jnp.isfinite(x_BHMNg), x_BHMNg, jnp.nan)
        if percentile:
            low, high = (jnp.nanquantile(known, p, axis=-1) for p in (percentile, 1 - percentile))
        else:
            low, high = jnp.nanmin(known, axis=-1), jnp.nanmax(known, axis=-1)
        low, high = (jnp.where(jnp.isnan(end), 0, end) for end in (low, high))
        inwards = (high - low) * (0.5 - clip / 2)
        return low + inwards, high - inwards

    def init(shape: Shape, x_dtype: Any = jnp.bfloat16) -> EmptyState:
        groups(shape, x_dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[MinMaxPacked, EmptyState]:
        del key
        n = groups(x_BHTD.shape, x_BHTD.dtype)
        exponent_BH = span_exponent(x_BHTD)
        x_BHMNg = split(times_power_of_two(x_BHTD, -exponent_BH), n)
        low_BHMN, high_BHMN = ends(x_BHMNg)
        zeros_BHMN, exponents_BH, zero_BHMN = store_scale(low_BHMN, exponent_BH, dtype)
        scale_BHMN = jnp.maximum(high_BHMN - zero_BHMN, 0) / q
        scales_BHMN, _, scale_BHMN = store_scale(scale_BHMN, exponent_BH, dtype)
        above_BHMNg = jnp.where(jnp.isnan(x_BHMNg), 0, x_BHMNg) - zero_BHMN[..., None]
        codes = above_BHMNg / jnp.where(scale_BHMN > 0, scale_BHMN, 1)[..., None]
        codes = jnp.clip(jnp.floor(codes + 0.5), 0, q)
        codes = jnp.where(scale_BHMN[..., None] > 0, codes, 0).astype(jnp.uint8)
        size = x_BHTD.shape[2] if by_channel else x_BHTD.shape[3]
        codes_BHTC = pack(join(codes, size), bits)
        return MinMaxPacked(codes_BHTC, scales_BHMN, zeros_BHMN, exponents_BH), state

    def decode(packed: MinMaxPacked, dtype: Any = jnp.bfloat16) -> Array:
        codes_BHTD = unpack(packed.codes_BHTC, bits).astype(jnp.float32)
        scale_BHMN, zero_BHMN = (
            load_scale(stored, packed.exponents_BH)
            for stored in (packed.scales_BHMN, packed.zeros_BHMN)
        )
        codes_BHMNg = split(codes_BHTD, scale_BHMN.shape[3])
        x_BHMNg = codes_BHMNg * scale_BHMN[..., None] + zero_BHMN[..., None]
        return join(x_BHMNg, codes_BHTD.shape[2 if by_channel else 3]).astype(dtype)

    def nbytes(shape: Shape) -> int:
        n = groups(shape)
        b, h, t, d = shape
        ends_bytes = (d if by_channel else t) * n * 2 * dtype.itemsize
        return b * h * (t * packed_width(d, bits) + ends_bytes + (dtype.itemsize == 1))

    clipped = (f"-clip{clip:g}" if clip < 1 else "") + (f"-p{percentile:g}" if percentile else "")
    name = f"minmax{bits}-{axis}-g{group}{clipped}-{format_name(dtype)}"
    codes = "scales and zero points of a channel, for a group of tokens"
    if not by_channel:
        codes = Levels(
            bits, group, 0, format_name(dtype), zero_points=True, exponents=dtype.itemsize == 1
        )
    return Codec(init, encode, decode, per_element(nbytes), name, nbytes, Storage(codes))
