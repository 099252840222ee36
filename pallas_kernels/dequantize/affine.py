"""Readers on Hopper of rows whose codes have a dither, zero points, or a factor for every channel.

    x = w ((code + dither - offset) scale + zero point) 2^exponent + sum of the centroids

A code of two bits and its dither are the two ends of one byte: four channels are made with one product,
one addition and three logical instructions. The powers of two, and in e4m3 the factor of the row, are
in w; without w they multiply scales and zero points.
"""

from typing import Any

from pallas_kernels.dequantize.dither import CHANNEL_STEP, FINE, TOKEN_SHIFT, TOKEN_STEP
from pallas_kernels.dequantize.readers import EncodedRow, level_pairs, levels
from pallas_kernels.dequantize.types import Scheme
from pallas_kernels.gpu.channels import bf16_floats, past
from pallas_kernels.gpu.lanes import (
    Halves,
    Lane,
    global_address,
    halves,
    integer,
    load,
    permute_bytes,
)

__all__ = ["AffineRow"]


def _signed(byte: Lane) -> Lane:
    """An e4m3 number of either sign as float32 / 2 ** 120, subnormals included."""
    return (((byte & 127) << 20) | ((byte & 128) << 24)).as_float()


def _signed_word(word: int) -> int:
    """The 32 bits of a word as the signed number that constants are written as."""
    return word - (1 << 32 if word >> 31 else 0)


def _four(byte: Lane, shift: Lane, first: int) -> Lane:
    """Bytes 64 code + dither of the four channels from `first` on, whose 2-bit codes are `byte`."""
    steps = sum(((first + i) * CHANNEL_STEP % FINE) << 8 * i for i in range(4))
    codes = (byte * 0x40100401) & _signed_word(0xC0C0C0C0)
    return codes | ((shift * 0x01010101 + steps) & 0x3F3F3F3F)


def _bytes_of(word: Lane) -> list[Lane]:
    """The four bytes of a word as floats, without an integer conversion."""
    out = [permute_bytes(word, integer(0x4B000000), 0x7440 | i) for i in range(4)]
    return [x.as_float() - 2.0**23 for x in out]


def _pairs_of(word: Lane) -> list[Halves]:
    """The four bytes of a word as two pairs of float16."""
    out = [permute_bytes(word, integer(0x64646464), 0x4040 | (i + 1) << 8 | i) for i in (0, 2)]
    return [Halves(x) - Halves(integer(0x64006400)) for x in out]


