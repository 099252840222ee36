"""How the arms of a run read their caches: as the options say, or as `attend` chooses."""

from collections.abc import Mapping

import jax

from models.runs.latent_options import LatentOptions
from qvg_jax.app.job import BASELINE
from qvg_jax.attention.choice import explain, wants_bf16
from qvg_jax.attention.formats import scheme_of
from qvg_jax.cache.operations import KVCache
from qvg_jax.codecs.base import Codec

__all__ = ["LINKS", "attention_of", "attention_told", "precision_notes", "reading_of"]

LINKS = "with links of 197 GB/s and 60 us, as between two H200s (docs/benchmarks/devices.md)"


def attention_of(arm: str, options: LatentOptions) -> tuple[str | None, str | None]:
    """Implementation and precision by which an arm reads its cache: as asked; the baseline's are its own."""
    return (None, None) if arm == BASELINE else (options.attention, options.precision)


def attention_told(arm: str, options: LatentOptions, cache: KVCache) -> str:
    """What `attend` runs for an arm on this device, in words."""
    view = cache.view(rope=False)
    queries = (view.cache.layout.batch, view.cache.layout.block_tokens, view.heads)
    q_BTHD = jax.ShapeDtypeStruct((*queries, view.cache.layout.head_dim), cache.dense_k.dtype)
    implementation, precision = attention_of(arm, options)
    return explain(view, q_BTHD, implementation=implementation, precision=precision).runs


def precision_notes(caches: Mapping[str, KVCache], options: LatentOptions) -> tuple[str, ...]:
    """The precision in which attention on a Hopper GPU reads the arms' caches, as one note of a plan.

    There is no note where the options name an implementation or a precision.

    Args:
        caches: of the arms by name, shapes only.
        options: of the run.
    """
    if options.attention is not None or options.precision is not None:
        return ()
    found: dict[str, list[str]] = {"fp8": [], "bf16": []}
    for name, cache in caches.items():
        lay = cache.layout
        fine = not lay.max_spans or wants_bf16(lay.key_codec, lay.value_codec) is not None
        found["bf16" if fine else "fp8"].append(name)
    said = [f"{' and '.join(names)} in {precision}" for precision, names in found.items() if names]
    return (
        f"attention on a Hopper GPU reads {', '.join(said)}; --precision of qvg generate says otherwise",
    )


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
    coarse = wants_bf16(codecs[0], codecs[-1]) is None
    return "mosaic_fp8" if coarse else "mosaic"
