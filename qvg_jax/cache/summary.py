"""What each layer of a cache costs: codecs, bits per element, and bytes beside plain bf16."""

import dataclasses
from typing import NamedTuple

from qvg_jax.cache.arguments import check_cache
from qvg_jax.cache.health import CacheBytes, cache_bytes
from qvg_jax.cache.layer_codecs import LayerCodecs
from qvg_jax.cache.state import KVCache
from qvg_jax.codecs.accounting import pair_bits
from qvg_jax.codecs.base import Codec

__all__ = ["LayerSummary", "Summary", "summary"]


class LayerSummary(NamedTuple):
    """One layer, or neighbouring layers with the same codecs.

    `bits` are those of an element of a compressed span, K and V together, everything stored counted;
    `ratio` is 16 bits over them.
    """

    first: int
    last: int
    key_codec: str
    value_codec: str
    bits: float

    @property
    def ratio(self) -> float:
        """How many times smaller than bf16 a span of the layer is."""
        return 16 / self.bits


@dataclasses.dataclass(frozen=True)
class Summary:
    """Compression of a cache by layer; `str` is a table.

    Attributes:
        layers: in their order.
        size: bytes of the whole cache, as `cache_bytes` counts them.
    """

    layers: tuple[LayerSummary, ...]
    size: CacheBytes

    def __str__(self) -> str:
        rows = [("layers", "keys", "values", "bits", "of bf16")]
        for x in self.layers:
            number = str(x.first) if x.first == x.last else f"{x.first}-{x.last}"
            ratio = f"1 / {x.ratio:.2f}"
            rows.append((number, x.key_codec, x.value_codec, f"{x.bits:.2f}", ratio))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        size, now = self.size, self.size.in_use
        lines.append(f"buffers: {size.allocated.total / 1e6:.2f} MB")
        if now is not None:
            regions = ", ".join(f"{n} {x / 1e6:.2f}" for n, x in zip(now._fields, now, strict=True))
            whole = f"{now.total / 1e6:.2f} MB ({regions}), {size.bf16 / 1e6:.2f} in bf16"
            lines.append(f"in use for {size.tokens} tokens: {whole}".replace("_", " "))
        return "\n".join(lines)


def summary(cache: KVCache) -> Summary:
    """The compression of a cache: codecs and bits per element by layer, and bytes of the whole.

        print(qvg.summary(cache))

    Outside jit. A layer without slots for spans keeps its tokens as they are.

    Args:
        cache: the cache, or its `jax.eval_shape`, of which only the buffers are counted.
    """
    check_cache(cache)
    lay, found = cache.layout, []

    def of_layer(codec: Codec | LayerCodecs, layer: int) -> Codec:
        return codec.codecs[layer] if isinstance(codec, LayerCodecs) else codec

    for layer in range(lay.layers):
        if lay.max_spans:
            pair = of_layer(lay.key_codec, layer), of_layer(lay.value_codec, layer)
            row = (*(codec.name for codec in pair), pair_bits(pair, lay.span_shape))
        else:
            dtype = cache.dense_k.dtype
            row = (dtype.name, dtype.name, 8.0 * dtype.itemsize)
        if found and found[-1][2:] == row:
            found[-1] = found[-1]._replace(last=layer)
        else:
            found.append(LayerSummary(layer, layer, *row))
    return Summary(tuple(found), cache_bytes(cache))
