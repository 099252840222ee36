"""Two codecs for one span: the tokens with the most energy in one, the others in the other.

Axes: B batch, H heads, T tokens, D head dim, C bytes.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt8

from qvg_jax.codecs.base import Codec, Packed, Shape, State, check_span, per_element
from qvg_jax.codecs.quantize.bitstream import pack_bits, packed_bits_width, unpack_bits
from qvg_jax.codecs.quantize.scales import span_exponent, times_power_of_two
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import Storage

__all__ = ["ByEnergyPacked", "by_energy"]


class ByEnergyPacked(NamedTuple):
    """The packed form of `by_energy`; a part without tokens is None."""

    large_BHC: UInt8[Array, "B H C"]  # a bit per token: whether it is among the large ones
    large: Packed
    small: Packed


@factory
def by_energy(large: Codec, small: Codec, share: float = 0.5) -> Codec:
    """Encodes the share of each head's tokens with the most energy by `large`, the rest by `small`.

    Attention adds up values, so what counts is the error of a token and not its share of the token.
    At equal bits errors grow with the tokens; a bit more is a quarter of the error, so tokens of
    four times the energy should have it (reverse water-filling, over tokens). Two classes get most
    of that and keep every shape fixed; nested ones get more:
        by_energy(by_energy(c5, c4), by_energy(c3, c2))
    In pocket world's loop four classes of values instead of two, at the same bits, bring 0.7 dB.

    Decode: besides the parts', one row index per token, which is a running count of the bits.

    Args:
        large: for the tokens of most energy, usually of more bits.
        small: for the others.
        share: part of the tokens that are large, 0 to 1; rounded to whole tokens, halves up.

    Returns:
        A codec; one bit per token and head on top of the parts. Tokens keep their order inside the
        parts. Energies are sums over finite entries; of equals the first ones are larger.

    Raises:
        ValueError: `share` outside 0 to 1; on use, what the parts do not accept.

    Source: reverse water-filling, Cover & Thomas, Elements of Information Theory, section 10.3.3;
    block classification by energy: Chen & Smith, "Adaptive coding of monochrome and color images"
    (IEEE Trans. Communications 25, 1977).
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not accepted: give 0 to 1")

    def parts(shape: Shape, dtype: Any = jnp.float32) -> list[tuple[Codec, Shape] | None]:
        """Returns both codecs with the shape of their tokens, None for a codec without tokens."""
        check_span(shape, dtype)
        b, h, t, d = shape
        n = min(t, int(share * t + 0.5))
        return [(c, (b, h, m, d)) if m else None for c, m in ((large, n), (small, t - n))]

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> State:
        return tuple(None if p is None else p[0].init(p[1], dtype) for p in parts(shape, dtype))

    def encode(
        x_BHTD: Array, state: State, *, key: PRNGKeyArray | None = None
    ) -> tuple[ByEnergyPacked, State]:
        both = parts(x_BHTD.shape, x_BHTD.dtype)
        n = 0 if both[0] is None else both[0][1][2]
        size_BHTD = times_power_of_two(x_BHTD, -span_exponent(x_BHTD))
        size_BHTD = jnp.where(jnp.isfinite(size_BHTD), size_BHTD, 0)
        energy_BHT = jnp.sum(size_BHTD * size_BHTD, axis=3)
        order_BHT = jnp.argsort(energy_BHT, axis=2, descending=True, stable=True)
        large_BHT = jnp.argsort(order_BHT, axis=2) < n
        place_BHT = jnp.argsort(~large_BHT, axis=2, stable=True)  # the large ones, then the others
        packed, states = [], []
        for part, s, at in zip(both, state, (slice(n), slice(n, None)), strict=True):
            if part is None:
                packed.append(None)
                states.append(None)
                continue
            y_BHtD = jnp.take_along_axis(x_BHTD, place_BHT[:, :, at, None], axis=2)
            node, s = part[0].encode(y_BHtD, s, key=key)
            packed.append(node)
            states.append(s)
        large_BHC = pack_bits(large_BHT.astype(jnp.uint8), 1)
        return ByEnergyPacked(large_BHC, *packed), tuple(states)

    def decode(packed: ByEnergyPacked, dtype: Any = jnp.bfloat16) -> Array:
        both = ((large, packed.large), (small, packed.small))
        found = [c.decode(node, dtype) for c, node in both if node is not None]
        row_BHT = rows(packed, found)
        x_BHTD = jnp.concatenate(found, axis=2)
        return jnp.take_along_axis(x_BHTD, row_BHT[..., None], axis=2, mode="promise_in_bounds")

    def rows(packed: ByEnergyPacked, found: list[Array]) -> Array:
        """Returns the row of each token among the large tokens, followed by the small ones."""
        n = 0 if packed.large is None else found[0].shape[2]
        total = sum(x.shape[2] for x in found)
        large_BHT = unpack_bits(packed.large_BHC, 1, total).astype(jnp.int32)
        before_BHT = jnp.cumsum(large_BHT, axis=2) - large_BHT
        token_T = jnp.arange(total, dtype=jnp.int32)[None, None]
        return jnp.where(large_BHT == 1, before_BHT, n + token_T - before_BHT)

    def deficit(packed: ByEnergyPacked) -> Array:
        both = ((large, packed.large), (small, packed.small))
        found = [c.deficit(node) for c, node in both if node is not None]
        row_BHT = rows(packed, found)
        return jnp.take_along_axis(jnp.concatenate(found, axis=2), row_BHT, axis=2)

    def nbytes(shape: Shape) -> int:
        b, h, t, _ = shape
        both = parts(shape)
        return sum(c.nbytes(s) for c, s in filter(None, both)) + b * h * packed_bits_width(t, 1)

    name = f"{large.name} | {small.name}" + ("" if share == 0.5 else f" {share:g}")
    told = large.deficit is not None and small.deficit is not None
    storage = Storage("two codecs, for tokens of more and of less energy")
    told_by = deficit if told else None
    return Codec(init, encode, decode, per_element(nbytes), name, nbytes, storage, told_by)
