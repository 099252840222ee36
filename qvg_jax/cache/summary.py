"""What each layer of a cache costs: codecs, bits per element, and bytes beside plain bf16."""

import dataclasses
from typing import NamedTuple

from qvg_jax.cache.arguments import check_cache
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.cache.health import CacheBytes, cache_bytes
from qvg_jax.cache.layer_codecs import codec_of
from qvg_jax.cache.state import KVCache

__all__ = ["LayerSummary", "Summary", "summary"]


class LayerSummary(NamedTuple):
    """One layer, or neighbouring layers with the same codecs and as many heads with a history.

    `bits` are those of an element of a compressed span, K and V together, everything stored counted;
    `ratio` is 16 bits over them. `heads` counts the heads that have a history, None for all. Without any
    the layer has no span, and no codecs, bits or ratio: they are "none" and 0.
    """

    first: int
    last: int
    key_codec: str
    value_codec: str
    bits: float
    heads: int | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller than bf16 a span of the layer is; 0 if it has none."""
        return 16 / self.bits if self.bits else 0.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """Compression of a cache by layer; `str` is a table.

    Attributes:
        layers: in their order.
        size: bytes of the whole cache, as `cache_bytes` counts them.
        history: what it says about heads without a history; None where all have one.
    """

    layers: tuple[LayerSummary, ...]
    size: CacheBytes
    history: HeadHistory | None = None

    def __str__(self) -> str:
        rows = [("layers", "keys", "values", "bits", "of bf16")]
        if self.history is not None:
            rows = [(*rows[0], "heads with a history")]
        for x in self.layers:
            number = str(x.first) if x.first == x.last else f"{x.first}-{x.last}"
            ratio = f"1 / {x.ratio:.2f}" if x.bits else "none"
            row = (number, x.key_codec, x.value_codec, f"{x.bits:.2f}", ratio)
            heads = () if self.history is None else (f"{x.heads} of {self.history.heads}",)
            rows.append((*row, *heads))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        if self.history is not None:
            table = self.history
            others = f"the others read the sink and the newest {table.local_blocks} blocks"
            others += ", and keep no more" if table.own_window else ""
            lines.append(f"history: {table.full} of {table.layers * table.heads} heads; {others}")
            if not table.full:
                lines.append("no head has a history, so there are no compressed spans")
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
    for layer in range(lay.layers):
        heads = None if lay.history is None else lay.history.counts[layer]
        if heads == 0:
            row = ("none", "none", 0.0, heads)
        elif lay.max_spans:
            pair = codec_of(lay.key_codec, layer), codec_of(lay.value_codec, layer)
            row = (*(codec.name for codec in pair), lay.layer_bits(layer), heads)
        else:
            dtype = cache.dense_k.dtype
            row = (dtype.name, dtype.name, 8.0 * dtype.itemsize, heads)
        if found and found[-1][2:] == row:
            found[-1] = found[-1]._replace(last=layer)
        else:
            found.append(LayerSummary(layer, layer, *row))
    return Summary(tuple(found), cache_bytes(cache), lay.history)
