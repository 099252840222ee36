"""Quantization with bits given to channels by their energy: reverse water-filling, uniform grids.

Axes: B batch, H heads, T tokens, D head dim, C code bytes of one token, P code bits of one token.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from qvg_jax.codecs.base import Codec, EmptyState, Shape, check_span, per_element
from qvg_jax.codecs.number_format import FormatLike
from qvg_jax.codecs.quantize.levels import best_ratio, midrise_levels, normal_error
from qvg_jax.codecs.quantize.scales import (
    scale_format,
    span_exponent,
    times_power_of_two,
)
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import Storage

__all__ = ["AllocatedPacked", "allocate", "allocated_quantize"]


class AllocatedPacked(NamedTuple):
    """The packed form of `allocated_quantize`; tokens are the last axis, so a code byte is a row."""

    codes_BHCT: UInt8[Array, "B H C T"]
    scales_BHT: Float[Array, "B H T"]
    bits_BHD: UInt8[Array, "B H D"]
    step_BHD: Float[Array, "B H D"]


@functools.cache
def _table(max_bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns, per number of bits, the step in units of the deviation and the lost share of the energy."""
    steps, errors = [0.0], [1.0]
    for bits in range(1, max_bits + 1):
        levels = midrise_levels(2**bits)
        steps.append(best_ratio(levels))
        errors.append(normal_error(levels, steps[-1]))
    return tuple(steps), tuple(errors)


def allocate(
    energy_BHD: Float[Array, "B H D"], total: int, max_bits: int = 8, min_bits: int = 0
) -> Int[Array, "B H D"]:
    """Returns the bits of every channel that leave the least error for `total` bits in all.

    The next bit always goes where it removes most: energy_d (E_b - E_(b+1)), with E_b the error of
    a b-bit mid-rise grid for a normal density. As these gains fall with b, taking them one by one
    is the same as taking the `total` largest of all, which one sort does.

    Args:
        energy_BHD: energy of every channel.
        total: bits of one token, at most max_bits * D.
        max_bits: most bits of one channel, 1 to 8.
        min_bits: bits that every channel gets first; min_bits * D is at most `total`.

    Returns:
        int32 bits, min_bits to max_bits, that add up to `total`. Equal channels: the first ones first.
    """
    _, errors = _table(max_bits)
    drop_b = jnp.asarray([a - b for a, b in zip(errors, errors[1:], strict=False)], jnp.float32)
    b, h, d = energy_BHD.shape
    gain_BHbD = energy_BHD[:, :, None] * drop_b[None, None, :, None]
    first_b = (jnp.arange(max_bits, dtype=jnp.int32) < min_bits)[None, None, :, None]
    gain_BHbD = jnp.where(first_b, jnp.inf, gain_BHbD)
    order_BHP = jnp.argsort(gain_BHbD.reshape(b, h, -1), axis=-1, descending=True, stable=True)
    rank_BHbD = jnp.argsort(order_BHP, axis=-1).reshape(gain_BHbD.shape)
    return jnp.sum(rank_BHbD < total, axis=2, dtype=jnp.int32)


