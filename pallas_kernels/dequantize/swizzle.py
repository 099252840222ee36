"""The swizzle of 128 tokens of e4m3 values in shared memory, where a CTA transposes them.

A word is four channels of a token. A warp writes the words of a few tokens, and reads a column of words
of all tokens, of which each thread takes a quad: four tokens in a row. Both should touch all 32 banks.

So word w of a token lies at w ^ quad, and the tokens that a warp writes at once are of quads that differ
in the bits which the words leave free. Tokens of 64 channels fill only half of the banks: two neighbouring
quads share a line of them, and w is swizzled by the number of that pair of quads.
"""

import dataclasses

from pallas_kernels.gpu.channels import CHANNELS
from pallas_kernels.gpu.lanes import Lane

__all__ = ["QUADS", "Swizzle"]

QUADS = 32  # groups of four tokens


@dataclasses.dataclass(frozen=True)
class Swizzle:
    """Where tokens of `width` channels lie; offsets are in bytes."""

    width: int

    @property
    def lanes(self) -> int:
        """Threads of a token."""
        return self.width // CHANNELS

    @property
    def steps(self) -> int:
        """Steps in which 128 threads write all tokens."""
        return self.lanes

    def first_quad(self, lane_group: Lane) -> Lane:
        """The quad of the token that a thread writes first; `lane_group` is the number of its group of lanes."""
        if self.width == 256:
            return lane_group
        return (lane_group & 1) + ((lane_group >> 2) << 1) + (((lane_group >> 1) & 1) << 4)

    def token(self, first_quad: Lane, step: int) -> tuple[Lane, int]:
        """(quad, number of the token within it) that a thread writes in a step."""
        apart = self.steps // 4
        return first_quad + 8 * (step % apart), step // apart

    def row(self, inside: Lane, quad: Lane, i: int) -> Lane:
        """The offset of a token, number `inside` of all and the i-th of its quad."""
        return (quad + QUADS * i if self.width == 64 else inside) * self.width

    def start(self, quad: Lane) -> Lane:
        """The offset of the first token of a quad."""
        return quad * (self.width if self.width == 64 else 4 * self.width)

    @property
    def next_token(self) -> int:
        """The distance from a token of a quad to the next."""
        return QUADS * self.width if self.width == 64 else self.width

    def word(self, column: Lane, quad: Lane) -> Lane:
        """The offset of a word within a token of a quad."""
        return (column ^ (quad >> 1 if self.width == 64 else quad)) << 2
