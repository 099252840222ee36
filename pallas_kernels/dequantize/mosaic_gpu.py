"""Decoding on Hopper: one pass, bounded by memory.

D / 16 threads share a token and hold the channels 8 i .. 8 i + 7 and D / 2 + 8 i .. of it, so that a
rotation finds both channels of its pairs in one thread under either pairing, centroid rows are
read in whole 128-byte lines (64-byte halves of them at D = 64), and so are the results written.
Values in e4m3 pass through shared memory once, because the second product of an 8-bit attention
wants them with tokens adjacent.

Source of the idea to write values transposed: Shah et al., FlashAttention-3 (arXiv 2407.08608),
section 3.3, which transposes inside attention; here the decoder does it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dequantize.banks import QUADS, Banks
from pallas_kernels.dequantize.place import blocks_of, control_of, place_of
from pallas_kernels.dequantize.rows import (
    CHANNELS,
    DenseRow,
    EncodedRow,
    past,
    store_channels,
)
from pallas_kernels.dequantize.types import Encoded, Rotation, Source, padded, picked, width_of
from pallas_kernels.gpu.lanes import (
    Halves,
    Lane,
    bf16_pair,
    block,
    e4m3_words,
    global_address,
    halves,
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

__all__ = ["Tuning", "decode_keys", "decode_values", "load_turn", "rotate"]

_VALUE_TOKENS = 128  # tokens of a block that transposes

_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result.

    Attributes:
        tokens: of a block, if they have 128 channels: half as many of 256, twice as many of 64; a
            multiple of 16.
        heads: of a block, which share the sines; the largest of 1, 2, 4 up to it that divides the
            heads.
    """

    tokens: int = 64
    heads: int = 2


def load_turn(
    starts: list[Lane], token: Lane, lane: Lane, pairing: str, d: int
) -> list[list[Lane]]:
    """Cosines and sines of a thread's channels in a token, from the tables at these addresses."""
    turn = []
    for start in starts:
        start = start + (token * (2 * d)).wide()
        if pairing == "half":
            start = start + (lane * 32).wide()
            words = load(start, 16) + load(past(start, 16), 16)
        else:
            start = start + (lane * 16).wide()
            words = load(start, 16) + load(past(start, d), 16)
        turn.append([w.as_float() for w in words])
    return turn


def rotate(x: list[Lane], turn: list[list[Lane]], pairing: str) -> list[Lane]:
    """The sixteen channels of a thread, turned."""
    (cos, sin), out = turn, [None] * 16
    for j in range(8):
        first, second = (j, 8 + j) if pairing == "half" else (2 * j, 2 * j + 1)
        a, b, c, s = x[first], x[second], cos[j], sin[j]
        out[first] = a.fma(c, b * (s * -1.0))
        out[second] = a.fma(s, b * c)
    return out


def _half_turn(turn: list[list[Lane]], pairing: str) -> tuple[list[Halves], ...]:
    """Sines as `_rotate_halves` wants them; made once for all heads of a block."""
    cos, sin = turn
    if pairing == "half":
        pairs = lambda t: [halves(a, b) for a, b in zip(t[0::2], t[1::2], strict=True)]  # noqa: E731
        s = pairs(sin)
        return pairs(cos), s, [h.minus() for h in s]
    return [halves(c, c) for c in cos], [halves(s * -1.0, s) for s in sin]


def _rotate_halves(x: list[Halves], turn: tuple[list[Halves], ...], pairing: str) -> list[Halves]:
    if pairing == "half":
        low, high = x[:4], x[4:]
        four = tuple(zip(low, high, *turn, strict=True))
        return [a.fma(c, b * m) for a, b, c, s, m in four] + [
            a.fma(s, b * c) for a, b, c, s, m in four
        ]
    return [a.fma(c, a.swapped() * s) for a, c, s in zip(x, *turn, strict=True)]


