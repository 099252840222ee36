"""What the predicted seconds of all models share: the way a cache is read, the links, and the cost of encoding."""

from typing import Any

from qvg_jax.attention.choice import wants_bf16
from qvg_jax.attention.formats import scheme_of
from qvg_jax.codecs.base import Codec

__all__ = ["ENCODE", "LINKS", "measured_network", "reading_of"]

LINKS = "with links of 197 GB/s and 60 us, as between two H200s (docs/benchmarks/devices.md)"
# Seconds of two k-means iterations and packing of a span, for each token of a head, K or V: measured with 37,440
# tokens and 12 heads on one H100 on 26 November 2026.
ENCODE = (2 * 0.116e-3 + 0.146e-3) / (37_440 * 12)


def measured_network(dit: Any, released: Any) -> bool:
    """Whether a transformer's layers have the sizes of the released one, whose times were measured."""
    names = ("width", "heads", "ffn_width")
    return all(getattr(dit, name) == getattr(released, name) for name in names)


def reading_of(key_codec: Codec | None, value_codec: Codec | None, head_dim: int) -> str | None:
    """What `attend` chooses on an H100: "bf16" without codecs, "mosaic" or "mosaic_fp8"; None for the rest.

    Args:
        key_codec, value_codec: of compressed spans; None for no spans.
        head_dim: channels of a head.
    """
    codecs = [codec for codec in (key_codec, value_codec) if codec is not None]
    if not codecs:
        return "bf16"
    if any(isinstance(scheme_of(codec, head_dim, 1), str) for codec in codecs):
        return None
    coarse = wants_bf16(codecs[0], codecs[-1]) is None
    return "mosaic_fp8" if coarse else "mosaic"
