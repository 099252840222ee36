"""The sixteen channels of a token that one thread holds, and how it reads and writes them.

Lane i of the threads that share a token holds the channels 8 i .. 8 i + 7 and D / 2 + 8 i ..: four
threads share a token of 64 channels, eight one of 128, sixteen one of 256. Whole lines of 128 bytes are
read and written (halves of them at 64 channels).
"""

from typing import Any

from pallas_kernels.gpu.lanes import Lane, load, store

__all__ = ["CHANNELS", "bf16_floats", "load_channels", "past", "store_channels"]

CHANNELS = 16  # of a thread


def bf16_floats(words: tuple[Lane, ...]) -> list[Lane]:
    """The floats of words that hold two bf16 numbers each."""
    out = []
    for w in words:
        out += [(w << 16).as_float(), (w & -65536).as_float()]
    return out


def load_channels(start: Lane, d: int) -> list[Lane]:
    """A thread's channels of a bf16 token of d channels, from the address of the first eight."""
    return bf16_floats(load(start, 16)) + bf16_floats(load(past(start, d), 16))


def store_channels(to: Lane, words: list[Any], d: int, where: Lane | None = None) -> None:
    """Writes the words of a thread's channels of a token of d channels.

    The first half of them goes to the address `to`, the other half to half a token behind it; with a
    condition `where` only if it holds.
    """
    n = len(words) // 2
    store(to, words[:n], where)
    store(past(to, d * n // 4), words[n:], where)


def past(address: Lane, nbytes: int) -> Lane:
    """The address some bytes further."""
    return address + nbytes if nbytes else address
