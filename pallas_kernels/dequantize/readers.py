"""Readers of packed and of bf16 rows on Hopper: how a thread gets its channels of a token.

In e4m3 kernels values are pairs of float16, which have eleven bits where e4m3 has four, at half the
instructions of float32.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pallas_kernels.dequantize.types import Scheme
from pallas_kernels.gpu.channels import bf16_floats, load_channels, past
from pallas_kernels.gpu.lanes import (
    Halves,
    Lane,
    global_address,
    halves,
    integer,
    load,
    permute_bytes,
)

__all__ = ["DenseRow", "EncodedRow", "level_pairs", "levels"]


def _scale(byte: Lane) -> Lane:
    """A positive e4m3 number as float32 / 2 ** 120, subnormals included."""
    return (byte << 20).as_float()


def levels(words: tuple[Lane, ...], scheme: Scheme) -> list[Lane]:
    """2 (code - offset) of eight channels as floats, which are exact for half-integer offsets."""
    out = []
    for i in range(8):
        word, bit = words[i * scheme.bits // 32], i * scheme.bits % 32
        shift = bit // 8 * 8 + 8 - scheme.bits - bit % 8
        if scheme.bits == 3:  # one number of 24 bits
            shift = 21 - bit
        field = (word >> (shift - 1) if shift else word << 1) & (2**scheme.bits - 1 << 1)
        # 2 ** 23 + 2 code as float32: no integer conversion, which runs at a quarter of the rate.
        out.append((field | 0x4B000000).as_float() - (2.0**23 + 2 * scheme.offset))
    return out


def _three_bytes(row: Lane, lane: Lane) -> Lane:
    """Bytes 3 i .. 3 i + 2 of a row, i the lane, as one number whose highest bits are the first byte.

    They are taken from the words that the first and the last of them lie in. Bits 24 to 31 are garbage.
    """
    byte = lane * 3
    first, last = (load(row + (b & -4).wide(), 4)[0] for b in (byte, byte + 2))
    return permute_bytes(first, last, (byte & 3) * 0x111 + 0x012)


def _both(x: float) -> Halves:
    """The same float16 twice."""
    bits = int(np.float16(x).view(np.uint16))
    return Halves(integer((bits << 16 | bits) - (1 << 32 if bits >> 15 else 0)))


def level_pairs(words: tuple[Lane, ...], scheme: Scheme) -> list[tuple[Halves, int]]:
    """weight (code - offset) of eight channels in pairs, and the weight of each pair."""
    bits, out = scheme.bits, []
    if bits == 8:
        weight = 2  # 1024 + 2 offset is a float16 number also for half-integer offsets
        for word in words:
            for selector in (0x4140, 0x4342):  # two bytes, each with a byte of zeros above it
                field = (permute_bytes(word, integer(0), selector) << 1) | 0x64006400
                out.append((Halves(field) - _both(1024 + weight * scheme.offset), weight))
        return out
    # Parts that hold whole pairs: bytes, or a quarter of the 24 bits of eight codes of three.
    size, starts = (6, (18, 12, 6, 0)) if bits == 3 else (8, range(0, 8 * bits, 8))
    mask, places = 2**bits - 1, size // (2 * bits)
    for start in starts:
        b = (words[0] >> start) & (2**size - 1)
        spread = b * (1 + (1 << (16 + bits)))  # the second channel of each pair under the first
        for pair in range(places):
            shift = size - bits - 2 * bits * pair
            field = (spread & (mask << shift) * 0x10001) | 0x64006400  # 1024 + weight code
            weight = 2**shift
            out.append((Halves(field) - _both(1024 + weight * scheme.offset), weight))
    return out


class EncodedRow:
    """A packed row, of whose tokens a thread reads its channels.

    Args:
        refs: arrays of codes and scales, and with stages of ids and centroids.
        shapes: their shapes.
        scheme: how codes become numbers.
        row: the row of the arrays.
        cut_row: the row of the centroids, which were cut to the decoded rows before.
    """

    def __init__(self, refs: list[Any], shapes: Any, scheme: Scheme, row: Lane, cut_row: Lane):
        codes, scales, *stages = refs
        self.scheme = scheme
        (_, self.tokens, self.code_bytes), (_, _, self.groups) = shapes[:2]
        self.width = self.code_bytes * 8 // scheme.bits
        row = row.wide()
        self.codes = global_address(codes) + row * (self.tokens * self.code_bytes)
        self.scales = global_address(scales) + row * (self.tokens * self.groups)
        if scheme.stages:
            ids, centroids = stages
            self.stage_bytes = shapes[3][2] * self.width * 2
            self.ids = global_address(ids) + row * (scheme.stages * self.tokens)
            self.centroids = global_address(centroids) + cut_row.wide() * (
                scheme.stages * self.stage_bytes
            )

    def _parts(
        self, token: Lane, lane: Lane
    ) -> Iterator[tuple[tuple[Lane, ...], Lane, list[tuple[Lane, ...]]]]:
        """For each eight channels: code words, scale, centroid words of every stage."""
        scheme, nbytes = self.scheme, self.scheme.bits  # eight codes take as many bytes as bits
        width, half_width = self.width, self.width // 2
        place = token * self.code_bytes + (0 if nbytes == 3 else lane * nbytes)
        codes = self.codes + place.wide()
        scales = self.scales + (token * self.groups).wide()
        starts = []
        for s in range(scheme.stages):
            (row,) = load(self.ids + (token + s * self.tokens).wide(), 1)
            place = row * (2 * width) + lane * 16 + s * self.stage_bytes
            starts.append(self.centroids + place.wide())
        scale = None
        for half in range(2):
            if nbytes == 3:
                words = (_three_bytes(past(codes, half * half_width * 3 // 8), lane),)
            else:
                words = load(past(codes, half * half_width * nbytes // 8), nbytes)
            if scale is None or scheme.group < width:
                group = (lane * 8 + half * half_width) // scheme.group
                scale = _scale(load(scales + group.wide(), 1)[0])
            yield words, scale, [load(past(start, half * width), 16) for start in starts]

    def floats(self, token: Lane, lane: Lane, factor: Lane) -> list[Lane]:
        """The channels of lane `lane` as floats; the scales are multiplied by `factor`."""
        out = []
        for words, scale, rows in self._parts(token, lane):
            base, scale = None, scale * (factor * 2.0**119)
            for row in rows:
                row = bf16_floats(row)
                base = row if base is None else [a + b for a, b in zip(base, row, strict=True)]
            for i, x in enumerate(levels(words, self.scheme)):
                out.append(x * scale if base is None else x.fma(scale, base[i]))
        return out

    def halves(self, token: Lane, lane: Lane, factor: Lane) -> list[Halves]:
        """The same channels as pairs of float16; the centroids have been multiplied before."""
        out = []
        for words, scale, rows in self._parts(token, lane):
            base, scales = None, {}
            for row in rows:
                row = [Halves(w) for w in row]
                base = row if base is None else [a + b for a, b in zip(base, row, strict=True)]
            for i, (x, weight) in enumerate(level_pairs(words, self.scheme)):
                if weight not in scales:
                    s = scale * (factor * (2.0**120 / weight))
                    scales[weight] = halves(s, s)
                out.append(x * scales[weight] if base is None else x.fma(scales[weight], base[i]))
        return out


class DenseRow:
    """A row of bf16 numbers, of rows (R, T, D) or of tokens (B, T, H, D); see `EncodedRow`."""

    def __init__(self, refs: list[Any], shapes: Any, scheme: None, row: Lane, cut_row: Lane):
        del scheme, cut_row  # of packed rows
        self.rows, (_, tokens, *heads, self.width) = global_address(refs[0]), shapes[0]
        self.token_bytes = 2 * self.width
        if heads:
            batch, row = row // heads[0], row % heads[0]
            self.token_bytes *= heads[0]
            self.rows += batch.wide() * (tokens * self.token_bytes)
            self.rows += row.wide() * (2 * self.width)
        else:
            self.rows += row.wide() * (tokens * self.token_bytes)

    def floats(self, token: Lane, lane: Lane, factor: Lane) -> list[Lane]:
        """The channels of lane `lane` as floats, without the factor, which is for e4m3."""
        del factor
        start = self.rows + token.wide() * self.token_bytes + (lane * 16).wide()
        return load_channels(start, self.width)

    def halves(self, token: Lane, lane: Lane, factor: Lane) -> list[Halves]:
        """The same channels times the factor as pairs of float16."""
        x = [v * factor for v in self.floats(token, lane, factor)]
        return [halves(a, b) for a, b in zip(x[0::2], x[1::2], strict=True)]
