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
from qvg_jax.files import replacing, writable_folder
from qvg_jax.study.capture import Captured, load_captured, save_captured
from qvg_jax.study.tune import Score, candidates, draw, tune

__all__ = ["run_capture", "run_tune"]

LOOPED = 6  # recipes that are tried in the model: the closest within the budget, and QVG


def run_capture(capture: Callable[[Any], Captured], options: CaptureOptions) -> str:
    """Writes K, V and Q of a model; returns what was written, in one line."""
    out, captured = options.out, capture(options)
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
        closest = sorted(scores, key=lambda s: s.attention_error)[:LOOPED]
        chosen = dict.fromkeys(s.recipe for s in closest) | dict.fromkeys(
            s.recipe for s in scores if s.recipe.startswith("qvg:")
        )
        looped = loop(list(chosen), span)
        scores = [dataclasses.replace(s, loop=looped.get(s.recipe)) for s in scores]
    with replacing(out / "tune.json") as partial:
        rows = [dataclasses.asdict(s) for s in scores]
        partial.write_text(json.dumps({"span_tokens": span, "scores": rows}, indent=1) + "\n")
    draw(out / "tune.png", scores)
    return "\n".join(
        [_table(scores), *(f"left out {name}: {why}" for name, why in left_out.items())]
    )


def _table(scores: Sequence[Score]) -> str:
    """One line per recipe, smallest first; a star marks the Pareto front."""
    looped = any(s.loop is not None for s in scores)
    head = ("", "codec", "bits", "error of K", "of V", "of attention")
    rows = [head + (("dB to bf16",) if looped else ())]
    for s in scores:
        errors = (f"{x:.4f}" for x in (s.key_error, s.value_error, s.attention_error))
        row = ("*" if s.best else "", s.recipe, f"{s.bits:.3f}", *errors)
        rows.append(row + ((f"{s.loop:.2f}" if s.loop is not None else "",) if looped else ()))
    return aligned(rows)
