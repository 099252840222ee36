"""Seconds of a block on many devices, predicted from times of one device and from links.

With n devices, and times of one device for the network, for attention and for encoding,
    compute = fixed + (network + u attention) / n + encoding,
where u >= 1 says how unevenly n devices share the spans. Exchanges of one layer and pass, in bytes that a
device sends, of a block of T tokens, M = heads x head dim and b bytes an element, r = (n - 1) / n:
    spans: r b T M for queries, 4 r T (M + heads) for merged outputs, 8 r T heads for their maxima
    heads: 4 r b T M / n, there and back
    ring:  r (packed slots of the layer + 2 b T M), while attention runs: only the longer one counts
    weights, under any of them: r of the bytes of a layer's weights, where devices share those
and each costs the latency of its steps. Encoding is not divided: all devices encode a span, which they
gather once.
"""

import dataclasses
from collections.abc import Sequence

from qvg_jax.cache.plan import AXES, Plan

__all__ = ["Measured", "Prediction", "Workload", "predict", "scale_table"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One block of a model, and what it reads.

    Attributes:
        layers: of the network.
        passes: of the network over a block, the clean one included.
        tokens: of a block.
        heads, head_dim: of queries.
        kv_heads: heads of K and V.
        spans: compressed ones in the cache.
        span_tokens: of each.
        span_bytes: packed K and V of one span of one layer.
        other_tokens: of sink, window and new block.
        element_bytes: of an activation.
        span_blocks: blocks of a span: one of so many blocks waits for an encoding.
        slots: of the cache, which a ring sends full or not; None for as many as spans.
        layer_bytes: weights of a layer that devices share, and gather in each pass; 0 if each has all.
    """

    layers: int
    passes: int
    tokens: int
    heads: int
    head_dim: int
    kv_heads: int
    spans: int
    span_tokens: int
    span_bytes: int
    other_tokens: int
    element_bytes: int = 2
    span_blocks: int = 8
    slots: int | None = None
    layer_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Times of one block on one device, and the links between devices.

    Attributes:
        network: seconds of everything but self-attention.
        attention: seconds of self-attention.
        encode: seconds of encoding a span in all layers.
        fixed: seconds that more devices do not shorten, such as launches.
        link: bytes a second that a device sends to others; by default as between two H200s of a host.
        latency: seconds of one step of an exchange; likewise.
    """

    network: float
    attention: float
    encode: float = 0.0
    fixed: float = 0.0
    link: float = 197e9
    latency: float = 60e-6

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0.0
            positive = field.name == "link"
            if not isinstance(value, int | float) or value < least or (positive and not value):
                raise ValueError(
                    f"{field.name}={value!r} is not accepted: give a number "
                    f"{'> 0' if positive else '>= 0'}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a plan would take.

    Attributes:
        plan: the plan.
        seconds: of a block.
        exchange: seconds of them in which devices only wait for each other.
        sent: bytes that a device sends for a block.
        speedup: of one device.
    """

    plan: Plan
    seconds: float
    exchange: float
    sent: int
    speedup: float


def predict(plan: Plan, work: Workload, measured: Measured) -> Prediction:
    """The time of a block under a plan, by the model in this module's docstring.

    Raises:
        ValueError: heads that the plan does not divide.
    """
    n, b = plan.devices, work.element_bytes
    if plan.axis == "heads" and work.kv_heads % n:
        raise ValueError(f"plan heads={n} does not divide heads={work.kv_heads}")
    calls, rest = work.layers * work.passes, (n - 1) / n
    width = work.heads * work.head_dim
    of_block, kv = work.tokens * width * b, 2 * work.tokens * work.kv_heads * work.head_dim * b
    gathered = rest * work.span_tokens * work.kv_heads * work.head_dim * 2 * b / work.span_blocks
    attention = measured.attention / n
    if plan.axis == "spans":
        keys = work.spans * work.span_tokens + work.other_tokens
        most = -(-work.spans // n) * work.span_tokens + work.other_tokens / n
        attention = measured.attention * most / max(keys, 1)
        sent = rest * (
            of_block + 4 * work.tokens * (width + work.heads) + 8 * work.tokens * work.heads
        )
        steps = 3 * (n - 1)
    elif plan.axis == "heads":
        sent, gathered = rest * (2 * of_block + kv) / n, 0.0
        steps = 2
    else:
        slots = work.spans if work.slots is None else work.slots
        sent, gathered = rest * (slots * work.span_bytes + kv), 0.0
        steps = n - 1
    if n == 1:
        sent, steps = 0.0, 0
    exchange = calls * (sent / measured.link + steps * measured.latency)
    if plan.axis == "ring":
        exchange = max(0.0, exchange - attention)
    of_weights = calls * rest * work.layer_bytes
    exchange += (work.layers * gathered + of_weights) / measured.link
    busy = measured.fixed + measured.network / n + attention + measured.encode / work.span_blocks
    alone = (
        measured.fixed + measured.network + measured.attention + measured.encode / work.span_blocks
    )
    return Prediction(
        plan=plan,
        seconds=busy + exchange,
        exchange=exchange,
        sent=round(calls * sent + work.layers * gathered + of_weights),
        speedup=alone / (busy + exchange),
    )


def scale_table(counts: Sequence[int], work: Workload, measured: Measured) -> list[Prediction]:
    """Predictions of all plans that divide the work, for each number of devices."""
    found = []
    for n in counts:
        for axis in AXES:
            if axis == "heads" and work.kv_heads % n:
                continue
            found.append(predict(Plan(**{axis: n}), work, measured))
    return found
