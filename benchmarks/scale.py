"""How a block of Self-Forcing would scale over 2, 8 and 64 GPUs: measured times in, a table out.

    python -m benchmarks.scale measured.json --history 150

measured.json has the fields of `qvg_jax.study.scale.Measured`: seconds of one block on one GPU for the
network, for attention and for encoding a span, what does not divide, and the links' bytes a second. Other
numbers of a Self-Forcing run follow from its sizes. Nothing is computed on a device.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from benchmarks.common import numbers
from models.runs.early_checks import codec_pair
from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from qvg_jax.app.report import aligned
from qvg_jax.study.scale import Measured, Prediction, Workload, scale_table


def workload(
    codec: str,
    *,
    history: int,
    span: int,
    height: int = 60,
    width: int = 104,
    config: SelfForcingConfig | None = None,
) -> Workload:
    """A block of Self-Forcing, by default of true size, after `history` latent frames."""
    config = SelfForcingConfig.wan_1_3b() if config is None else config
    rows, columns = config.grid(height, width)
    tokens, n = rows * columns, config.frames_per_block
    pair = [c for c in codec_pair(codec) if c is not None]
    spans = max(0, history - n) // span if pair else 0
    shape = (1, config.heads, span * tokens, config.head_dim)
    bits = sum(c.bits_per_element(shape) for c in pair)
    return Workload(
        layers=config.layers,
        passes=len(SamplerConfig().steps) + 1,
        tokens=n * tokens,
        heads=config.heads,
        head_dim=config.head_dim,
        kv_heads=config.heads,
        spans=spans,
        span_tokens=span * tokens,
        span_bytes=round(bits / 8 * config.heads * span * tokens * config.head_dim),
        other_tokens=(history - spans * span + n) * tokens,
        span_blocks=span // n,
    )


def measured_from(text: str) -> Measured:
    """Measured times from JSON; other keys (device, date) are left alone."""
    known = {field.name for field in dataclasses.fields(Measured)}
    found = json.loads(text)
    if missing := {"network", "attention"} - found.keys():
        raise ValueError(f"measured times lack {', '.join(sorted(missing))}")
    return Measured(**{name: found[name] for name in known & found.keys()})


def table(found: list[Prediction]) -> str:
    rows = [("devices", "plan", "s a block", "waiting", "GB sent", "speed")]
    for p in found:
        cells = (f"{p.seconds:.3f}", f"{p.exchange:.3f}", f"{p.sent / 1e9:.2f}")
        rows.append((str(p.plan.devices), p.plan.axis, *cells, f"{p.speedup:.2f} x"))
    return aligned(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path)
    parser.add_argument("--codec", default="qvg")
    parser.add_argument("--history", type=int, default=150, help="latent frames before the block")
    parser.add_argument("--span", type=int, default=24, help="latent frames of a span")
    parser.add_argument("--devices", type=numbers, default=(2, 8, 64))
    asked = parser.parse_args()
    work = workload(asked.codec, history=asked.history, span=asked.span)
    print(table(scale_table(asked.devices, work, measured_from(asked.measured.read_text()))))


if __name__ == "__main__":
    main()