def _finer(words: tuple[Lane, ...], bits: int, shift: Lane) -> list[Lane]:
    """64 code + dither of eight channels, less than 1024, of codes of three or four bits."""
    out = []
    for i in range(8):
        word, bit = words[i * bits // 32], i * bits % 32
        down = 21 - bit if bits == 3 else bit // 8 * 8 + 8 - bits - bit % 8
        code = (word >> down) & (2**bits - 1)
        out.append((code << 6) | ((shift + i * CHANNEL_STEP % FINE) & (FINE - 1)))
    return out


def _dithered(words: tuple[Lane, ...], bits: int, shift: Lane) -> list[Lane]:
    """64 code + dither of eight channels as floats; `shift` is the dither of the first one."""
    if bits == 2:
        fours = [_four((words[0] >> 8 * i) & 255, shift, 4 * i) for i in range(2)]
        return [x for word in fours for x in _bytes_of(word)]
    return [(k | 0x4B000000).as_float() - 2.0**23 for k in _finer(words, bits, shift)]


def _dithered_pairs(words: tuple[Lane, ...], bits: int, shift: Lane) -> list[Halves]:
    """The same numbers as pairs of float16, in which they are exact."""
    if bits == 2:
        fours = [_four((words[0] >> 8 * i) & 255, shift, 4 * i) for i in range(2)]
        return [x for word in fours for x in _pairs_of(word)]
    k = _finer(words, bits, shift)
    pairs = [a | (b << 16) | 0x64006400 for a, b in zip(k[0::2], k[1::2], strict=True)]
    return [Halves(x) - Halves(integer(0x64006400)) for x in pairs]


class AffineRow(EncodedRow):
    """A packed row with more than scales and centroids; see `EncodedRow`.

    Args:
        refs: arrays of codes and scales, then, as far as the scheme has them, of zero points, of
            deviations of the decoded rows, and of ids and centroids.
        shapes, scheme, row, cut_row: as there.
    """

    def __init__(self, refs: list[Any], shapes: Any, scheme: Scheme, row: Lane, cut_row: Lane):
        refs, shapes, self.factors = list(refs), list(shapes), None
        (_, tokens, groups) = shapes[1]
        if scheme.zero_points:
            self.zeros = global_address(refs.pop(2)) + row.wide() * (tokens * groups)
            shapes.pop(2)
        if scheme.deviations:
            self.deviations, self.cut_row = global_address(refs.pop(2)), cut_row
            shapes.pop(2)
        super().__init__(refs, shapes, scheme, row, cut_row)

    def _zero(self, token: Lane, lane: Lane, half: int) -> Lane:
        group = (lane * 8 + half * (self.width // 2)) // self.scheme.group
        start = self.zeros + (token * self.groups).wide()
        return _signed(load(start + group.wide(), 1)[0])

    def _shift(self, token: Lane, lane: Lane, half: int) -> Lane:
        """The dither of the first of eight channels of a token."""
        of_token = (token * TOKEN_STEP) >> TOKEN_SHIFT
        of_lane = lane * (8 * CHANNEL_STEP % FINE) + half * self.width // 2 * CHANNEL_STEP % FINE
        return (of_token + of_lane) & (FINE - 1)

    def _factors(self, lane: Lane, half: int, nbytes: int) -> list[Any]:
        """The factors of eight channels, which are read once: floats, or pairs of float16."""
        if self.factors is None:
            start = self.deviations + self.cut_row.wide() * (self.width * nbytes)
            start += (lane * (8 * nbytes)).wide()
            places = [
                past(start, h * self.width // 2 * nbytes + i)
                for h in range(2)
                for i in range(0, 8 * nbytes, 16)
            ]
            words = [word for place in places for word in load(place, 16)]
            self.factors = [w.as_float() if nbytes == 4 else Halves(w) for w in words]
        n = len(self.factors) // 2
        return self.factors[half * n : half * n + n]

    def _numbers(self, token: Lane, lane: Lane, factor: Lane, dithered: Any, plain: Any) -> Any:
        """For each eight channels: numbers and what one is worth, scale, zero point, centroid words."""
        scheme, scale_of, zero = self.scheme, factor * 2.0**120, None
        for half, (words, scale, rows) in enumerate(self._parts(token, lane)):
            if scheme.zero_points and (half == 0 or scheme.group < self.width):
                zero = self._zero(token, lane, half) * scale_of
            scale *= scale_of
            if not scheme.dithered:
                yield half, plain(words, scheme), scale, zero, rows
                continue
            numbers = dithered(words, scheme.bits, self._shift(token, lane, half))
            middle = scale * -float(scheme.offset)
            middle = middle if zero is None else middle + zero
            yield half, [(x, FINE) for x in numbers], scale, middle, rows

    def floats(self, token: Lane, lane: Lane, factor: Lane) -> list[Lane]:
        """The channels of lane `lane` as floats; without deviations scales are multiplied by `factor`."""
        out = []
        plain = lambda words, scheme: [(x, 2) for x in levels(words, scheme)]  # noqa: E731
        for half, numbers, scale, zero, rows in self._numbers(
            token, lane, factor, _dithered, plain
        ):
            unit = scale * (1.0 / numbers[0][1])
            x = [n * unit if zero is None else n.fma(unit, zero) for n, _ in numbers]
            factors = self._factors(lane, half, 4) if self.scheme.deviations else None
            out += _with_centroids(x, factors, [bf16_floats(row) for row in rows])
        return out

    def halves(self, token: Lane, lane: Lane, factor: Lane) -> list[Halves]:
        """The same channels as pairs of float16; centroids and deviations have been multiplied before."""
        out = []
        for half, numbers, scale, zero, rows in self._numbers(
            token, lane, factor, _dithered_pairs, level_pairs
        ):
            units = {w: scale * (1.0 / w) for w in dict.fromkeys(w for _, w in numbers)}
            units = {w: halves(s, s) for w, s in units.items()}
            zero = None if zero is None else halves(zero, zero)
            x = [n * units[w] if zero is None else n.fma(units[w], zero) for n, w in numbers]
            factors = self._factors(lane, half, 2) if self.scheme.deviations else None
            out += _with_centroids(x, factors, [[Halves(word) for word in row] for row in rows])
        return out


def _with_centroids(x: list[Any], factors: list[Any] | None, rows: list[list[Any]]) -> list[Any]:
    """Numbers of eight channels times their factors, plus the centroids of all stages."""
    base = None
    for row in rows:
        base = row if base is None else [a + b for a, b in zip(base, row, strict=True)]
    if factors is None:
        return x if base is None else [a + b for a, b in zip(x, base, strict=True)]
    if base is None:
        return [a * w for a, w in zip(x, factors, strict=True)]
    return [a.fma(w, b) for a, w, b in zip(x, factors, base, strict=True)]
