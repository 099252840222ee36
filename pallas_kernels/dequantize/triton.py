"""Decoding in Triton, for GPUs from Ampere on: one pass, bounded by memory.

A program decodes a tile of tokens of a few rows (heads), which share the cosines and sines it read.
Where channels j and j + D / 2 are a pair, the two halves of a token are decoded apart; neighbouring channels
are split and joined in registers.

Source of the language: Tillet, Kung and Cox, Triton (MAPL 2019).
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array

from pallas_kernels.dequantize.dither import CHANNEL_STEP, FINE, TOKEN_SHIFT, TOKEN_STEP
from pallas_kernels.dequantize.types import (
    PAD,
    Encoded,
    Rotation,
    Spans,
    Tokens,
    Tuning,
    padded,
    picked,
)
from pallas_kernels.gpu.triton_launch import Launch
from pallas_kernels.gpu.triton_words import e4m3_float, e4m3_signed, rotate

__all__ = ["decode_keys", "decode_values", "launch_for"]

_SIZES = Tuning(tokens=32, heads=4)  # of a program
_PAD = tl.constexpr(PAD)
_FINE, _CHANNEL_STEP = tl.constexpr(FINE), tl.constexpr(CHANNEL_STEP)
_TOKEN_STEP, _TOKEN_SHIFT = tl.constexpr(TOKEN_STEP), tl.constexpr(TOKEN_SHIFT)


@triton.jit
def _packed(
    codes, scales, zeros, ids, centroids, factors, row, head, token,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
    TOKENS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    STAGES: tl.constexpr, CENTROIDS: tl.constexpr, DITHERED: tl.constexpr, ZEROS: tl.constexpr,
    DEVIATIONS: tl.constexpr,
):  # fmt: skip
    """Channels FIRST .. FIRST + WIDTH of some tokens of a packed row, float32 [TILE, WIDTH]."""
    BYTES: tl.constexpr = D * BITS // 8
    GROUPS: tl.constexpr = D // GROUP
    channel = FIRST + tl.arange(0, WIDTH)
    bit = channel * BITS
    at = codes + row * (TOKENS * BYTES) + token[:, None] * BYTES + (bit // 8)[None, :]
    if BITS == 3:  # a code may begin in one byte and end in the next
        more = (bit % 8 > 5)[None, :] & (token >= 0)[:, None]
        word = (tl.load(at).to(tl.int32) << 8) | tl.load(at + 1, mask=more, other=0).to(tl.int32)
        code = (word >> (16 - BITS - bit % 8)[None, :]) & (2**BITS - 1)
    else:
        code = (tl.load(at).to(tl.int32) >> (8 - BITS - bit % 8)[None, :]) & (2**BITS - 1)
    if DITHERED:
        shift = (token.to(tl.uint32) * _TOKEN_STEP) >> _TOKEN_SHIFT
        shift = shift.to(tl.int32)[:, None] + channel[None, :] * _CHANNEL_STEP
        code = code * _FINE | (shift & (_FINE - 1))
    # 2^22 + code as float32, where a step is a half: no conversion, which runs at a low rate.
    x = ((code << 1) | 0x4A800000).to(tl.float32, bitcast=True) - (4194304.0 + OFFSET)

    start = scales + row * (TOKENS * GROUPS)
    factor = 1.0 if DEVIATIONS else tl.load(factors + head)
    if DITHERED:
        factor *= 1.0 / _FINE
    if GROUP >= WIDTH:
        scale = e4m3_float(tl.load(start + token * GROUPS + FIRST // GROUP)) * factor
        x *= scale[:, None]
    else:
        group = FIRST // GROUP + tl.arange(0, WIDTH // GROUP)
        scale = e4m3_float(tl.load(start + token[:, None] * GROUPS + group[None, :])) * factor
        x = tl.reshape(x, (TILE, WIDTH // GROUP, GROUP)) * scale[:, :, None]
        x = tl.reshape(x, (TILE, WIDTH))
    if ZEROS:
        factor = 1.0 if DEVIATIONS else tl.load(factors + head)
        at = zeros + row * (TOKENS * GROUPS) + token[:, None] * GROUPS + (channel // GROUP)[None, :]
        x += e4m3_signed(tl.load(at)) * factor
    if DEVIATIONS:
        x *= tl.load(factors + head * D + channel)[None, :]

    for s in tl.static_range(STAGES):
        chosen = tl.load(ids + (row * STAGES + s) * TOKENS + token).to(tl.int32)
        place = ((head * STAGES + s) * CENTROIDS + chosen) * D
        x += tl.load(centroids + place[:, None] + channel[None, :]).to(tl.float32)
    return x


@triton.jit
def _channels(
    codes, scales, zeros, ids, centroids, factors, row, head, token,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
    TOKENS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    STAGES: tl.constexpr, CENTROIDS: tl.constexpr, DITHERED: tl.constexpr, ZEROS: tl.constexpr,
    DEVIATIONS: tl.constexpr,
):  # fmt: skip
    """The channels of some tokens of a packed row or, if BITS is 16, of a bf16 row, which is `codes`."""
    if BITS == 16:
        channel = FIRST + tl.arange(0, WIDTH)
        x = tl.load(codes + row * (TOKENS * D) + token[:, None] * D + channel[None, :])
        x = x.to(tl.float32)
    else:
        x = _packed(
            codes, scales, zeros, ids, centroids, factors, row, head, token,
            FIRST, WIDTH, TILE, D, TOKENS, BITS, GROUP, OFFSET, STAGES, CENTROIDS,
            DITHERED, ZEROS, DEVIATIONS,
        )  # fmt: skip
    return x


@triton.jit
def _store(to, x, written, MASKED: tl.constexpr):
    """Stores a tile of tokens, or those that are written."""
    if MASKED:
        tl.store(to, x.to(to.dtype.element_ty), mask=written[:, None])
    else:
        tl.store(to, x.to(to.dtype.element_ty))


@triton.jit
def _decode(
    control, factors, codes, scales, ids, centroids, cos, sin, zeros, out,
    D: tl.constexpr, TOKENS: tl.constexpr, SPANS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, STAGES: tl.constexpr, CENTROIDS: tl.constexpr,
    HEADS: tl.constexpr, TOGETHER: tl.constexpr, PAIRING: tl.constexpr, TILE: tl.constexpr,
    DITHERED: tl.constexpr, ZEROS: tl.constexpr, DEVIATIONS: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of TOGETHER rows; HEADS of them share cosines and sines.

    The last of SPANS spans reaches to the end of the workspace, which has WIDTH tokens.
    """
    valid = tl.load(control)
    PER_SPAN: tl.constexpr = (TOKENS + TILE - 1) // TILE
    span = tl.minimum(tl.program_id(1) // PER_SPAN, SPANS - 1)
    start = (tl.program_id(1) - span * PER_SPAN) * TILE
    before = span * TOKENS  # tokens of the workspace
    first_row = tl.load(control + 1 + span).to(tl.int64)
    first_angles = tl.load(control + 1 + SPANS + span).to(tl.int64)
    first_head = tl.program_id(0) * TOGETHER
    token = start + tl.arange(0, TILE)
    written = before + token < tl.where(span == SPANS - 1, WIDTH, before + TOKENS)
    to = out + first_head.to(tl.int64) * (WIDTH * D) + (before + token)[:, None] * D
    HALF: tl.constexpr = D // 2
    low = tl.arange(0, HALF)
    channel = tl.arange(0, D)
    # Of a workspace that is not written whole, attention reads up to the next multiple of PAD.
    end = WIDTH if WHOLE else (valid + _PAD - 1) // _PAD * _PAD
    if before + start < valid:
        in_span = before + token < tl.minimum(valid, before + TOKENS)
        safe = tl.where(in_span, token, 0)
        if PAIRING != "none":
            row = first_angles + first_head // HEADS
            angle = row * (TOKENS * HALF) + safe[:, None] * HALF + low[None, :]
            c = tl.load(cos + angle)
            s = tl.load(sin + angle)
        for h in tl.static_range(TOGETHER):
            row = first_row + first_head + h
            head = span * ROWS + first_head + h
            at = to + h * (WIDTH * D)
            if PAIRING == "half":
                a = _channels(
                    codes, scales, zeros, ids, centroids, factors, row, head, safe,
                    0, HALF, TILE, D, TOKENS, BITS, GROUP, OFFSET, STAGES, CENTROIDS,
                    DITHERED, ZEROS, DEVIATIONS,
                )  # fmt: skip
                b = _channels(
                    codes, scales, zeros, ids, centroids, factors, row, head, safe,
                    HALF, HALF, TILE, D, TOKENS, BITS, GROUP, OFFSET, STAGES, CENTROIDS,
                    DITHERED, ZEROS, DEVIATIONS,
                )  # fmt: skip
                a, b = rotate(a, b, c, s)
                y, z = tl.where(in_span[:, None], a, 0), tl.where(in_span[:, None], b, 0)
                _store(at + low[None, :], y, written, MASKED)
                _store(at + (HALF + low)[None, :], z, written, MASKED)
            else:
                x = _channels(
                    codes, scales, zeros, ids, centroids, factors, row, head, safe,
                    0, D, TILE, D, TOKENS, BITS, GROUP, OFFSET, STAGES, CENTROIDS,
                    DITHERED, ZEROS, DEVIATIONS,
                )  # fmt: skip
                if PAIRING == "interleaved":
                    a, b = tl.split(tl.reshape(x, (TILE, HALF, 2)))
                    a, b = rotate(a, b, c, s)
                    x = tl.reshape(tl.join(a, b), (TILE, D))
                x = tl.where(in_span[:, None], x, 0)
                _store(at + channel[None, :], x, written, MASKED)
    elif before + start < end:
        for h in tl.static_range(TOGETHER):
            nothing = tl.zeros((TILE, D), tl.float32)
            _store(to + h * (WIDTH * D) + channel[None, :], nothing, written, MASKED)


def launch_for(
    source: Spans | Tokens,
    valid: Array,
    rotation: Rotation | None,
    width: int | None = None,
    tuning: Tuning | None = None,
) -> tuple[Launch, tuple[Array, ...], jax.ShapeDtypeStruct]:
    """The kernel, its arrays and its output; arguments as in `api.decode_keys`."""
    stored, scheme, rows = source.stored, source.scheme, source.rows
    first_row_N = jnp.atleast_1d(jnp.asarray(source.first_row, jnp.int32))
    spans = first_row_N.size
    angles = 0 if rotation is None else rotation.first
    angles_N = jnp.broadcast_to(jnp.asarray(angles, jnp.int32), first_row_N.shape)
    control = jnp.concatenate([valid[None], first_row_N, angles_N]).astype(jnp.int32)
    factor_n = jnp.ones((spans * rows,), jnp.float32)
    if isinstance(stored, Encoded):
        codes, scales = stored.codes_RTC, stored.scales_RTG
        if stored.exponents_R is not None:
            exponents = picked(stored.exponents_R, first_row_N, rows)
            factor_n = jnp.exp2(exponents.astype(jnp.float32))
        ids = centroids = zeros = codes  # not read
        if scheme.zero_points:
            zeros = stored.zeros_RTG
        if scheme.deviations:
            deviations = picked(stored.deviations_RD, first_row_N, rows)
            factor_n = factor_n[:, None] * deviations.astype(jnp.float32)
        if scheme.stages:
            ids = stored.ids_RST
            centroids = stored.centroids(first_row_N, rows).astype(jnp.bfloat16)
        d = codes.shape[2] * 8 // scheme.bits
        form = dict(
            BITS=scheme.bits, GROUP=scheme.group, STAGES=scheme.stages,
            CENTROIDS=centroids.shape[2], DITHERED=scheme.dithered, ZEROS=scheme.zero_points,
            OFFSET=scheme.offset * (FINE if scheme.dithered else 1.0),
            DEVIATIONS=scheme.deviations,
        )  # fmt: skip
    else:
        codes = scales = ids = centroids = zeros = stored
        d = stored.shape[2]
        form = dict(
            BITS=16, GROUP=d, OFFSET=0.0, STAGES=0, CENTROIDS=1, DITHERED=False, ZEROS=False,
            DEVIATIONS=False,
        )  # fmt: skip
    tokens, heads = source.tokens, rows if rotation is None else rows // rotation.batch
    tuning = _SIZES if tuning is None else tuning
    tile, most = tuning.tokens, 1 if rotation is None else tuning.heads
    together = next(n for n in (4, 2, 1) if n <= most and heads % n == 0)
    whole, width = width is not None, padded(spans * tokens) if width is None else width
    last = width - (spans - 1) * tokens  # tokens of the last span and behind it
    launch = Launch(
        kernel=_decode,
        grid=(rows // together, (spans - 1) * -(-tokens // tile) + -(-last // tile)),
        constants=form | dict(
            D=d, TOKENS=tokens, SPANS=spans, ROWS=rows, WIDTH=width, WHOLE=whole,
            MASKED=last % tile != 0 or (spans > 1 and tokens % tile != 0), HEADS=heads,
            TOGETHER=together, PAIRING="none" if rotation is None else rotation.pairing,
            TILE=tile,
        ),
    )  # fmt: skip
    cos, sin = (factor_n, factor_n) if rotation is None else rotation.cos_sin
    operands = (control, factor_n, codes, scales, ids, centroids, cos, sin, zeros)
    return launch, operands, jax.ShapeDtypeStruct((rows, width, d), jnp.bfloat16)


def decode_keys(
    source: Spans | Tokens,
    valid: Array,
    rotation: Rotation | None,
    width: int | None = None,
    tuning: Tuning | None = None,
) -> Array:
    """See `api.decode_keys`; the result is always bfloat16."""
    launch, operands, out = launch_for(source, valid, rotation, width, tuning)
    return launch(*operands, out=out)


def decode_values(source: Spans | Tokens, valid: Array, width: int | None = None) -> Array:
    """See `api.decode_values`; the result is always bfloat16."""
    return decode_keys(source, valid, None, width)
