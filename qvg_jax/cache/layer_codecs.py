"""Layers of a cache in groups: which of them share slots, and where a layer's spans lie.

Layers with equal codecs, and as many heads with a history, are a group, whose spans lie in slots of their
own. Where the layer is known only when the program runs, one of the groups' decoders is taken then.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qvg_jax.codecs.accounting import bits_per_element
from qvg_jax.codecs.base import Codec, Shape

if TYPE_CHECKING:
    from qvg_jax.cache.layout import Layout

__all__ = ["LayerCodecs", "LayerGroup", "codec_of", "groups_of", "joined", "of_layers", "parts_of"]


@dataclasses.dataclass(frozen=True)
class LayerCodecs:
    """A codec for each layer of a cache; hashable, like a codec."""

    codecs: tuple[Codec, ...]

    deficit = None  # none is told for all layers, see `KeyBias`

    @functools.cached_property
    def groups(self) -> tuple[tuple[Codec, tuple[int, ...]], ...]:
        """Codecs in the order of their first layers, each with its layers."""
        return tuple(
            (codec, tuple(l for l, other in enumerate(self.codecs) if other == codec))
            for codec in dict.fromkeys(self.codecs)
        )

    @property
    def name(self) -> str:
        """What reports call it: its codecs and how many layers have each."""
        return " + ".join(f"{len(layers)} x {codec.name}" for codec, layers in self.groups)

    def bits_per_element(self, shape: Shape) -> float:
        """Bits per element of a span, as the mean over layers."""
        return sum(bits_per_element(codec, shape) for codec in self.codecs) / len(self.codecs)

    def __str__(self) -> str:
        return " + ".join(f"{len(layers)} x {codec}" for codec, layers in self.groups)


def of_layers(name: str, codec: Any, layers: int) -> Codec | LayerCodecs:
    """The codec or codecs that a caller gave for all layers.

    Raises:
        ValueError: neither a codec nor a list with a codec for each layer. A tuple is what
            `presets.pair` returns, one codec for K and one for V, and is not accepted.
    """
    if isinstance(codec, Codec | LayerCodecs):
        return codec
    if not isinstance(codec, list) or not all(isinstance(c, Codec) for c in codec):
        shown = codec if isinstance(codec, str) else type(codec).__name__
        raise ValueError(
            f"{name}={shown!r} is not a qvg_jax Codec; accepted: a codec, or a list of {layers}, one for "
            "each layer. key_codec, value_codec = qvg.presets.pair(NAME) gives those of a recipe"
        )
    if len(codec) != layers:
        raise ValueError(
            f"{name} is a list of {len(codec)}; accepted: {layers}, one for each layer"
        )
    return codec[0] if len(dict.fromkeys(codec)) == 1 else LayerCodecs(tuple(codec))


def codec_of(codec: Codec | LayerCodecs, layer: int) -> Codec:
    """The codec of one layer."""
    return codec.codecs[layer] if isinstance(codec, LayerCodecs) else codec


class LayerGroup(NamedTuple):
    """Layers whose spans lie in the same slots.

    Attributes:
        codec: of all of them.
        layers: in the order in which they lie.
        shape: (B, H, T, D) of a span of one of them; H counts its heads with a history.
    """

    codec: Codec
    layers: tuple[int, ...]
    shape: Shape


def groups_of(codec: Codec | LayerCodecs, lay: "Layout") -> list[LayerGroup]:
    """The groups of layers of a codec of the cache. A layer without a head that has a history is in none."""
    alike = codec.groups if isinstance(codec, LayerCodecs) else ((codec, range(lay.layers)),)
    groups = []
    for one, layers in alike:
        if lay.history is None:
            groups.append(LayerGroup(one, tuple(layers), lay.span_shape))
            continue
        counts = [lay.history.counts[l] for l in layers]
        for count in filter(None, dict.fromkeys(counts)):
            alike_too = tuple(l for l, c in zip(layers, counts, strict=True) if c == count)
            shape = (lay.batch, count, *lay.span_shape[2:])
            groups.append(LayerGroup(one, alike_too, shape))
    return groups


def parts_of(codec: Codec | LayerCodecs, lay: "Layout", tree: Any) -> list[Any]:
    """The slots or states of each group."""
    return list(tree) if _is_apart(codec, lay) else [tree]


def joined(codec: Codec | LayerCodecs, lay: "Layout", parts: Sequence[Any]) -> Any:
    """The slots or states of all groups, as a cache holds them."""
    return tuple(parts) if _is_apart(codec, lay) else parts[0]


def _is_apart(codec: Codec | LayerCodecs, lay: "Layout") -> bool:
    return isinstance(codec, LayerCodecs) or lay.history is not None
