"""Decoding on Hopper: one pass, bounded by memory.

Eight threads share a token and hold the channels 8 i .. 8 i + 7 and 64 + 8 i .. of it, so that a
rotation finds both channels of its pairs in one thread under either pairing, centroid rows are
read in whole 128-byte lines, and so are the results written. Values in e4m3 pass through shared
memory once, because the second product of an 8-bit attention wants them with tokens adjacent.

Source of the idea to write values transposed: Shah et al., FlashAttention-3 (arXiv 2407.08608),
section 3.3, which transposes inside attention; here the decoder does it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dequantize.rows import HEAD_DIM as D
from pallas_kernels.dequantize.rows import DenseRow, EncodedRow, past
from pallas_kernels.dequantize.types import PAD, Encoded, Scheme, padded
from pallas_kernels.lanes import (
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

__all__ = ["decode_keys", "decode_values"]

_HALF = D // 2
_LANES = 8  # threads per token
_AT_ONCE = 16  # tokens that a warpgroup holds at once
_KEY_TOKENS, _VALUE_TOKENS = 64, 128  # tokens of a block

_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def _rotate(x: list[Lane], turn: list[list[Lane]], pairing: str) -> list[Lane]:
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
    source: Encoded | Array, scheme: Scheme | None, first_row: Array, rows: int, share_n: Any
) -> tuple[tuple[Array, ...], Array, type]:
    """The arrays a kernel reads, the factor of every row's scales, and who reads them.

    The few centroids of the decoded rows are cut out. For e4m3 they become float16 times the rows'
    share: half the instructions, and eleven bits are plenty under e4m3's four.
    """
    share = jnp.ones((rows,), jnp.float32) if share_n is None else share_n
    if not isinstance(source, Encoded):
        return (source,), share, DenseRow
    arrays = [source.codes_RTC, source.scales_RTG]
    pick = lambda x: lax.dynamic_slice_in_dim(x, first_row, rows, 0)  # noqa: E731
    if source.exponents_R is not None:
        share *= jnp.exp2(pick(source.exponents_R).astype(jnp.float32))
    if scheme.stages:
        tables = source.tables(first_row, rows)
        if share_n is None:
            tables = tables.astype(jnp.bfloat16)
        else:
            tables = (tables * share_n[:, None, None, None]).astype(jnp.float16)
        arrays += [source.ids_RST, tables]
    return tuple(arrays), share, EncodedRow


def _needed(first: Lane, valid: Lane) -> Any:
    """Whether any tile of attention reads the tokens from `first` on."""
    return (first < ((valid + (PAD - 1)) & -PAD)).value


def decode_keys(
    source: Encoded | Array,
    scheme: Scheme | None,
    first_row: Array,
    rows: int,
    valid: Array,
    dtype: Any,
    unit_n: Array,
    tables: tuple[Array, Array] | None,
    first_table: Array,
    batch: int,
    pairing: str,
) -> Array:
    """See `api.decode_keys`."""
    narrow, share_n = dtype != jnp.bfloat16, 1 / unit_n
    arrays, share_n, reader = _prepared(
        source, scheme, first_row, rows, share_n if narrow else None
    )
    shapes, tokens = [x.shape for x in arrays], arrays[0].shape[1]
    heads = rows // batch
    pair = 2 if heads % 2 == 0 else 1  # heads of one block: they share their sines
    control = jnp.stack([first_row, first_table, valid]).astype(jnp.int32)
    extra = tuple(tables) if tables is not None else ()

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def run(ctx, *refs):
            del ctx
            control, unit, *rest, out = refs
            packed, tables = rest[: len(arrays)], rest[len(arrays) :]
            first_row, first_table, valid = (
                load(past(global_address(control), 4 * i), 4)[0] for i in range(3)
            )
            head = block("y") * pair
            lane, mine = thread() % _LANES, thread() // _LANES
            readers, units, outs = [], [], []
            for h in range(pair):
                row = first_row + head + h
                readers.append(reader(packed, shapes, scheme, row, head + h))
                (word,) = load(global_address(unit) + ((head + h) * 4).wide(), 4)
                units.append(word.as_float())
                width = D * (1 if narrow else 2)
                outs.append(global_address(out) + (head + h).wide() * (padded(tokens) * width))
            if tables:
                row = first_table + head // heads
                starts = [global_address(t) + row.wide() * (tokens * _HALF * 4) for t in tables]

            with utils.when(_needed(block("x") * _KEY_TOKENS, valid)):
                for step in range(_KEY_TOKENS // _AT_ONCE):
                    token = block("x") * _KEY_TOKENS + mine + step * _AT_ONCE
                    there = token < valid
                    safe = select(there, token, integer(0))
                    turn = []
                    for start in starts if tables else ():
                        start = start + (safe * (_HALF * 4)).wide()
                        words = ()
                        if pairing == "half":
                            start = start + (lane * 32).wide()
                            words = load(start, 16) + load(past(start, 16), 16)
                        else:
                            start = start + (lane * 16).wide()
                            words = load(start, 16) + load(past(start, 128), 16)
                        turn.append([w.as_float() for w in words])
                    if turn and narrow:
                        turn = _half_turn(turn, pairing)
                    for h in range(pair):
                        if narrow:
                            x = readers[h].halves(safe, lane, units[h])
                            words = e4m3_words(_rotate_halves(x, turn, pairing) if turn else x)
                            # See reference.key_row_of_token.
                            inside = ((token & 2) << 2) | ((token >> 1) & 6) | (token & 1)
                            to = ((token & -16) | inside) * D + lane * 8
                        else:
                            x = readers[h].floats(safe, lane, units[h])
                            x = _rotate(x, turn, pairing) if turn else x
                            words = [bf16_pair(x[i], x[i + 1]) for i in range(0, 16, 2)]
                            to = token * (2 * D) + lane * 16
                        words = [select(there, w, integer(0)) for w in words]
                        to, n = outs[h] + to.wide(), len(words) // 2
                        store(to, words[:n])
                        store(past(to, D * n // 4), words[n:])

        run(*refs)

    out = jax.ShapeDtypeStruct((rows, padded(tokens), D), dtype)
    grid = (rows // pair, padded(tokens) // _KEY_TOKENS)
    return plgpu.kernel(
        body,
        out_type=out,
        grid=grid,
        grid_names=("head", "tile"),
        compiler_params=_PARAMS,
        kernel_name="decode_keys",
    )(control, share_n, *arrays, *extra)


def decode_values(
    source: Encoded | Array,
    scheme: Scheme | None,
    first_row: Array,
    rows: int,
    valid: Array,
    dtype: Any,
    unit_n: Array,
) -> Array:
    """See `api.decode_values`."""
    if dtype == jnp.bfloat16:
        first_table = jnp.zeros_like(valid)
        return decode_keys(
            source, scheme, first_row, rows, valid, dtype, unit_n, None, first_table, 1, "half"
        )
    arrays, share_n, reader = _prepared(source, scheme, first_row, rows, 1 / unit_n)
    shapes, tokens = [x.shape for x in arrays], arrays[0].shape[1]
    control = jnp.stack([first_row, valid]).astype(jnp.int32)
    size = padded(tokens)

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def run(ctx, *refs):
            del ctx
            control, unit, *packed, out, tile = refs
            first_row, valid = (load(past(global_address(control), 4 * i), 4)[0] for i in range(2))
            head, lane, mine = block("y"), thread() % _LANES, thread() // _LANES
            row = reader(packed, shapes, scheme, first_row + head, head)
            (word,) = load(global_address(unit) + (head * 4).wide(), 4)
            unit, tile = word.as_float(), shared_address(tile)
            first = block("x") * _VALUE_TOKENS
            with utils.when(_needed(first, valid)):
                # Word w of token t lies at w ^ (t / 4): a column of words, read below, then touches
                # all 32 banks. The tokens of a warp are dealt so that writing conflicts at most twice.
                quad0 = (mine & 1) + ((mine >> 2) << 1) + (((mine >> 1) & 1) << 4)
                for step in range(_VALUE_TOKENS // _AT_ONCE):
                    quad = quad0 + 8 * (step % 2)
                    inside = quad * 4 + step // 2
                    token = first + inside
                    there = token < valid
                    words = e4m3_words(row.halves(select(there, token, integer(0)), lane, unit))
                    for i, word in enumerate(words):
                        column = lane * 2 + (16 * (i // 2) + i % 2)
                        word = select(there, word, integer(0))
                        shared_store(tile + inside * D + ((column ^ quad) << 2), word)
                utils.warpgroup_barrier()
                warp, quad = thread() // 32, thread() % 32
                to = global_address(out) + head.wide() * (D * size) + (first + quad * 4).wide()
                for step in range(D // 4 // 4):
                    column = warp * (D // 4 // 4) + step
                    at = tile + quad * (4 * D) + ((column ^ quad) << 2)
                    for c, word in enumerate(
                        _transposed([shared_load(at + D * i) for i in range(4)])
                    ):
                        store(to + ((column * 4 + c) * size).wide(), [word])

        run(*refs)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, D, size), dtype),
        scratch_types=[plgpu.SMEM((_VALUE_TOKENS * D // 4,), jnp.int32)],
        grid=(rows, size // _VALUE_TOKENS),
        grid_names=("head", "tile"),
        compiler_params=_PARAMS,
        kernel_name="decode_values",
    )(control, share_n, *arrays)


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
