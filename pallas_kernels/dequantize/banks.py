"""Where 128 tokens of e4m3 values lie in shared memory while a block transposes them.

A word is four channels of a token. A warp writes the words of a few tokens, and reads a column of words
of all tokens, of which each thread takes a quad: four tokens in a row. Both should touch all 32 banks.

So word w of a token lies at w ^ quad, and the tokens that a warp writes at once are of quads that differ
in the bits which the words leave free. Tokens of 64 channels fill half of the banks only: two quads beside
each other share a line of them, and w is swapped by the number of that pair.
"""

import dataclasses

from pallas_kernels.dequantize.rows import CHANNELS
from pallas_kernels.gpu.lanes import Lane

__all__ = ["QUADS", "Banks"]

QUADS = 32


@dataclasses.dataclass(frozen=True)
class Banks:
    """The places of tokens of so many channels; offsets are in bytes."""

    width: int

    @property
    def lanes(self) -> int:
        """Threads of a token."""
        return self.width // CHANNELS

    @property
    def steps(self) -> int:
        """In how many steps 128 threads write all tokens."""
        return self.lanes

    def first_quad(self, mine: Lane) -> Lane:
        """Of the token that a thread writes first, `mine` the number of its group of lanes."""
        if self.width == 256:
            return mine
        return (mine & 1) + ((mine >> 2) << 1) + (((mine >> 1) & 1) << 4)

    def token(self, first_quad: Lane, step: int) -> tuple[Lane, int]:
        """(quad, which of its tokens) that a thread writes in a step."""
        apart = self.steps // 4
        return first_quad + 8 * (step % apart), step // apart

    def row(self, inside: Lane, quad: Lane, i: int) -> Lane:
        """Where a token begins: number `inside`, the i-th of its quad."""
        return (quad + QUADS * i if self.width == 64 else inside) * self.width

    def start(self, quad: Lane) -> Lane:
        """Where the first token of a quad begins."""
        return quad * (self.width if self.width == 64 else 4 * self.width)

    @property
    def next_token(self) -> int:
        """From a token of a quad to the next."""
        return QUADS * self.width if self.width == 64 else self.width

    def word(self, column: Lane, quad: Lane) -> Lane:
        """Where a word lies in a token of a quad."""
        return (column ^ (quad >> 1 if self.width == 64 else quad)) << 2