@factory
def allocated_quantize(
    bits: float = 2.0,
    *,
    max_bits: int = 8,
    min_bits: int = 0,
    scale_dtype: FormatLike = "e4m3",
    gain: float = 0.0,
    gain_axis: str = "channel",
    refine: int = 2,
) -> Codec:
    """Mid-rise grids with 0 to `max_bits` bits per channel and one scale per token.

    x_td ~ g_t step_d (code_td - (2^b_d - 1) / 2), nothing where b_d = 0.
    b_d are chosen per span and head by `allocate` from the channels' energies and add up to
    bits * D; step_d is the least-error step for channel d's deviation; g_t fits the size of the
    token. `refine` times in turn: deviations given g_t, and g_t by least squares given the codes.

    Least squares shrinks what it stores, channels of few bits most (one bit: to 0.64). `gain` p
    undoes part of it after the codes are chosen: lsq^(1 - p) match^p, as in `grid_quantize`, with
    inner products over the tokens of a channel (which changes step_d, and costs nothing) or over
    the channels of a token (which changes g_t, as far as e4m3 can tell).

    Worth its bookkeeping where channels differ in energy: after `klt_rotation`, whose channels are
    the span's principal axes, or on plain channels.

    Decode, per element: two byte loads (rows of tokens), shift-or, shift, mask, convert, one
    multiply-add by (step, offset * step), one multiplication by the token's scale. Bits and their
    offsets are the same for all tokens of a head, so a kernel keeps them in registers.

    A NaN or an infinity counts as zero, or as the largest or smallest code, and not for the scales.

    Args:
        bits: average bits per element; bits * D is a multiple of 8.
        max_bits: most bits of one channel, 1 to 8.
        min_bits: least bits of one channel, 0 to `bits`. 0 drops what least error can do without.
        scale_dtype: storage of g_t: "e4m3", "bf16" or "f32".
        gain: 0 (least squares) to 1 (match: <x, x_hat> = <x, x>).
        gain_axis: "channel" or "token".
        refine: at least 1.

    Returns:
        A stateless codec. Per token it stores bits * D / 8 bytes and a scale; per head and span
        one byte and one bfloat16 for every channel.

    Raises:
        ValueError: an argument outside its range; on use, bits * D not a multiple of 8.

    Source: reverse water-filling, Cover & Thomas, Elements of Information Theory, section 10.3.3;
    greedy allocation of whole bits: Fox, "Discrete optimization via marginal analysis" (1966).
    """
    if not 1 <= max_bits <= 8:
        raise ValueError(f"max_bits={max_bits} is not accepted: give 1 to 8")
    if not 0 < bits <= max_bits:
        raise ValueError(f"bits={bits} is not accepted: give more than 0, at most {max_bits=}")
    if not 0 <= min_bits <= bits:
        raise ValueError(f"min_bits={min_bits} is not accepted: give 0 to {bits=}")
    if not 0 <= gain <= 2:
        raise ValueError(f"gain={gain} is not accepted: give 0 (least squares) to 1 (match)")
    if gain_axis not in ("channel", "token"):
        raise ValueError(f"gain_axis={gain_axis!r} is not accepted: give 'channel' or 'token'")
    if refine < 1:
        raise ValueError(f"refine={refine} is not accepted: give 1 or more")
    dtype = scale_format(scale_dtype)
    ratios, errors = _table(max_bits)

    def total_bits(shape: Shape, x_dtype: Any = jnp.float32) -> int:
        check_span(shape, x_dtype)
        total = round(bits * shape[3])
        if total % 8 or abs(total - bits * shape[3]) > 1e-6:
            raise ValueError(
                f"bits={bits} times head_dim={shape[3]} is {bits * shape[3]}; accepted: a multiple "
                "of 8"
            )
        return total

    def init(shape: Shape, x_dtype: Any = jnp.bfloat16) -> EmptyState:
        total_bits(shape, x_dtype)
        return EmptyState()

    def encode(
        x_BHTD: Array, state: EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[AllocatedPacked, EmptyState]:
        del key
        total = total_bits(x_BHTD.shape, x_BHTD.dtype)
        exponent_BH = span_exponent(x_BHTD)
        x_BHTD = times_power_of_two(x_BHTD, -exponent_BH)
        x_BHDT = jnp.swapaxes(jnp.where(jnp.isnan(x_BHTD), 0, x_BHTD), 2, 3)
        known_BHDT = jnp.where(jnp.isfinite(x_BHDT), x_BHDT, 0)
        bits_BHD = allocate(jnp.sum(known_BHDT * known_BHDT, axis=3), total, max_bits, min_bits)
        energy_BHT = jnp.sum(known_BHDT * known_BHDT, axis=2)
        scale_BHT = jnp.sqrt(energy_BHT)
        for _ in range(refine):
            step_BHD = _steps(known_BHDT, scale_BHT, bits_BHD, ratios)
            codes_BHDT = _codes(known_BHDT, scale_BHT, step_BHD, bits_BHD)
            l_BHDT = _levels(codes_BHDT, bits_BHD, step_BHD)
            scale_BHT = _least_squares(known_BHDT, l_BHDT, scale_BHT)
        # The largest scale is stored as 256 to 448: e4m3 keeps three bits down to 2^-14 of it.
        top_BH = jnp.max(scale_BHT, axis=2)
        shift_BH = 8 - jnp.where(top_BH > 0, jnp.frexp(top_BH)[1], 8).astype(jnp.int32)
        step_BHD = times_power_of_two(step_BHD, -shift_BH).astype(jnp.bfloat16)
        step_f32_BHD = step_BHD.astype(jnp.float32)
        scale_BHT = times_power_of_two(scale_BHT, shift_BH)
        rounded_BHT = scale_BHT.astype(dtype).astype(jnp.float32)
        codes_BHDT = _codes(x_BHDT, rounded_BHT, step_f32_BHD, bits_BHD)
        l_BHDT = _levels(codes_BHDT, bits_BHD, step_f32_BHD)
        if gain_axis == "channel":
            hat_BHDT = l_BHDT * rounded_BHT[:, :, None]
            step_f32_BHD *= _gain(known_BHDT, hat_BHDT, gain, axis=3)
        elif gain:
            hat_BHDT = l_BHDT * scale_BHT[:, :, None]
            scale_BHT *= _gain(known_BHDT, hat_BHDT, gain, axis=2)
        stored_BHT = jnp.minimum(scale_BHT, 448.0).astype(dtype)
        step_BHD = times_power_of_two(step_f32_BHD, exponent_BH).astype(jnp.bfloat16)
        codes_BHCT = _pack(codes_BHDT, bits_BHD, total)
        return AllocatedPacked(codes_BHCT, stored_BHT, bits_BHD.astype(jnp.uint8), step_BHD), state

    def decode(packed: AllocatedPacked, dtype: Any = jnp.bfloat16) -> Array:
        bits_BHD = packed.bits_BHD.astype(jnp.int32)
        codes_BHDT = _unpack(packed.codes_BHCT, bits_BHD)
        l_BHDT = _levels(codes_BHDT, bits_BHD, packed.step_BHD.astype(jnp.float32))
        x_BHDT = l_BHDT * packed.scales_BHT.astype(jnp.float32)[:, :, None]
        return jnp.swapaxes(x_BHDT, 2, 3).astype(dtype)

    def nbytes(shape: Shape) -> int:
        total = total_bits(shape)
        b, h, t, d = shape
        return math.prod((b, h)) * (t * (total // 8 + dtype.itemsize) + 3 * d)

    def deficit(packed: AllocatedPacked) -> Array:
        """Returns v - v_hat of `key_bias` for normal channels; channels without bits count as zero."""
        bits_BHD = packed.bits_BHD.astype(jnp.int32)
        ratio_BHD = jnp.asarray(ratios, jnp.float32)[bits_BHD]
        rho_BHD = 1 - jnp.asarray(errors, jnp.float32)[bits_BHD]
        some = ratio_BHD > 0
        unit_BHD = packed.step_BHD.astype(jnp.float32) / jnp.where(some, ratio_BHD, 1)
        rho_BHD = jnp.where(some, rho_BHD, 1)
        variance_BHD = jnp.square(unit_BHD) * rho_BHD ** (2 * gain)
        share_BH = jnp.mean(variance_BHD * (1 - rho_BHD ** (1 - 2 * gain)), axis=2)
        return jnp.square(packed.scales_BHT.astype(jnp.float32)) * share_BH[..., None]

    least = f"-min{min_bits}" if min_bits else ""
    name = f"allocated{bits:g}{least}" + (f"-gain{gain:g}{gain_axis}" if gain else "")
    return Codec(
        init,
        encode,
        decode,
        per_element(nbytes),
        name,
        nbytes,
        Storage("bits that differ from channel to channel"),
        deficit,
    )


def _steps(x_BHDT: Array, scale_BHT: Array, bits_BHD: Array, ratios: tuple[float, ...]) -> Array:
    """Returns the least-error step of every channel for tokens of the given sizes; large ones count most."""
    top = jnp.sum(x_BHDT * x_BHDT, axis=3)
    bottom = jnp.sum(scale_BHT * scale_BHT, axis=2)[..., None]
    deviation_BHD = jnp.sqrt(top / jnp.where(bottom > 0, bottom, 1))
    ratio_BHD = jnp.asarray(ratios, jnp.float32)[bits_BHD]
    return deviation_BHD * ratio_BHD


def _codes(x_BHDT: Array, scale_BHT: Array, step_BHD: Array, bits_BHD: Array) -> Array:
    unit_BHDT = scale_BHT[:, :, None] * step_BHD[..., None]
    count_BHD1 = (1 << bits_BHD).astype(jnp.float32)[..., None]
    ratio_BHDT = x_BHDT / jnp.where(unit_BHDT > 0, unit_BHDT, 1)
    return jnp.clip(jnp.floor(ratio_BHDT + count_BHD1 / 2), 0, count_BHD1 - 1).astype(jnp.uint8)


def _levels(codes_BHDT: Array, bits_BHD: Array, step_BHD: Array) -> Array:
    offset_BHD = ((1 << bits_BHD) - 1).astype(jnp.float32) / 2  # zero for a channel without bits
    return (codes_BHDT.astype(jnp.float32) - offset_BHD[..., None]) * step_BHD[..., None]


def _gain(x_BHDT: Array, hat_BHDT: Array, power: float, axis: int) -> Array:
    """Returns lsq^(1 - p) match^p of reconstructions along an axis, and 1 where a reconstruction is zero."""
    energy = jnp.sum(x_BHDT * x_BHDT, axis=axis)
    along = jnp.sum(x_BHDT * hat_BHDT, axis=axis)
    square = jnp.sum(hat_BHDT * hat_BHDT, axis=axis)
    usable = (along > 0) & (square > 0)
    along = jnp.where(usable, along, 1)
    lsq = jnp.where(usable, along / jnp.where(usable, square, 1), 1)
    match = jnp.where(usable, energy / along, 1)
    return lsq ** (1 - power) * match**power


def _least_squares(x_BHDT: Array, l_BHDT: Array, otherwise_BHT: Array) -> Array:
    along_BHT = jnp.sum(x_BHDT * l_BHDT, axis=2)
    square_BHT = jnp.sum(l_BHDT * l_BHDT, axis=2)
    usable = (along_BHT > 0) & (square_BHT > 0)
    return jnp.where(usable, along_BHT / jnp.where(usable, square_BHT, 1), otherwise_BHT)


def _pack(codes_BHDT: Array, bits_BHD: Array, total: int) -> Array:
    """Returns bytes that hold codes one after another, the first channel's highest bit first."""
    position_P = jnp.arange(total, dtype=jnp.int32)

    def one(codes_DT: Array, bits_D: Array) -> Array:
        end_D = jnp.cumsum(bits_D)
        owner_P = jnp.searchsorted(end_D, position_P, side="right").astype(jnp.int32)
        place_P = (end_D[owner_P] - 1 - position_P).astype(jnp.uint8)
        bit_PT = (codes_DT[owner_P] >> place_P[:, None]) & jnp.uint8(1)
        weight_18 = (jnp.uint8(1) << jnp.arange(7, -1, -1, dtype=jnp.uint8))[None, :, None]
        return jnp.sum(bit_PT.reshape(total // 8, 8, -1) * weight_18, axis=1, dtype=jnp.uint8)

    return jax.vmap(jax.vmap(one))(codes_BHDT, bits_BHD)


def _unpack(codes_BHCT: Array, bits_BHD: Array) -> Array:
    """Returns the codes of all channels, from the two bytes in which each of them lies."""

    def one(codes_CT: Array, bits_D: Array) -> Array:
        begin_D = jnp.cumsum(bits_D) - bits_D
        high_D = jnp.minimum(begin_D // 8, codes_CT.shape[0] - 1)
        low_D = jnp.minimum(high_D + 1, codes_CT.shape[0] - 1)
        rows = lambda i_D: codes_CT.at[i_D].get(mode="promise_in_bounds")  # noqa: E731
        word_DT = rows(high_D).astype(jnp.uint16) << jnp.uint16(8)
        word_DT |= rows(low_D).astype(jnp.uint16)
        shift_D = (16 - begin_D % 8 - bits_D).astype(jnp.uint16)
        mask_D = ((1 << bits_D) - 1).astype(jnp.uint16)
        return ((word_DT >> shift_D[:, None]) & mask_D[:, None]).astype(jnp.uint8)

    return jax.vmap(jax.vmap(one))(codes_BHCT, bits_BHD)
