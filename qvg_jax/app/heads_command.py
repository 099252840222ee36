"""The work of `qvg tune --heads`: which heads look back, as a list of classes, a table and a picture."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qvg_jax.app.report import aligned
from qvg_jax.errors import UserError
from qvg_jax.files import replacing, writable_folder
from qvg_jax.reading.head_lists import rows_of
from qvg_jax.study.capture import load_captured
from qvg_jax.study.heads import REGIONS, HeadRegions, HeadScores, classes, measure_heads

__all__ = ["draw_heads", "head_list", "run_heads"]


def run_heads(
    files: Sequence[Path],
    out: Path,
    *,
    share: float,
    block_tokens: int | None,
    sink_blocks: int,
    local_blocks: int,
) -> str:
    """Measures the heads of captured files; writes heads.json and heads.png, returns the table.

    Args:
        files: from `qvg capture`, all of the same layers: other blocks, seeds and steps.
        out: folder for the files.
        share: of the heads that become local.
        block_tokens: of the model; it is not in the files.
        sink_blocks, local_blocks: what a local head would read.

    Raises:
        UserError: no `block_tokens`, or files that cannot be measured together.
    """
    if block_tokens is None:
        raise UserError("--heads needs --block-tokens: the tokens of a block of the model's cache")
    writable_folder(out)
    regions = HeadRegions(
        block_tokens=block_tokens, sink_blocks=sink_blocks, local_blocks=local_blocks
    )
    captures = [load_captured(file) for file in files]
    scores = measure_heads(captures, regions)
    layers = captures[0].layers.tolist()
    table = classes(scores, share)
    made_by = {
        "files": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
        "layers": layers,
        "share": share,
        **dataclasses.asdict(regions),
    }
    with replacing(out / "heads.json") as partial:
        partial.write_text(head_list(table, local_blocks, made_by, scores))
    draw_heads(out / "heads.png", scores, table, layers)
    said = [_table(scores, table, layers), f"{int((~table).sum())} of {table.size} heads are local"]
    if layers != list(range(len(layers))):
        said.append(
            f"warning: layers {', '.join(map(str, layers))} were captured; a list for `--heads` needs all "
            "layers of the model, from 0 on: capture with --layers"
        )
    if captures[0].own_k_LBHQD is None:
        said.append("warning: the files lack the K and V of the block that asks: its share is 0")
    return "\n".join(said)


def head_list(
    table: Bool[np.ndarray, "L H"],
    local_blocks: int,
    made_by: dict[str, Any],
    scores: HeadScores | None = None,
) -> str:
    """The text of a list of heads, in the format of `qvg_jax.reading.head_lists`."""
    found: dict[str, Any] = {
        "local_blocks": local_blocks,
        "table": rows_of(table),
        "made_by": made_by,
    }
    if scores is not None:
        numbers = {"error": scores.error, "layer_error": scores.layer_error}
        numbers |= {f"share of {n}": x for n, x in zip(REGIONS, scores.shares, strict=True)}
        found["scores"] = {name: np.round(x, 5).tolist() for name, x in numbers.items()}
    return json.dumps(found, indent=1) + "\n"


def draw_heads(
    path: Path, scores: HeadScores, table: Bool[np.ndarray, "L H"], layers: Sequence[int]
) -> None:
    """Where each head looks and what it would lose, layers x heads, local heads marked, as PNG."""
    count, heads = table.shape
    figure = Figure((3 + 0.9 * heads, 1.8 + 0.22 * count), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    pictures = {"softmax mass on the history": scores.shares[3]}
    pictures |= {"error without it, over the layer": scores.layer_error}
    for axes, (title, x) in zip(figure.subplots(1, 2), pictures.items(), strict=True):
        image = axes.imshow(x, vmin=0, vmax=max(1.0, float(x.max())), cmap="Blues", aspect="auto")
        for l, h in zip(*np.nonzero(~table), strict=True):
            axes.plot(h, l, "o", ms=4, color="#d0551f")
        axes.set(title=title, xlabel="head (dots: local)", xticks=range(heads))
        axes.set_yticks(range(count), [str(layer) for layer in layers])
        figure.colorbar(image, ax=axes)
    figure.axes[0].set_ylabel("layer")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


def _table(scores: HeadScores, table: Bool[np.ndarray, "L H"], layers: Sequence[int]) -> str:
    """A line for each layer: its classes, and the numbers of its heads as least and largest."""
    between = lambda x: f"{x.min():.2f} to {x.max():.2f}"  # noqa: E731
    rows = [("layer", "heads", *REGIONS, "error", "over the layer")]
    for l, (row, number) in enumerate(zip(rows_of(table), layers, strict=True)):
        numbers = (*scores.shares[:, l], scores.error[l], scores.layer_error[l])
        rows.append((str(number), f"[{row}]", *map(between, numbers)))
    return aligned(rows)
