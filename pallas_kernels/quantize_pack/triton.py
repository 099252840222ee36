"""The last pass of encoding in Triton: residual, scales and codes of tokens whose centroids are known.

A program takes 32 tokens. Everything between reading a token and storing its bytes stays in
registers; scales in e4m3 are rounded with integer arithmetic and codes come from the rounded ones.
Dithered levels are packed by a kernel of its own, which reads residuals.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array

from pallas_kernels.dequantize.dither import CHANNEL_STEP, FINE, TOKEN_SHIFT, TOKEN_STEP
from pallas_kernels.gpu.triton_launch import Launch
from pallas_kernels.gpu.triton_words import e4m3_byte, e4m3_float, e4m3_signed
from pallas_kernels.quantize_pack.types import Dithered, Integers, Midrise

__all__ = ["dithered_launch", "encode", "launch_for", "pack_dithered"]

_TILE = 32  # tokens of a program


@triton.jit
def _bytes(code, TILE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Bytes of the codes of consecutive channels, the first one in the highest bits."""
    EACH: tl.constexpr = 8 // BITS
    shift = (EACH - 1 - tl.arange(0, EACH)) * BITS
    apart = tl.reshape(code, (TILE, D // EACH, EACH)) << shift[None, None, :]
    return tl.sum(apart, 2)


@triton.jit
def _integers(
    r, TILE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Codes and bytes of scales; see `reference.integers`."""
    GROUPS: tl.constexpr = D // GROUP
    q: tl.constexpr = 2 ** (BITS - 1) - 1
    groups = tl.reshape(r, (TILE, GROUPS, GROUP))
    largest = tl.max(tl.abs(groups), 2)
    scale = e4m3_byte(tl.minimum(tl.maximum(largest * (1.0 / q), 1e-10), 448.0))
    step = e4m3_float(scale)
    whole = tl.where(step > 0, step, 1.0)[:, :, None] + tl.zeros_like(groups)
    ratio = tl.math.div_rn(groups, whole)
    size = tl.minimum(tl.floor(tl.abs(ratio) + 0.5), q)  # half away from zero
    level = tl.where((ratio < 0) | (step == 0)[:, :, None], -size, size)
    level = tl.where((step > 0)[:, :, None], level, 0.0)
    return tl.reshape(level + q, (TILE, D)).to(tl.int32), scale


@triton.jit
def _signed_byte(x):
    """The nearest e4m3 number of float32 numbers of either sign, as int32."""
    byte = e4m3_byte(tl.minimum(tl.abs(x), 448.0))
    return tl.where(x < 0, byte + 128, byte)


@triton.jit
def _above_zero_points(
    r, TILE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Codes and bytes of scales and zero points; see `reference.integers`."""
    GROUPS: tl.constexpr = D // GROUP
    q: tl.constexpr = 2**BITS - 1
    groups = tl.reshape(r, (TILE, GROUPS, GROUP))
    low = tl.min(groups, 2)
    zero = _signed_byte(low)
    size = (tl.max(groups, 2) - low) * (1.0 / q)
    scale = e4m3_byte(tl.minimum(tl.maximum(size, 1e-10), 448.0))
    step = e4m3_float(scale)
    above = groups - e4m3_signed(zero)[:, :, None]
    whole = tl.where(step > 0, step, 1.0)[:, :, None] + tl.zeros_like(groups)
    code = tl.floor(tl.math.div_rn(above, whole) + 0.5)
    code = tl.where((step > 0)[:, :, None], tl.minimum(tl.maximum(code, 0.0), q), 0.0)
    return tl.reshape(code, (TILE, D)).to(tl.int32), scale, zero


@triton.jit
def _level(r, scale, BITS: tl.constexpr):
    """Codes 0 .. 2^BITS - 1 of the half-integer levels nearest to r / scale, as float32."""
    inverse = 1.0 / tl.where(scale > 0, scale, 1.0)
    code = tl.floor(r * inverse[:, None] + 2 ** (BITS - 1))
    return tl.minimum(tl.maximum(code, 0.0), 2**BITS - 1)


@triton.jit
def _midrise(
    r, D: tl.constexpr, BITS: tl.constexpr, RATIO: tl.constexpr, REFINE: tl.constexpr,
    RECODE: tl.constexpr,
):  # fmt: skip
    """Codes, least-squares scale and matching scale; see `reference.midrise`."""
    energy = tl.sum(r * r, 1)
    scale = tl.sqrt(energy / D) * RATIO
    code = _level(r, scale, BITS)
    along = tl.zeros_like(scale)
    for i in tl.static_range(REFINE):
        if i > 0:
            code = _level(r, scale, BITS)
        level = code - (2**BITS - 1) / 2
        along = tl.sum(r * level, 1)
        scale = tl.where(along > 0, along / tl.sum(level * level, 1), scale)
    match = tl.where(along > 0, energy / tl.where(along > 0, along, 1.0), scale)
    if RECODE:
        bits = scale.to(tl.int32, bitcast=True)  # four significant bits, as e4m3 has
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        code = _level(r, bits.to(tl.float32, bitcast=True), BITS)
    return code.to(tl.int32), scale, match


@triton.jit
def _encode(
    x, c, ids, main, scales,
    TOKENS: tl.constexpr, D: tl.constexpr, CENTROIDS: tl.constexpr, FORM: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, RATIO: tl.constexpr, REFINE: tl.constexpr,
    RECODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Encodes a tile of tokens of a row; FORM says whether `main` gets codes or the residual."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = token < TOKENS
    safe = tl.where(exists, token, 0)
    channel = tl.arange(0, D)
    which = tl.load(ids + row * TOKENS + safe).to(tl.int32)
    place = (row * CENTROIDS + which) * D
    r = tl.load(x + row * (TOKENS * D) + safe[:, None] * D + channel[None, :]).to(tl.float32)
    r -= tl.load(c + place[:, None] + channel[None, :]).to(tl.float32)
    if FORM == "residual":
        to = main + row * (TOKENS * D) + token[:, None] * D + channel[None, :]
        tl.store(to, r.to(main.dtype.element_ty), mask=exists[:, None])
    else:
        WIDTH: tl.constexpr = D * BITS // 8
        if FORM == "integers" or FORM == "zero points":
            GROUPS: tl.constexpr = D // GROUP
            EACH: tl.constexpr = GROUPS if FORM == "integers" else 2 * GROUPS
            to = scales + row * (TOKENS * EACH) + token[:, None] * EACH
            to += tl.arange(0, GROUPS)[None, :]
            if FORM == "integers":
                code, scale = _integers(r, TILE, D, BITS, GROUP)
            else:
                code, scale, zero = _above_zero_points(r, TILE, D, BITS, GROUP)
                tl.store(to + GROUPS, zero.to(tl.uint8), mask=exists[:, None])
            tl.store(to, scale.to(tl.uint8), mask=exists[:, None])
        else:
            code, scale, match = _midrise(r, D, BITS, RATIO, REFINE, RECODE)
            to = scales + row * (3 * TOKENS) + token
            tl.store(to, scale, mask=exists)
            tl.store(to + TOKENS, match, mask=exists)
            tl.store(to + 2 * TOKENS, tl.max(tl.abs(r), 1), mask=exists)
        to = main + row * (TOKENS * WIDTH) + token[:, None] * WIDTH
        to += tl.arange(0, WIDTH)[None, :]
        tl.store(to, _bytes(code, TILE, D, BITS).to(tl.uint8), mask=exists[:, None])


def launch_for(
    x_RTD: Array, c_RKD: Array, form: Integers | Midrise | None
) -> tuple[Launch, tuple[jax.ShapeDtypeStruct, ...]]:
    """The kernel and its outputs: codes and scales, or the residual and nothing."""
    rows, tokens, d = x_RTD.shape
    about = dict(FORM="residual", BITS=8, GROUP=d, RATIO=0.0, REFINE=0, RECODE=False)
    main, scales = ((rows, tokens, d), jnp.bfloat16), ((1,), jnp.uint8)
    if form is not None:
        main = (rows, tokens, d * form.bits // 8), jnp.uint8
    if isinstance(form, Integers):
        name = "zero points" if form.zero_points else "integers"
        about |= dict(FORM=name, BITS=form.bits, GROUP=form.group)
        scales = (rows, tokens, d // form.group * (1 + form.zero_points)), jnp.uint8
    elif isinstance(form, Midrise):
        about |= dict(
            FORM="midrise", BITS=form.bits, RATIO=float(form.ratio), REFINE=form.refine,
            RECODE=form.recode,
        )  # fmt: skip
        scales = (rows, 3, tokens), jnp.float32
    launch = Launch(
        kernel=_encode,
        grid=(-(-tokens // _TILE), rows),
        constants=about | dict(TOKENS=tokens, D=d, CENTROIDS=c_RKD.shape[1], TILE=_TILE),
    )
    return launch, tuple(jax.ShapeDtypeStruct(*s) for s in (main, scales))


def encode(
    x_RTD: Array, c_RKD: Array, ids_RT: Array, form: Integers | Midrise | None
) -> tuple[Array, ...]:
    """Residuals of tokens whose centroids are known, or the codes and scales of the residuals.

    Args:
        x_RTD: tokens, bf16.
        c_RKD: centroids, bf16.
        ids_RT: centroid of each token, integers.
        form: how the residual becomes codes; None leaves it as it is.

    Returns:
        Codes (R, T, C) and scales: bytes (R, T, G), and those of zero points if there are any, or float32
        (R, 3, T) as `assign_and_pack` has them; or the residual (R, T, D) in bf16 alone.
    """
    launch, out = launch_for(x_RTD, c_RKD, form)
    main, scales = launch(x_RTD, c_RKD, ids_RT, out=out)
    if form is None:
        return (main,)
    if isinstance(form, Integers) and form.zero_points:
        return main, *jnp.split(scales, 2, axis=2)
    return main, scales


@triton.jit
def _pack_dithered(
    r, factor, codes, scales,
    TOKENS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, REACH: tl.constexpr,
    MIDDLE: tl.constexpr, TILE: tl.constexpr, TOKEN_STEP: tl.constexpr, TOKEN_SHIFT: tl.constexpr,
    CHANNEL_STEP: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """Codes and scales of a tile of residuals of a row; see `reference.dithered`."""
    N: tl.constexpr = 2**BITS
    EACH: tl.constexpr = 3 if MIDDLE else 2
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = token < TOKENS
    safe = tl.where(exists, token, 0)
    channel = tl.arange(0, D)
    to = scales + row * (EACH * TOKENS) + token
    y = tl.load(r + row * (TOKENS * D) + safe[:, None] * D + channel[None, :]).to(tl.float32)
    y *= tl.load(factor + row * D + channel)[None, :]
    if MIDDLE:
        low, high = tl.min(y, 1), tl.max(y, 1)
        middle = e4m3_signed(_signed_byte((low + high) * 0.5))
        tl.store(to + 2 * TOKENS, middle, mask=exists)
        y -= middle[:, None]
        size = high - low
    else:
        size = 2 * tl.max(tl.abs(y), 1)
    step = e4m3_float(e4m3_byte(tl.minimum(size * (1.0 / REACH), 448.0)))
    inverse = tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0)
    # Shifted as signed numbers, of which the last six bits are the same.
    j = ((token * TOKEN_STEP) >> TOKEN_SHIFT)[:, None] + (channel * CHANNEL_STEP)[None, :]
    lowest = ((j & (FINE - 1)).to(tl.float32) + 0.5) * (1.0 / FINE) - N / 2
    code = tl.floor(y * inverse[:, None] - lowest + 0.5)
    code = tl.minimum(tl.maximum(code, 0.0), N - 1)
    level = code + lowest
    along, energy = tl.sum(y * level, 1), tl.sum(y * y, 1)
    some = tl.where(along > 0, along, 1.0)
    tl.store(to, tl.where(along > 0, some / tl.sum(level * level, 1), step), mask=exists)
    tl.store(to + TOKENS, tl.where(along > 0, energy / some, step), mask=exists)
    WIDTH: tl.constexpr = D * BITS // 8
    to = codes + row * (TOKENS * WIDTH) + token[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(to, _bytes(code.to(tl.int32), TILE, D, BITS).to(tl.uint8), mask=exists[:, None])


def dithered_launch(
    r_RTD: Array, form: Dithered
) -> tuple[Launch, tuple[jax.ShapeDtypeStruct, ...]]:
    """The kernel that packs residuals on dithered levels, and its outputs: codes and scales."""
    rows, tokens, d = r_RTD.shape
    launch = Launch(
        kernel=_pack_dithered,
        grid=(-(-tokens // _TILE), rows),
        constants=dict(
            TOKENS=tokens, D=d, BITS=form.bits, REACH=float(form.reach), MIDDLE=form.zero_points,
            TILE=_TILE, TOKEN_STEP=TOKEN_STEP, TOKEN_SHIFT=TOKEN_SHIFT, CHANNEL_STEP=CHANNEL_STEP,
            FINE=FINE,
        ),
    )  # fmt: skip
    codes = jax.ShapeDtypeStruct((rows, tokens, d * form.bits // 8), jnp.uint8)
    scales = jax.ShapeDtypeStruct((rows, 2 + form.zero_points, tokens), jnp.float32)
    return launch, (codes, scales)


def pack_dithered(r_RTD: Array, factor_RD: Array, form: Dithered) -> tuple[Array, Array]:
    """Codes (R, T, C) and scales (R, 2 or 3, T) of residuals in bf16, as `quantize_pack.pack_dithered` has them."""
    launch, out = dithered_launch(r_RTD, form)
    codes_RTC, scales_RNT = launch(r_RTD, factor_RD.astype(jnp.float32), out=out)
    return codes_RTC, scales_RNT
