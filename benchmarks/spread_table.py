"""What `benchmarks.spread` tells of a row: what its program exchanges, a ring beside bf16, the table of all rows."""

import statistics
from typing import Any

from benchmarks.collectives import exchanges
from benchmarks.common import gb
from qvg_jax.app.report import aligned

__all__ = ["exchanged", "ring_bytes", "table"]


def exchanged(text: str, devices: int) -> dict[str, dict[str, int]]:
    """Of each kind of collective in a block: how many, bytes of operands, bytes that a device sends."""
    return {
        name: {"count": x.count, "operand_bytes": x.operand_bytes, "sent": x.sent(name, devices)}
        for name, x in exchanges(text).items()
    }


def ring_bytes(
    found: dict[str, Any], lay: Any, calls: int, tokens: int, devices: int
) -> dict[str, Any]:
    """What a ring's devices send in a block, and what they would send of the same slots in bf16."""
    sent = found.get("collective-permute", {}).get("sent", 0)
    token = 2 * 2 * lay.batch * lay.heads * lay.head_dim  # K and V in bf16
    hops = calls * (devices - 1)
    new = hops * token * tokens // devices
    spans = hops * token * lay.max_spans // devices * lay.span_tokens
    return {
        "sent_bytes": sent,
        "bf16_bytes": spans + new,
        "bf16_over_sent": round((spans + new) / max(1, sent), 3),
        "of_spans_alone": round(spans / max(1, sent - new), 3),
    }


def table(results: dict[str, Any]) -> str:
    """The rows in words, with the link above them."""
    link, lines = results["link"], []
    lines.append(
        f"{results['device']['count']} x {results['device']['kind']}; link {link['bytes_a_second'] / 1e9:.0f} "
        f"GB/s, {1e6 * link['latency_seconds']:.0f} us a step"
    )
    heads = (
        "arm",
        "plan",
        "s a block after",
        "encoding",
        "speed",
        "predicted",
        "cache",
        "program",
        "sent",
    )
    rows = [heads]
    for r in results["rows"]:
        if "error" in r:
            lines.append(f"{r['arm']}, {r['plan']}: {r['error']}")
        if not r.get("block_seconds"):
            continue
        after = ", ".join(f"{h}: {statistics.median(t):.3f}" for h, t in r["block_seconds"].items())
        told = r.get("predicted_seconds")
        rows.append((
            r["arm"], r["plan"], after,
            f"{r['encoding_block_seconds']:.3f}" if "encoding_block_seconds" in r else "-",
            f"{r['speed']:.2f} x" if "speed" in r else "",
            "" if told is None else f"{told:.3f} ({r['measured_over_predicted']:.2f})",
            gb(max(r["cache_bytes"].values())),
            gb(r["program_bytes"]),
            gb(sum(x["sent"] for x in r["exchanges"].values())),
        ))  # fmt: skip
        if "ring" in r:
            ratio = r["ring"]
            lines.append(
                f"{r['arm']}, {r['plan']}: bf16 would send {ratio['bf16_over_sent']:.2f} x the bytes, "
                f"of spans alone {ratio['of_spans_alone']:.2f} x"
            )
    return "\n".join([*lines, aligned(rows)])
