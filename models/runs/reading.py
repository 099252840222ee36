"""The way by which an H100 reads a cache: for predicted times, where there is none to ask."""

from qvg_jax.attention.choice import finer_than_two_bits
from qvg_jax.attention.formats import scheme_of
from qvg_jax.codecs.base import Codec

__all__ = ["LINKS", "reading_of"]

LINKS = "with links of 197 GB/s and 60 us, as between two H200s (docs/benchmarks/devices.md)"


def reading_of(
    key_codec: Codec | None, value_codec: Codec | None, head_dim: int, joined: int = 1
) -> str | None:
    """What `attend` chooses on an H100: "bf16" without codecs, "mosaic" or "mosaic_fp8"; None for the rest.

    Args:
        key_codec, value_codec: of compressed spans; None for no spans.
        head_dim: channels of a head.
        joined: heads in one vector of a codec.
    """
    codecs = [codec for codec in (key_codec, value_codec) if codec is not None]
    if not codecs:
        return "bf16"
    if any(isinstance(scheme_of(codec, head_dim, joined), str) for codec in codecs):
        return None
    coarse = not any(finer_than_two_bits(codec.storage) for codec in codecs)
    return "mosaic_fp8" if coarse else "mosaic"
