"""Seconds of a block on several GPUs, predicted from what one H100 took; `qvg plan --devices N` shows them.

The model of exchanges is `qvg_jax.study.scale`. What goes in was measured at the true size, on one H100 80GB
with jax 0.11.2 (docs/benchmarks/self-forcing.md and attention.md, pallas_kernels/README.md, 2026-11-26 and
2026-11-28). Times of attention grow with queries and keys, those of the network with the block's tokens.
"""

from models.runs.predicted import ENCODE, LINKS, measured_network, reading_of
from models.self_forcing.config import SelfForcingConfig
from models.self_forcing.settings import Settings
from qvg_jax.app.memory_plan import shape_bytes
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.plan import Plan
from qvg_jax.study.scale import Measured, Workload, predict

__all__ = ["SOURCE", "block_seconds"]

SOURCE = (
    "seconds of the last block: predicted by qvg_jax.study.scale from times of one H100 "
    f"(docs/benchmarks/self-forcing.md, attention.md), {LINKS}"
)

# Seconds of attention of 4,680 queries and 12 heads to 117,000 keys, by what reads the cache.
ATTENTION = {"bf16": 6.33e-3, "mosaic": 6.09e-3, "mosaic_fp8": 4.24e-3}
QUERIES, KEYS, HEADS = 4_680, 117_000, 12
# Block 2 of 63 frames took 0.223 s in bf16, of which 150 calls of attention to 9,360 keys are 0.076 s.
NETWORK = 0.223 - 150 * ATTENTION["bf16"] * 9_360 / KEYS


def block_seconds(
    settings: Settings, arm: str, cache: KVCache, plan: Plan, layer_bytes: int = 0
) -> float | None:
    """Seconds of the last block of a video under a plan, which may be of one device.

    None where nothing was measured: networks of another width, codecs that no kernel reads, and caches with
    local heads.

    Args:
        settings: of the run.
        arm: which cache.
        cache: its shapes.
        plan: how it is spread.
        layer_bytes: weights of a layer that the devices share, and gather in each pass; 0 if each has all.
    """
    dit = settings.sizes.dit
    lay, history = cache.layout, settings.histories[arm]
    if lay.history is not None or not measured_network(dit, SelfForcingConfig.wan_1_3b()):
        return None
    codecs = (history.key_codec, history.value_codec) if lay.max_spans else (None, None)
    if (way := reading_of(*codecs, dit.head_dim)) is None:
        return None
    tokens, frame = max(settings.block_tokens()), lay.block_tokens
    seen = settings.frames
    if history.window_frames is not None:
        seen = min(seen, history.window_frames)
    spans = min(lay.max_spans, max(0, seen * frame - tokens) // max(lay.span_tokens, 1))
    passes = len(settings.sampler.steps) + 1
    keys, calls = seen * frame, dit.layers * passes
    one_span = shape_bytes((cache.span_k, cache.span_v)) / dit.layers / max(lay.max_spans, 1)
    share = tokens / QUERIES * calls / 150  # of the block and the layers that were measured
    measured = Measured(
        network=NETWORK * share,
        attention=ATTENTION[way] * calls * tokens / QUERIES * keys / KEYS * dit.heads / HEADS,
        encode=2 * dit.layers * ENCODE * lay.span_tokens * dit.heads if spans else 0.0,
    )
    work = Workload(
        layers=dit.layers,
        passes=passes,
        tokens=tokens,
        heads=dit.heads,
        head_dim=dit.head_dim,
        kv_heads=dit.heads,
        spans=spans,
        span_tokens=lay.span_tokens,
        span_bytes=round(one_span),
        other_tokens=keys - spans * lay.span_tokens,
        span_blocks=max(1, lay.span_tokens // tokens),
        slots=lay.max_spans,
        layer_bytes=layer_bytes,
    )
    return predict(plan, work, measured).seconds