def _prepared(
    source: Source, factor_n: Array | None
) -> tuple[tuple[Array, ...], Array, type[DenseRow] | type[EncodedRow]]:
    """The arrays that a kernel reads, a factor of every row, and the class that reads a row.

    The few centroids of the decoded rows are cut out. For e4m3 they become float16 times `factor_n`,
    which takes half the instructions; eleven bits are plenty under e4m3's four. The factor of a row
    multiplies its scales; rows whose exponents differ from span to span have one for every span.
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
    if scheme.stages:
        centroids = stored.centroids(first_row, rows)
        if factor_n is None:
            centroids = centroids.astype(jnp.bfloat16)
        else:
            centroids *= jnp.tile(factor_n, spans)[:, None, None, None]
            centroids = centroids.astype(jnp.float16)
        arrays += [stored.ids_RST, centroids]
    return tuple(arrays), factor, EncodedRow


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
    windowed, behind = source.window is not None, into is not None
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
            place = place_of(control, spans, tokens, rows, pair, windowed, behind)
            head, valid = place.head, place.valid
            lane, mine = thread() % lanes, thread() // lanes
            readers, share, outs = [], [], []
            for h in range(pair):
                row = place.row + head + h
                readers.append(reader(packed, shapes, source.scheme, row, place.cut + h))
                at = (head if factor.size == rows else place.cut) + h
                (word,) = load(global_address(factors) + (at * 4).wide(), 4)
                share.append(word.as_float())
                width = d * (1 if fp8 else 2)
                outs.append(global_address(out) + (head + h).wide() * (size * width))
            if cos_sin:
                row = place.angles + head // heads
                starts = [global_address(x) + row.wide() * (stored * d * 2) for x in cos_sin]

            with utils.when(place.needed(block("x") * cta_tokens)):
                for step in range(cta_tokens // at_once):
                    token = block("x") * cta_tokens + mine + step * at_once
                    there = token < valid
                    safe = place.read(select(there, token, integer(0)))
                    turn = load_turn(starts if cos_sin else [], safe, lane, pairing, d)
                    if turn and fp8:
                        turn = _half_turn(turn, pairing)
                    for h in range(pair):
                        if fp8:
                            x = readers[h].halves(safe, lane, share[h])
                            words = e4m3_words(_rotate_halves(x, turn, pairing) if turn else x)
                            # See reference.key_row_of_token.
                            inside = ((token & 2) << 2) | ((token >> 1) & 6) | (token & 1)
                            to = place.to((token & -16) | inside) * d + lane * 8
                        else:
                            x = readers[h].floats(safe, lane, share[h])
                            x = rotate(x, turn, pairing) if turn else x
                            words = [bf16_pair(x[i], x[i + 1]) for i in range(0, 16, 2)]
                            to = place.to(token) * (2 * d) + lane * 16
                        words = [select(there, w, integer(0)) for w in words]
                        store_channels(outs[h] + to.wide(), words, d, place.written(token))

        run(*refs)

    return _run(
        body,
        (control, factor, *arrays, *cos_sin),
        jax.ShapeDtypeStruct((rows, size, d), dtype),
        into,
        grid=(spans * rows // pair, blocks_of(spans, tokens, cta_tokens, behind)),
        kernel_name="decode_keys",
    )


def _run(
    body: Any, operands: tuple[Array, ...], out: Any, into: tuple[Array, Array] | None, **more: Any
) -> Array:
    """The kernel's output, or the workspace that it wrote into."""
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
    windowed, behind = source.window is not None, into is not None
    size = into[0].shape[2] if behind else padded(spans * tokens + room)
    control = control_of(source, valid, None, into)
    banks = Banks(d := width_of(source.stored, source.scheme))

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def run(ctx, *refs):
            del ctx
            control, factors, *packed, out, tile = refs
            place = place_of(control, spans, tokens, rows, 1, windowed, behind)
            head, lane, mine = place.head, thread() % banks.lanes, thread() // banks.lanes
            row = reader(packed, shapes, source.scheme, place.row + head, place.cut)
            at = head if factor.size == rows else place.cut
            (word,) = load(global_address(factors) + (at * 4).wide(), 4)
            share, tile = word.as_float(), shared_address(tile)
            first = block("x") * _VALUE_TOKENS
            with utils.when(place.needed(first)):
                quad0 = banks.first_quad(mine)
                for step in range(banks.steps):
                    quad, i = banks.token(quad0, step)
                    inside = quad * 4 + i
                    token = first + inside
                    there = token < place.valid
                    safe = place.read(select(there, token, integer(0)))
                    words = e4m3_words(row.halves(safe, lane, share))
                    for w, word in enumerate(words):
                        column = lane * 2 + (d // 8 * (w // 2) + w % 2)
                        word = select(there, word, integer(0))
                        at = tile + banks.row(inside, quad, i) + banks.word(column, quad)
                        shared_store(at, word)
                utils.warpgroup_barrier()
                warp, quad = thread() // 32, thread() % QUADS
                token = first + quad * 4
                to = global_address(out) + head.wide() * (d * size) + place.to(token).wide()
                for step in range(d // 4 // 4):
                    column = warp * (d // 4 // 4) + step
                    at = tile + banks.start(quad) + banks.word(column, quad)
                    for c, word in enumerate(
                        _transposed([shared_load(at + banks.next_token * i) for i in range(4)])
                    ):
                        store(to + ((column * 4 + c) * size).wide(), [word], place.written(token))

        run(*refs)

    return _run(
        body,
        (control, factor, *arrays),
        jax.ShapeDtypeStruct((rows, d, size), dtype),
        into,
        scratch_types=[plgpu.SMEM((_VALUE_TOKENS * d // 4,), jnp.int32)],
        grid=(spans * rows, blocks_of(spans, tokens, _VALUE_TOKENS, behind)),
        kernel_name="decode_values",
    )


def _transposed(rows: list[Lane]) -> list[Lane]:
    """Four words of four bytes, rows to columns."""
    low01, high01 = (permute_bytes(rows[0], rows[1], s) for s in (0x5140, 0x7362))
    low23, high23 = (permute_bytes(rows[2], rows[3], s) for s in (0x5140, 0x7362))
    return [
        permute_bytes(low01, low23, 0x5410),
        permute_bytes(low01, low23, 0x7632),
        permute_bytes(high01, high23, 0x5410),
        permute_bytes(high01, high23, 0x7632),
    ]
