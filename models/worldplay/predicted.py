"""Seconds of a block on several GPUs, predicted from what one H100 took; `qvg plan --devices N` shows them.

What goes in was measured at the true size, on one H100 80GB with jax 0.11.2 (docs/benchmarks/worldplay.md and
attention.md, 2026-11-26 and 2026-11-28). A block is four passes that read the cache, and the pass over its context,
whose attention is that of every frame to every frame. Devices divide the tokens of both; in the context pass they
gather the keys and values of each layer.
"""

from models.runs.predicted import ENCODE, LINKS, measured_network, reading_of
from models.worldplay.config import WorldPlayConfig
from models.worldplay.settings import Settings
from qvg_jax.app.memory_plan import shape_bytes
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.plan import Plan
from qvg_jax.study.scale import Measured, Workload, predict

__all__ = ["SOURCE", "block_seconds"]

SOURCE = (
    "seconds of the last block: predicted by qvg_jax.study.scale from times of one H100 "
    f"(docs/benchmarks/worldplay.md, attention.md), {LINKS}"
)

# Seconds of attention of 3,520 queries and 24 heads to 45,760 keys, by what reads the cache.
ATTENTION = {"bf16": 3.74e-3, "mosaic": 3.54e-3, "mosaic_fp8": 2.63e-3}
QUERIES, KEYS, LAYERS, CONTEXT = 3_520, 45_760, 30, 44
# Both encodings of a head are two heads. After 44 frames, without its context pass, a block took 1.153 s in bf16
# and 1.079 s with one stored k and v in two bits: four passes and 42,240 keys.
_CALLS = 4 * LAYERS * 2 * 42_240 / KEYS
NETWORK = {"bf16": 1.153 - _CALLS * ATTENTION["bf16"]}
NETWORK["mosaic_fp8"] = NETWORK["mosaic"] = 1.079 - _CALLS * ATTENTION["mosaic_fp8"]
# The context pass over 44 frames took 2.549 s. In all layers but the last eleven blocks attend to 38,720 keys.
CONTEXT_ATTENTION = 29 * 2 * 11 * ATTENTION["bf16"] * 38_720 / KEYS
CONTEXT_NETWORK = 2.549 - CONTEXT_ATTENTION


def block_seconds(
    settings: Settings, arm: str, cache: KVCache, plan: Plan, layer_bytes: int = 0
) -> float | None:
    """Seconds of the last block of a walk under a plan, which may be of one device.

    None where nothing was measured: networks of another width, packed encodings that codecs compress, and codecs
    that no kernel reads.

    Args:
        settings: of the run.
        arm: which cache.
        cache: its shapes.
        plan: how it is spread.
        layer_bytes: weights of a layer that the devices share, and gather in each pass; 0 if each has all.
    """
    dit = settings.sizes.dit
    lay, history = cache.layout, settings.histories[arm]
    known = measured_network(dit, WorldPlayConfig.wan_5b())
    way = reading_of(history.key_codec, history.value_codec, dit.head_dim)
    if not known or way is None or (history.compressed and history.storage == "packed"):
        return None
    tokens, n = lay.block_tokens, dit.frames_per_block
    context = settings.frames - n
    of_block = tokens / QUERIES * dit.layers / LAYERS
    passes = len(settings.sampler.steps)
    keys, past = context // n * tokens + tokens, context / CONTEXT
    spans = min(lay.max_spans, context // n // lay.span_blocks)
    work = Workload(
        layers=dit.layers,
        passes=passes,
        tokens=tokens,
        heads=2 * dit.heads,
        head_dim=dit.head_dim,
        kv_heads=2 * dit.heads,
        spans=spans,
        span_tokens=lay.span_tokens,
        span_bytes=round(
            shape_bytes((cache.span_k, cache.span_v)) / dit.layers / max(lay.max_spans, 1)
        ),
        other_tokens=keys - spans * lay.span_tokens,
        span_blocks=lay.span_blocks,
        slots=lay.max_spans,
        layer_bytes=layer_bytes,
    )
    measured = Measured(
        network=of_block
        * (NETWORK[way] * passes / 4 + past * CONTEXT_NETWORK + past**2 * CONTEXT_ATTENTION),
        attention=ATTENTION[way] * 2 * dit.layers * passes * tokens / QUERIES * keys / KEYS,
        encode=2 * dit.layers * ENCODE * lay.span_tokens * dit.heads if lay.max_spans else 0.0,
    )
    gathered = 2 * 2 * (context // n * tokens) * 2 * dit.heads * dit.head_dim  # K and V of a layer
    rest = (plan.devices - 1) / plan.devices
    exchanged = dit.layers * rest * (gathered + layer_bytes) / measured.link
    return predict(plan, work, measured).seconds + exchanged
