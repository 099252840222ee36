"""Which block of the GPU attends with which queries to which keys.

Blocks run in waves, one on each multiprocessor, and a last wave that is nearly empty costs as much as
a full one. So the queries of all full waves keep their keys to themselves, and only those of the
last one share them: every other block of queries has `parts` pieces, each with its own running
softmax. What is split has more state to write and to join, so it is little.

Source of the idea to split only what is left of the last wave: Osama et al., Stream-K (arXiv
2301.03598), section 4.2, there for matrix products.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

__all__ = [
    "BYTES_PER_NS",
    "NS_PER_KEY",
    "PROCESSORS",
    "STATE_BYTES",
    "Schedule",
    "join",
    "schedule_for",
]

# Of an H100 SXM: multiprocessors; nanoseconds that a block spends on a key, in 8 and in 16 bits, and on
# starting and ending; bytes a nanosecond that states are written and read with; bytes of a block's state.
# At 128 channels a head: with other widths the times of keys and of states grow alike, and the balance
# hardly moves.
PROCESSORS, NS_PER_KEY, NS_PER_PIECE, BYTES_PER_NS = 132, {True: 9.5, False: 14.1}, 4e3, 2.7e3
STATE_BYTES = 128 * 128 * 4


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Pieces of an attention.

    Attributes:
        blocks: blocks of queries of all rows.
        whole: how many of them, the first ones, are one piece.
        parts: pieces of each of the others.
        processors: multiprocessors of the GPU, each of which takes one piece after another.
    """

    blocks: int
    whole: int
    parts: int
    processors: int = PROCESSORS

    @property
    def shared(self) -> int:
        """Blocks of queries of several pieces."""
        return self.blocks - self.whole

    @property
    def pieces(self) -> int:
        """All of them: first the whole ones, then a first part of each of the others, and so on."""
        return self.whole + self.shared * self.parts

    @property
    def programs(self) -> int:
        """Blocks of the GPU: program i does the pieces i, i + programs, i + 2 programs, ..."""
        return min(self.pieces, self.processors)

    def place(self, piece: Any) -> tuple[Any, Any, Any]:
        """(block of queries, part of its keys, of how many parts) of a piece."""
        if not self.whole:
            return lax.rem(piece, self.shared), lax.div(piece, self.shared), self.parts
        if not self.shared:
            return piece, 0, 1
        alone, more = piece < self.whole, jnp.maximum(piece - self.whole, 0)
        return (
            jnp.where(alone, piece, self.whole + lax.rem(more, self.shared)),
            jnp.where(alone, 0, lax.div(more, self.shared)),
            jnp.where(alone, 1, self.parts),
        )


def schedule_for(
    blocks: int, tokens: int, segments: int, narrow: bool, processors: int = PROCESSORS
) -> Schedule:
    """The quickest by a model of waves, starts and traffic of the states.

    Args:
        blocks: blocks of queries of all rows.
        tokens: keys of a typical segment.
        segments: how many segments there are.
        narrow: whether keys are in e4m3.
        processors: multiprocessors of the GPU.
    """
    full = blocks // processors * processors
    most = max(1, min(16, tokens // 1024))

    def nanoseconds(s: Schedule) -> float:
        alone, shared = -(-s.whole // processors), -(-s.shared * s.parts // processors)
        busy = (alone + shared / s.parts) * tokens * NS_PER_KEY[narrow]
        busy += (alone + shared) * NS_PER_PIECE
        return segments * busy + 2 * (segments + 1) * s.pieces * STATE_BYTES / BYTES_PER_NS

    options = [Schedule(blocks, 0, parts, processors) for parts in range(1, most + 1)]
    if full:
        options += [Schedule(blocks, full, parts, processors) for parts in range(1, most + 1)]
    return min(options, key=nanoseconds)


def join(
    state: tuple[Array, Array, Array], schedule: Schedule, rows: int, queries: int
) -> Float[Array, "n Q D"]:
    """The output of all pieces: sum_p 2^(m_p - m) out_p / sum_p 2^(m_p - m) sum_p, float32.

    Args:
        state: weighted values (pieces, 128, D), maximum and sum (pieces, 128).
        schedule: whose pieces they are.
        rows, queries: n and Q; every row has whole blocks of 128 queries.
    """
    acc, top, total = state
    whole, out = schedule.whole, []
    if whole:
        out.append(acc[:whole] / total[:whole, :, None])
    if schedule.shared:
        apart = (schedule.parts, schedule.shared)
        acc, top, total = (x[whole:].reshape(*apart, *x.shape[1:]) for x in state)
        weight = jnp.exp2(top - top.max(axis=0, keepdims=True))
        total = jnp.sum(weight * total, axis=0)
        out.append(jnp.sum(weight[..., None] * acc, axis=0) / total[..., None])
    out = out[0] if len(out) == 1 else jnp.concatenate(out)
    return out.reshape(rows, -1, out.shape[-1])[:, :queries]
