"""Decoding on Hopper: one pass, bounded by memory.

D / 16 threads share a token (`gpu.channels`), so that a rotation finds both channels of its pairs in one
thread under either pairing, and rows of centroids and results are whole lines of memory. Values in e4m3
pass through shared memory once, because the second product of an 8-bit attention wants them with tokens
adjacent.

Source of the idea to write values transposed: Shah et al., FlashAttention-3 (arXiv 2407.08608),
section 3.3, which transposes inside attention; here the decoder does it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dequantize.affine import AffineRow
from pallas_kernels.dequantize.readers import DenseRow, EncodedRow
from pallas_kernels.dequantize.swizzle import QUADS, Swizzle
from pallas_kernels.dequantize.types import (
    Encoded,
    Rotation,
    Source,
    Tuning,
    padded,
    picked,
    width_of,
)
from pallas_kernels.dequantize.work import control_of, ctas_of, work_of
from pallas_kernels.gpu.channels import CHANNELS, store_channels
from pallas_kernels.gpu.lanes import (
    Lane,
    bf16_pair,
    cta,
    e4m3_words,
    global_address,
    integer,
    load,
    permute_bytes,
    select,
    shared_address,
    shared_load,
    shared_store,
    store,
    thread,
)
from pallas_kernels.gpu.rotate import cos_sin_halves, load_cos_sin, rotate, rotate_halves

__all__ = ["decode_keys", "decode_values"]

_VALUE_TOKENS = 128  # tokens of a CTA that transposes

_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def _prepared(
    source: Source, factor_n: Array | None
) -> tuple[tuple[Array, ...], Array, type[DenseRow] | type[EncodedRow]]:
    """The arrays that a kernel reads, a factor of every row, and the class that reads a row.

    The few centroids of the decoded rows are cut out. For e4m3 they become float16 times `factor_n`,
    which takes half the instructions; eleven bits are plenty under e4m3's four. The factor of a row
    multiplies its scales; rows whose exponents differ from span to span have one for every span. Where
    channels have deviations, those take the place of scales in all of this.
    """
    stored, scheme, rows = source.stored, source.scheme, source.rows
    factor = jnp.ones((rows,), jnp.float32) if factor_n is None else factor_n
    if not isinstance(stored, Encoded):
        return (stored,), factor, DenseRow
    first_row, spans = source.first_row, source.first_row.size
    arrays = [stored.codes_RTC, stored.scales_RTG]
    if stored.exponents_R is not None:
        exponents = picked(stored.exponents_R, first_row, rows)
        factor = jnp.tile(factor, spans) * jnp.exp2(exponents.astype(jnp.float32))
    if scheme.zero_points:
        arrays.append(stored.zeros_RTG)
    if scheme.deviations:
        deviations = picked(stored.deviations_RD, first_row, rows).astype(jnp.float32)
        deviations *= jnp.tile(factor, deviations.shape[0] // factor.size)[:, None]
        arrays.append(deviations.astype(jnp.float32 if factor_n is None else jnp.float16))
        factor = jnp.ones((rows,), jnp.float32)
    if scheme.stages:
        centroids = stored.centroids(first_row, rows)
        if factor_n is None:
            centroids = centroids.astype(jnp.bfloat16)
        else:
            centroids *= jnp.tile(factor_n, spans)[:, None, None, None]
            centroids = centroids.astype(jnp.float16)
        arrays += [stored.ids_RST, centroids]
    return tuple(arrays), factor, AffineRow if scheme.affine else EncodedRow


def decode_keys(
    source: Source,
    valid: Array,
    dtype: Any,
    scale_n: Array | None,
    rotation: Rotation | None,
    *,
    room: int = 0,
    into: tuple[Array, Array] | None = None,
    tuning: Tuning | None = None,
) -> Array:
    """See `api.decode_keys`, or with `into`, a workspace and a token of it, `api.append_keys`."""
    tuning = Tuning() if tuning is None else tuning
    fp8, rows = dtype != jnp.bfloat16, source.rows
    arrays, factor, reader = _prepared(source, 1 / scale_n if fp8 else None)
    shapes, stored = [x.shape for x in arrays], arrays[0].shape[1]
    d = width_of(source.stored, source.scheme)
    lanes, cta_tokens = d // CHANNELS, tuning.tokens * 128 // d
    at_once = 128 // lanes  # tokens that a warpgroup holds
    spans, tokens = source.first_row.size, source.tokens
    behind = into is not None
    size = into[0].shape[1] if behind else padded(spans * tokens + room)
    heads = rows if rotation is None else rows // rotation.batch
    pair = max(p for p in (1, 2, 4) if p <= tuning.heads and heads % p == 0)
    control = control_of(source, valid, rotation, into)
    cos_sin = () if rotation is None else tuple(rotation.cos_sin)
    pairing = None if rotation is None else rotation.pairing

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def run(ctx, *refs):
            del ctx
            control, factors, *rest, out = refs
            packed, cos_sin = rest[: len(arrays)], rest[len(arrays) :]
            work = work_of(control, source, pair, behind)
            head, valid = work.head, work.valid
            lane, lane_group = thread() % lanes, thread() // lanes
            readers, row_factors, outs = [], [], []
            for h in range(pair):
                row = work.row_of(head + h)
                readers.append(reader(packed, shapes, source.scheme, row, work.cut_row + h))
                at = (head if factor.size == rows else work.cut_row) + h
                (word,) = load(global_address(factors) + (at * 4).wide(), 4)
                row_factors.append(word.as_float())
                width = d * (1 if fp8 else 2)
                outs.append(global_address(out) + (head + h).wide() * (size * width))
            if cos_sin:
                row = work.angles + head // heads
                starts = [global_address(x) + row.wide() * (stored * d * 2) for x in cos_sin]

            with utils.when(work.needed(cta("x") * cta_tokens)):
                for step in range(cta_tokens // at_once):
                    token = cta("x") * cta_tokens + lane_group + step * at_once
                    in_span = token < valid
                    safe = work.read(select(in_span, token, integer(0)))
                    angles = load_cos_sin(starts if cos_sin else [], safe, lane, pairing, d)
                    if angles and fp8:
                        angles = cos_sin_halves(angles, pairing)
                    for h in range(pair):
                        if fp8:
                            x = readers[h].halves(safe, lane, row_factors[h])
                            x = rotate_halves(x, angles, pairing) if angles else x
                            words = e4m3_words(x)
                            # See reference.key_row_of_token.
                            inside = ((token & 2) << 2) | ((token >> 1) & 6) | (token & 1)
                            to = work.to((token & -16) | inside) * d + lane * 8
                        else:
                            x = readers[h].floats(safe, lane, row_factors[h])
                            x = rotate(x, angles, pairing) if angles else x
                            words = [bf16_pair(x[i], x[i + 1]) for i in range(0, 16, 2)]
                            to = work.to(token) * (2 * d) + lane * 16
                        words = [select(in_span, w, integer(0)) for w in words]
                        store_channels(outs[h] + to.wide(), words, d, work.written(token))

        run(*refs)

    return _run(
        body,
        (control, factor, *arrays, *cos_sin),
        jax.ShapeDtypeStruct((rows, size, d), dtype),
        into,
        grid=(spans * rows // pair, ctas_of(spans, tokens, cta_tokens, behind)),
        kernel_name="decode_keys",
    )


def _run(
    body: Any, operands: tuple[Array, ...], out: Any, into: tuple[Array, Array] | None, **more: Any
) -> Array:
    """Runs a decoding kernel; returns its output, or the workspace that it wrote into."""
    ref = None if into is None else jax.new_ref(into[0])
    kernel = plgpu.kernel(
        body,
        out_type=out if ref is None else (),
        grid_names=("head", "tile"),
        compiler_params=_PARAMS,
        **more,
    )
    if ref is None:
        return kernel(*operands)
    kernel(*operands, ref)
    return ref[...]


def decode_values(
    source: Source,
    valid: Array,
    dtype: Any,
    scale_n: Array | None,
    *,
    room: int = 0,
    into: tuple[Array, Array] | None = None,
    tuning: Tuning | None = None,
) -> Array:
    """See `api.decode_values`, or with `into`, a workspace and a token of it, `api.append_values`."""
    if dtype == jnp.bfloat16:
        return decode_keys(source, valid, dtype, None, None, room=room, into=into, tuning=tuning)
    rows = source.rows
    arrays, factor, reader = _prepared(source, 1 / scale_n)
    shapes = [x.shape for x in arrays]
    spans, tokens = source.first_row.size, source.tokens
    behind = into is not None
    size = into[0].shape[2] if behind else padded(spans * tokens + room)
    control = control_of(source, valid, None, into)
    swizzle = Swizzle(d := width_of(source.stored, source.scheme))

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def run(ctx, *refs):
            del ctx
            control, factors, *packed, out, tile = refs
            work = work_of(control, source, 1, behind)
            head, lane, lane_group = work.head, thread() % swizzle.lanes, thread() // swizzle.lanes
            row = reader(packed, shapes, source.scheme, work.row_of(head), work.cut_row)
            at = head if factor.size == rows else work.cut_row
            (word,) = load(global_address(factors) + (at * 4).wide(), 4)
            row_factor, tile = word.as_float(), shared_address(tile)
            first = cta("x") * _VALUE_TOKENS
            with utils.when(work.needed(first)):
                quad0 = swizzle.first_quad(lane_group)
                for step in range(swizzle.steps):
                    quad, i = swizzle.token(quad0, step)
                    inside = quad * 4 + i
                    token = first + inside
                    in_span = token < work.valid
                    safe = work.read(select(in_span, token, integer(0)))
                    words = e4m3_words(row.halves(safe, lane, row_factor))
                    for w, word in enumerate(words):
                        column = lane * 2 + (d // 8 * (w // 2) + w % 2)
                        word = select(in_span, word, integer(0))
                        at = tile + swizzle.row(inside, quad, i) + swizzle.word(column, quad)
                        shared_store(at, word)
                utils.warpgroup_barrier()
                warp, quad = thread() // 32, thread() % QUADS
                token = first + quad * 4
                to = global_address(out) + head.wide() * (d * size) + work.to(token).wide()
                for step in range(d // 4 // 4):
                    column = warp * (d // 4 // 4) + step
                    at = tile + swizzle.start(quad) + swizzle.word(column, quad)
                    for c, word in enumerate(
                        _transposed([shared_load(at + swizzle.next_token * i) for i in range(4)])
                    ):
                        store(to + ((column * 4 + c) * size).wide(), [word], work.written(token))

        run(*refs)

    return _run(
        body,
        (control, factor, *arrays),
        jax.ShapeDtypeStruct((rows, d, size), dtype),
        into,
        scratch_types=[plgpu.SMEM((_VALUE_TOKENS * d // 4,), jnp.int32)],
        grid=(spans * rows, ctas_of(spans, tokens, _VALUE_TOKENS, behind)),
        kernel_name="decode_values",
    )


def _transposed(rows: list[Lane]) -> list[Lane]:
    """The columns of a matrix of four by four bytes, from its rows."""
    low01, high01 = (permute_bytes(rows[0], rows[1], s) for s in (0x5140, 0x7362))
    low23, high23 = (permute_bytes(rows[2], rows[3], s) for s in (0x5140, 0x7362))
    return [
        permute_bytes(low01, low23, 0x5410),
        permute_bytes(low01, low23, 0x7632),
        permute_bytes(high01, high23, 0x5410),
        permute_bytes(high01, high23, 0x7632),
    ]
