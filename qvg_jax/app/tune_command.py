"""The work of `qvg capture` and `qvg tune`, once their arguments are read."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qvg_jax.app.model_entry import CaptureOptions
from qvg_jax.app.report import aligned
from qvg_jax.errors import UserError
from qvg_jax.files import replacing, writable_folder
from qvg_jax.study.capture import Captured, load_captured, save_captured
from qvg_jax.study.tune import CLIPPED, Score, candidates, draw, recommended, tune

__all__ = ["run_capture", "run_tune"]

LOOPED = 6  # recipes that are tried in the model: the closest within the budget, and QVG


def run_capture(capture: Callable[[Any], Captured], options: CaptureOptions) -> str:
    """Writes K, V and Q of a model; returns what was written, in one line."""
    out = options.out
    if out.is_dir():
        raise UserError(f"out={str(out)!r} is a folder; accepted: a file to write, such as a.npz")
    writable_folder(out.parent)
    captured = capture(options)
    save_captured(out, captured)
    layers, _, heads, tokens, dim = captured.k_LBHTD.shape
    queries = captured.q_LBHQD.shape[3]
    what = f"{layers} layers x {heads} heads x {tokens} tokens x {dim}, {queries} queries"
    return f"K and V of {what}, {out.stat().st_size / 1e6:.1f} MB, in {out}"


def run_tune(
    file: Path,
    out: Path,
    *,
    span_tokens: int | None,
    budget: float | None,
    recipes: Sequence[str] | None,
    loop: Callable[..., dict[str, float]] | None,
) -> str:
    """Measures recipes on a captured file; writes tune.json and tune.png, returns the table.

    Args:
        file: from `qvg capture`.
        out: folder for the files.
        span_tokens: None is all captured tokens, at most 4,096.
        budget: bits per element; None is no limit.
        recipes: None is all there are.
        loop: `loop(recipes, span_tokens)` -> dB to bf16 of each, run in a model.
    """
    captured = load_captured(file)
    writable_folder(out)
    span = span_tokens or min(4096, captured.k_LBHTD.shape[3])
    count = len(candidates(span) if recipes is None else recipes)
    left_out: dict[str, str] = {}
    with tqdm(total=count, unit="codec", file=sys.stderr, disable=None) as bar:
        scores = tune(
            captured,
            span,
            recipes,
            budget=math.inf if budget is None else budget,
            progress=lambda _: bar.update(),
            refused=left_out.__setitem__,
        )
    if loop is not None:
        closest = sorted(scores, key=lambda s: s.attention_error + s.worst_queries)[:LOOPED]
        chosen = dict.fromkeys(s.recipe for s in closest) | dict.fromkeys(
            s.recipe for s in scores if s.recipe.startswith("qvg:")
        )
        looped = loop(list(chosen), span)
        scores = [dataclasses.replace(s, loop=looped.get(s.recipe)) for s in scores]
    with replacing(out / "tune.json") as partial:
        rows = [dataclasses.asdict(s) for s in scores]
        partial.write_text(json.dumps({"span_tokens": span, "scores": rows}, indent=1) + "\n")
    draw(out / "tune.png", scores)
    said = [_table(scores), *(f"left out {name}: {why}" for name, why in left_out.items())]
    if span_tokens is None:
        said.append(
            f"warning: spans of {span} tokens were taken, for the file does not say how long the "
            "model's are; longer ones take more centroids for the same bits: give --span-tokens"
        )
    said += [
        f"warning: {s.recipe} clips: of the largest values {s.peaks:.0%} are left"
        for s in scores
        if s.peaks < CLIPPED
    ]
    said.append(_advice(scores, budget))
    return "\n".join(said)


def _advice(scores: Sequence[Score], budget: float | None) -> str:
    """The recipe to try first, and why; none without a budget, for more bits are always closer."""
    if budget is None:
        return "give --budget BITS to be told which recipe to try first"
    best = recommended(scores)
    if best is None:
        return "no recipe is recommended: all of them clip the largest values of these tensors"
    columns = "median and worst layer, worst queries"
    columns += " and the loop" if best.loop is not None else ""
    return f"try first: {best.recipe} ({best.bits:.3f} bits), the best over {columns} together"


def _table(scores: Sequence[Score]) -> str:
    """One line per recipe, smallest first; a star marks the Pareto front."""
    looped = any(s.loop is not None for s in scores)
    head = ("", "codec", "bits", "error of K", "of V", "attention: median layer", "worst layer")
    head += ("worst queries", "peaks kept")
    rows = [head + (("dB to bf16",) if looped else ())]
    for s in scores:
        columns = (s.key_error, s.value_error, s.median_layer, s.worst_layer, s.worst_queries)
        errors = (f"{x:.4f}" for x in columns)
        row = ("*" if s.best else "", s.recipe, f"{s.bits:.3f}", *errors, f"{s.peaks:.2f}")
        rows.append(row + ((f"{s.loop:.2f}" if s.loop is not None else "",) if looped else ()))
    return aligned(rows)
