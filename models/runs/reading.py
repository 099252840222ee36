"""How the arms of a run read their caches: as the options say, or as `attend` chooses."""

from collections.abc import Mapping

import jax

from models.runs.latent_options import LatentOptions
from qvg_jax.app.job import BASELINE
from qvg_jax.attention.choice import explain, wants_bf16
from qvg_jax.cache.operations import KVCache

__all__ = ["attention_of", "attention_told", "precision_notes"]


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
