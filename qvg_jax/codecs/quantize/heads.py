"""One codec for all heads of a layer, so that bits go to the heads that need them.

Axes: B batch, H heads, T tokens, D head dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from qvg_jax.codecs.base import Codec, Packed, Shape, State, check_span, per_element
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import Storage

__all__ = ["HeadsPacked", "heads_as_channels", "heads_as_tokens"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadsPacked:
    """The packed form of the joined heads, and how many heads there are."""

    packed: Packed
    heads: int = dataclasses.field(metadata=dict(static=True))


@factory
def heads_as_tokens(codec: Codec) -> Codec:
    """Returns the codec on H T tokens of one head: for `by_energy`, whose large tokens may be of any head.

    Heads of a layer differ in energy, values of pocket world up to fourfold behind k-means. In its loop
    a budget for all of them brings 2 dB: it gives the large ones more bits (reverse water-filling over
    heads), and every shape stays fixed, because only the sum is.

    Nothing is stored for it and nothing computed. The packed form has one head, so such a cache
    cannot be divided by heads between devices.

    Args:
        codec: any codec.

    Returns:
        The codec.
    """

    def join(x_BHTD: Array) -> Array:
        b, h, t, d = x_BHTD.shape
        return x_BHTD.reshape(b, 1, h * t, d)

    def part(x: Array, heads: int) -> Array:
        return x.reshape(x.shape[0], heads, -1, *x.shape[3:])

    deficit = None
    if codec.deficit is not None:
        deficit = lambda p: part(codec.deficit(p.packed), p.heads)  # noqa: E731
    return _joined(codec, "tokens", lambda b, h, t, d: (b, 1, h * t, d), join, part, deficit)


@factory
def heads_as_channels(codec: Codec) -> Codec:
    """Returns the codec on tokens of H D channels: for `allocated_quantize`, which chooses among all.

    One scale per token serves all heads, and channels of any head compete for the same bits. Behind
    `klt_rotation`, which stays by head: the channels are each head's principal axes.

    Nothing is computed for it. The packed form has one head, so such a cache cannot be divided by
    heads between devices. It tells no `deficit`, because heads differ in theirs.

    Args:
        codec: any codec.

    Returns:
        The codec.
    """

    def join(x_BHTD: Array) -> Array:
        b, h, t, d = x_BHTD.shape
        return jnp.swapaxes(x_BHTD, 1, 2).reshape(b, 1, t, h * d)

    def part(x_B1TC: Array, heads: int) -> Array:
        b, _, t, c = x_B1TC.shape
        return jnp.swapaxes(x_B1TC.reshape(b, t, heads, c // heads), 1, 2)

    return _joined(codec, "channels", lambda b, h, t, d: (b, 1, t, h * d), join, part, None)


def _joined(codec: Codec, what: str, form: Any, join: Any, part: Any, deficit: Any) -> Codec:
    """Returns `codec` on spans of the shape `form(B, H, T, D)`, made by `join` and undone by `part`."""

    def shaped(shape: Shape, dtype: Any = jnp.float32) -> Shape:
        check_span(shape, dtype)
        return form(*shape)

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> State:
        return codec.init(shaped(shape, dtype), dtype)

    def encode(
        x_BHTD: Array, state: State, *, key: PRNGKeyArray | None = None
    ) -> tuple[HeadsPacked, State]:
        check_span(x_BHTD.shape, x_BHTD.dtype)
        packed, state = codec.encode(join(x_BHTD), state, key=key)
        return HeadsPacked(packed, x_BHTD.shape[1]), state

    def decode(packed: HeadsPacked, dtype: Any = jnp.bfloat16) -> Array:
        return part(codec.decode(packed.packed, dtype), packed.heads)

    def nbytes(shape: Shape) -> int:
        return codec.nbytes(shaped(shape))

    name = f"heads as {what}: {codec.name}"
    return Codec(
        init,
        encode,
        decode,
        per_element(nbytes),
        name,
        nbytes,
        Storage(f"all heads as {what} of one"),
        deficit,
    )
