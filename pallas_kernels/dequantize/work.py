"""The work of a CTA of a decoding kernel: some tokens of a head or two, in one of the spans.

Usually one span is decoded into a workspace. Several can be laid one behind the other, so that attention
visits them at once, and bf16 tokens behind those. Of bf16 tokens a window can be decoded.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.dequantize.types import PAD, Rotation, Source, padded
from pallas_kernels.gpu.channels import past
from pallas_kernels.gpu.lanes import Lane, cta, global_address, integer, load, select

__all__ = ["Work", "control_of", "ctas_of", "work_of"]


@dataclasses.dataclass(frozen=True)
class Work:
    """The tokens and the first head of a CTA.

    Attributes:
        row_of: the row of the stored arrays that a row among the decoded ones is.
        angles: row of the cosines and sines.
        head: row among the decoded ones.
        cut_row: row among the decoded ones of all spans, for arrays that were cut to those.
        first: token of the arrays at which the span begins; None is 0.
        before: token of the workspace at which the span begins; None is 0.
        valid: tokens of the span that count.
        end: tokens of the span that are written, the last of them zeros; None if it is known that
            all tokens of a CTA are.
    """

    row_of: Callable[[Lane], Lane]
    angles: Lane
    head: Lane
    cut_row: Lane
    first: Lane | None
    before: Lane | None
    valid: Lane
    end: Lane | None

    def needed(self, token: Lane) -> Any:
        """Whether any tile of attention reads the tokens from `token` on."""
        end = (self.valid + (PAD - 1)) & -PAD if self.end is None else self.end
        return (token < end).value

    def written(self, token: Lane) -> Lane | None:
        """Whether a token is written; None if all are."""
        return None if self.end is None else token < self.end

    def read(self, token: Lane) -> Lane:
        """The token of the stored arrays that a token of the span is."""
        return token if self.first is None else token + self.first

    def to(self, token: Lane) -> Lane:
        """The token of the workspace that a token of the span becomes."""
        return token if self.before is None else token + self.before


def control_of(
    source: Source, valid: Array, rotation: Rotation | None, into: tuple[Array, Array] | None
) -> Array:
    """The int32 numbers that `work_of` reads.

    They are the valid tokens, the first token of the arrays, the token of the workspace from which on
    it is written, for every span its first row and its first row of cosines and sines, and last the rows
    of a source that lists them.
    """
    start = jnp.int32(0 if source.window is None else source.window[0])
    at = jnp.int32(0 if into is None else into[1])
    rows = jnp.atleast_1d(source.first_row)
    first = jnp.int32(0) if rotation is None else rotation.first
    angles = jnp.broadcast_to(first, rows.shape)
    listed = [] if source.row_n is None else [source.row_n]
    return jnp.concatenate([jnp.stack([valid, start, at]), rows, angles, *listed]).astype(jnp.int32)


def work_of(control: Any, source: Source, pair: int, behind: bool) -> Work:
    """The work of this CTA.

    Args:
        control: from `control_of`.
        source: what is decoded, of which sizes matter here and no arrays.
        pair: heads of a CTA.
        behind: whether the first token of the workspace is another than 0; then there is one span.
    """

    def number(i: Lane | int) -> Lane:
        start = global_address(control)
        at = past(start, 4 * i) if isinstance(i, int) else start + (i * 4).wide()
        return load(at, 4)[0]

    spans, tokens, rows = source.first_row.size, source.tokens, source.rows
    valid, y = number(0), cta("y")
    first = number(1) if source.window is not None else None
    if spans == 1:
        head, before, end = y * pair, None, None
        if behind:
            before = number(2)
            end = ((before + valid + (PAD - 1)) & -PAD) - before
        if source.row_n is None:
            first_row = number(3)
            row_of = lambda row: first_row + row  # noqa: E731
        else:
            row_of = lambda row: number(row + 5)  # noqa: E731
        return Work(row_of, number(4), head, head, first, before, valid, end)
    span, head = y // (rows // pair), y % (rows // pair) * pair
    before = span * tokens
    left = valid - before
    own = select(left < tokens, left, integer(tokens))
    # Only the last span has zeros behind it; behind another one is the next.
    end = select(left < tokens + 1, ((valid + (PAD - 1)) & -PAD) - before, own)
    first_row = number(span + 3)
    return Work(
        lambda row: first_row + row, number(span + (3 + spans)), head, span * rows + head, first, before,
        own, select(left < 1, integer(0), end),
    )  # fmt: skip


def ctas_of(spans: int, tokens: int, size: int, behind: bool) -> int:
    """The number of CTAs of `size` tokens that cover a span and the zeros behind it."""
    alone = spans == 1 and not behind
    return padded(tokens) // size if alone else -(-(tokens + PAD - 1) // size)
