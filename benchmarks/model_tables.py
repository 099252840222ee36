"""The tables that the benchmarks of whole models print of what they measured."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common import gb


def _ran(
    results: dict[str, Any], parts: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields the parts that ran: name, results and heading."""
    for part in parts:
        if part in results:
            r = results[part]
            where = r.get("device", {}).get("kind", "?")
            yield part, r, f"\n{part} ({where})" + (f"  {r['error']}" if "error" in r else "")


def self_forcing_table(results: dict[str, Any], parts: Sequence[str]) -> str:
    """Lines of the parts that ran: seconds of blocks, memory, ratios to bf16."""
    lines = []
    for part, r, heading in _ran(results, parts):
        lines.append(heading)
        if part == "forward":
            for name in ("attend", "dot_product_attention"):
                if name in r:
                    lines.append(
                        f"  {r['queries']} queries, {r['keys']} keys, {name}: "
                        f"{r[name]['milliseconds']} ms; first call {r[name]['first_call_seconds']} s"
                    )
        if "heads" in r:
            h = r["heads"]
            lines.append(
                f"  heads: {h['list']} list, {h['with_a_history']} of {h['of']} with a history, "
                f"{' or '.join(map(str, h['numbers_in_a_layer']))} in a layer; the others read the sink and "
                f"{h['local_frames']} latent frames. bf16 has all of them"
            )
        if part == "arms":
            lines += _videos(r.get("arms", {}))
        if part == "limit" and r.get("latent_frames"):
            lines += _videos({r["arm"]: r})
            lines.append(
                f"  {r['arm']}, {r['frames']} latent frames: peak {gb(r['peak_bytes'])} of "
                f"{gb(r['device']['bytes_limit'])}"
            )
    return "\n".join(lines)


def _videos(arms: dict[str, Any]) -> list[str]:
    """Lines of the arms of a benchmark of Self-Forcing."""
    lines = []
    base = arms.get("bf16", {})
    for name, a in arms.items():
        if "latent_frames" in a:
            made, decoded = a["block_generate_seconds"], a["block_decode_seconds"]
            total = sum(made[1:]) + sum(decoded[1:])
            line = (
                f"  {name}: {a['latent_frames']} frames, without the first block {total:.2f} s "
                f"({sum(made[1:]):.2f} + {sum(decoded[1:]):.2f} decoding), first block {made[0]:.1f} s, "
                f"block 2 {made[1]:.3f} s, last {made[-1]:.3f} s"
            )
            if name != "bf16" and base.get("latent_frames"):
                n = min(len(made), len(base["block_generate_seconds"]))
                ours = sum(made[1:n]) + sum(decoded[1:n])
                theirs = sum(base["block_generate_seconds"][1:n]) + sum(
                    base["block_decode_seconds"][1:n]
                )
                line += f"; {ours / theirs:.3f}x of bf16 over {n} blocks"
            size = a["cache_bytes"]
            lines += [
                line,
                f"    cache in use {gb(size['in_use'])}, bf16 of the same tokens "
                f"{gb(size['bf16_of_the_same_tokens'])}; allocated {gb(size['allocated'])}; "
                f"peak so far {gb(a.get('peak_bytes_so_far'))}",
            ]
        for history, f in a.get("filled", {}).items():
            times = f["seconds_of_later_blocks"]
            if not times:
                lines.append(
                    f"  {name}: after {history} frames {f['first_call_seconds']} s (first call)"
                )
                continue
            theirs = base.get("filled", {}).get(history, {}).get("seconds_of_later_blocks")
            ratio = statistics.median(times) / statistics.median(theirs) if theirs else None
            beside = "" if ratio is None or name == "bf16" else f", {ratio:.3f}x of bf16"
            lines.append(
                f"  {name}: after {history} frames {statistics.median(times):.3f} s a block{beside}, "
                f"{f['spans']} spans; cache allocated {gb(f['cache_bytes_allocated'])}; first call "
                f"{f['first_call_seconds']} s"
            )
    return lines


def worldplay_table(results: dict[str, Any], parts: Sequence[str]) -> str:
    """Lines of the parts that ran: seconds of a block and of its context pass, memory, ratios."""
    lines = []
    for part, r, heading in _ran(results, parts):
        lines.append(heading)
        if part == "blocks":
            lines += _blocks(r)
        elif r.get("ok"):
            lines.append(
                f"  {r['arm']}, {r['frames']} latent frames, {r['weights']} weights: "
                f"{sum(r['block_seconds'][1:]):.1f} s and a first block of "
                f"{r['block_seconds'][0]:.1f} s, decoding {sum(r['decode_seconds'][2:]):.1f} s after "
                f"the first two; peak {gb(r['peak_bytes'])} of "
                f"{gb(r['device']['bytes_limit'])}; "
                f"memory {gb(r['cache_bytes'])}, allocated {gb(r['allocated'])}"
            )
    return "\n".join(lines)


def _blocks(r: dict[str, Any]) -> list[str]:
    """Lines of the arms of a benchmark of HY-WorldPlay."""
    lines, base = [], r.get("arms", {}).get("cudnn", {}).get("block_seconds")
    pair = lambda ts: sum(statistics.median(ts[i::2]) for i in range(2)) / 2  # noqa: E731
    for name, a in r.get("arms", {}).items():
        if not a.get("block_seconds"):
            continue
        block, context = pair(a["block_seconds"]), pair(a["context_seconds"])
        line = f"  {name}: {block:.3f} s a block, its context pass {context:.3f} s"
        lines.append(line + (f"; {block / pair(base):.3f}x of cudnn" if base else ""))
        line = f"    memory {gb(a['cache_bytes'])}, bf16 {gb(a['bf16_bytes'])}"
        if a["spans_bytes"]:
            line += f"; spans 1/{a['spans_bf16'] / a['spans_bytes']:.2f} of bf16"
        line += f"; allocated {gb(a['allocated'])}; peak so far {gb(a['peak_bytes_so_far'])}; "
        lines.append(line + f"first blocks {a['first_seconds']} s")
    return lines


def longcat_table(r: dict[str, Any], opponents: Sequence[str]) -> str:
    """Lines of the arms: milliseconds of an evaluation, memory, ratios to the fastest opponent."""
    where = r.get("device", {})
    lines = [f"{where.get('kind', '?')} x {where.get('count', 1)}, {r.get('layers', '?')} layers"]
    if "error" in r:
        lines.append(f"  {r['error']}")
    if "weights_bytes" in r:
        lines[0] += f", weights {gb(r['weights_bytes'])}, given {r['given_tokens']} tokens, new "
        lines[0] += f"{r['new_tokens']}, both branches"
    arms = r.get("arms", {})
    base = min(
        (arms[n]["milliseconds"] for n in opponents if "milliseconds" in arms.get(n, {})),
        default=None,
    )
    for name, a in arms.items():
        if "error" in a:
            lines.append(f"  {name}: {a['error']}")
        if "milliseconds" not in a:
            continue
        spread = f"{min(a['milliseconds_all'])} to {max(a['milliseconds_all'])}"
        line = f"  {name}: {a['milliseconds']} ms an evaluation ({spread})"
        if base:
            line += f", {a['milliseconds'] / base:.3f}x of the fastest opponent"
        smaller = f", {a['times_smaller']} times smaller" if "times_smaller" in a else ""
        lines += [
            line,
            f"    cache {gb(a['cache_bytes'])}{smaller}; built in "
            f"{a.get('build_seconds', a['build_first_call_seconds'])} s; first calls "
            f"{a['build_first_call_seconds']} and {a['first_call_seconds']} s; peak so far "
            f"{gb(a['peak_bytes_so_far'])}",
        ]
        if "relative_l2_to_opponent" in a:
            lines.append(
                f"    latents differ from the opponent's by {a['relative_l2_to_opponent']:.2e}"
            )
    return "\n".join(lines)
