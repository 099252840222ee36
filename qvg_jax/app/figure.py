"""report.png: a headline for each arm, PSNR and memory over time, and frames to look at."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qvg_jax.app.headline import headlines, mean_label, title
from qvg_jax.app.job import BASELINE
from qvg_jax.app.panels import difference
from qvg_jax.app.report import SEEN
from qvg_jax.files import replacing

__all__ = ["write_figure"]

INK, FAINT = "#1d2129", "#8a919e"
COLOURS = ("#5b6270", "#1f77d0", "#e0812a", "#2a9d6f", "#a454c4", "#c2407a")


def write_figure(
    path: str | os.PathLike,
    report: Mapping[str, Any],
    strip: Sequence[tuple[int, Mapping[str, UInt8[np.ndarray, "H W 3"]]]],
) -> None:
    """Draws a report and its strip of frames; the file appears whole or not at all.

    The same report gives the same bytes: no dates and no versions in the file.

    Args:
        path: where the PNG appears.
        report: what `Record.report` returns.
        strip: (frame number, {name: picture}) with "truth", if there is one, and the arms, as in
            `Record.strip`.
    """
    arms = report["arms"]
    rows = _rows(strip, arms)
    columns = max(len(strip), 4)
    aspect = np.divide(*strip[0][1][rows[0][1]].shape[:2])
    said = list(headlines(report).values()) + [f"Warning: {text}" for text in report["warnings"]]
    width, top = 15.0, 4.1 + 0.25 * (len(arms) // 3) + 0.27 * len(said)
    bottom = len(rows) * (width - 1.4) / columns * aspect + 0.35
    figure = Figure((width, top + bottom + 0.75), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
    plots, pictures = figure.subfigures(2, 1, height_ratios=(top, bottom))
    figure.suptitle(title(report), fontsize=14, fontweight="bold", color=INK)
    plots.suptitle(
        "\n".join(textwrap.fill(text, 130) for text in said),
        fontsize=12.5, color=COLOURS[1], fontweight="bold", linespacing=1.35,
    )  # fmt: skip
    _plots(plots, report)
    _pictures(pictures, strip, rows, columns)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


def _rows(strip: Any, arms: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """What each row of pictures shows: its label, a name in `strip`, and whether its difference to bf16."""
    rows = [(name.replace(":", "\n"), name, False) for name in strip[0][1]]
    if BASELINE in arms:
        for name in arms:
            if name != BASELINE:
                label = name.replace(":", "\n")
                rows.append((f"10 x difference\n{label}", name, True))
    return rows


def _plots(figure: Any, report: Mapping[str, Any]) -> None:
    arms, config = report["arms"], report["config"]
    colours = dict(zip(arms, COLOURS * len(arms), strict=False))
    timings = report["timings"]["arms"]
    plots = [
        (_truth_plot, "seen_in_tour" in report),
        (_baseline_plot, BASELINE in arms and len(arms) > 1),
        (_seconds_plot, all("block_seconds" in t for t in timings.values())),
    ]
    plots = [plot for plot, wanted in plots if wanted]
    axes = figure.subplots(1, len(plots) + 1, squeeze=False)[0]
    lines = [
        line for plot, ax in zip(plots, axes, strict=False) for line in plot(ax, report, colours)
    ]
    spans = any(arm["first_compressed_frame"] is not None for arm in arms.values())
    teeth = "teeth: a span is compressed" if spans else ""
    memory = _axes(axes[-1], "KV cache in use", "frame", "MB", teeth)
    sizes = []
    end = np.array(report["block_end_frames"])
    for name, arm in arms.items():
        size = np.array(arm["bytes"]["in_use_after_block"]) / 1e6
        bits = arm["bits_per_element"]["from_buffers"]
        label = f"{name}: {bits:.4g} bits per element, {size[-1]:.1f} MB"
        sizes += memory.plot(end, size, label=label, **_look(name, colours))
    lines = sizes + lines
    if config["tour_frames"]:
        memory.axvspan(0, config["tour_frames"], color=FAINT, alpha=0.14, lw=0)
        memory.text(
            config["tour_frames"] / 2, 0.97, "tour", transform=memory.get_xaxis_transform(),
            ha="center", va="top", fontsize=9.5, color=INK,
        )  # fmt: skip
    memory.set_xlim(0, end[-1])
    memory.set_ylim(0, None)
    # Outside of the axes, where it can hide nothing.
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, fontsize=10)


def _truth_plot(ax: Any, report: Mapping[str, Any], colours: Mapping[str, str]) -> list[Any]:
    ax = _axes(ax, "PSNR to ground truth", "generated frame", "dB")
    seen = np.array(report["seen_in_tour"])
    number = np.arange(1, len(seen) + 1)
    for name, arm in report["arms"].items():
        ax.plot(number, arm["frames"]["psnr_vs_truth"], **_look(name, colours))
    _means(ax, report, "truth", colours)
    if not (seen < SEEN).any():
        return []
    # Half a frame to each side, so that a single frame has a width.
    edges = np.stack([number - 0.5, number + 0.5], 1).ravel()
    unseen = ax.fill_between(
        edges, 0, 1, where=np.repeat(seen < SEEN, 2), color=FAINT, alpha=0.18, lw=0,
        transform=ax.get_xaxis_transform(), label="places that the tour did not show",
    )  # fmt: skip
    return [unseen]


def _baseline_plot(ax: Any, report: Mapping[str, Any], colours: Mapping[str, str]) -> list[Any]:
    ax = _axes(ax, f"PSNR to the {BASELINE} arm", "generated frame", "dB")
    firsts = []
    for name, arm in report["arms"].items():
        if name != BASELINE:
            values = arm["frames"][f"psnr_vs_{BASELINE}"]
            ax.plot(np.arange(1, len(values) + 1), values, color=colours[name], lw=1.4)
            firsts.append(len(values) if (n := arm["first_compressed_frame"]) is None else n)
    _means(ax, report, BASELINE, colours)
    if not (first := min(firsts)):
        return []
    same = ax.axvspan(
        0.5, first + 0.5, color=FAINT, alpha=0.10, lw=0, hatch="//",
        label="before the first compressed span: not in the means",
    )  # fmt: skip
    return [same]


def _look(name: str, colours: Mapping[str, str]) -> dict[str, Any]:
    """How a curve is drawn: bf16 thick and light behind the others, so that none of them hides it."""
    if name == BASELINE:
        return dict(color=colours[name], lw=5, alpha=0.35, zorder=1.5)
    return dict(color=colours[name], lw=1.4)


def _means(ax: Any, report: Mapping[str, Any], reference: str, colours: Mapping[str, str]) -> None:
    """Writes the means into a plot, below one another in the colours of the arms."""
    names = [name for name in report["arms"] if name != reference]
    known = [n for n in names if (f"psnr_vs_{reference}") in report["arms"][n]["means"]]
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + (high - low) * 0.075 * len(known))
    for i, name in enumerate(known):
        ax.text(
            0.99, 0.985 - 0.065 * i, mean_label(report, name, reference), fontsize=9,
            color=colours[name], transform=ax.transAxes, ha="right", va="top", fontweight="bold",
        )  # fmt: skip


def _seconds_plot(ax: Any, report: Mapping[str, Any], colours: Mapping[str, str]) -> list[Any]:
    ax = _axes(ax, "Seconds for a block, without the first", "frame", "s")
    end = report["block_end_frames"]
    for name, timing in report["timings"]["arms"].items():
        ax.plot(end[1:], timing["block_seconds"][1:], **_look(name, colours))
    ax.set_ylim(0, None)
    return []


def _axes(ax: Any, title: str, x: str, y: str, note: str = "") -> Any:
    ax.set_title(title, fontsize=11.5, loc="left", color=INK)
    ax.set_title(note, fontsize=9, loc="right", color=FAINT)
    ax.set_xlabel(x, fontsize=9.5, color=INK)
    ax.set_ylabel(y, fontsize=9.5, color=INK)
    ax.tick_params(labelsize=9, colors=INK, length=3)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.grid(axis="y", color=FAINT, alpha=0.25, lw=0.6)
    return ax


def _pictures(figure: Any, strip: Any, rows: Sequence[tuple[str, str, bool]], columns: int) -> None:
    spaces = dict(wspace=0.03, hspace=0.04)
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=spaces)
    for row, (label, name, is_difference) in enumerate(rows):
        for column, ax in enumerate(axes[row]):
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            if column >= len(strip):
                continue
            number, frames = strip[column]
            shown = difference(frames[name], frames[BASELINE]) if is_difference else frames[name]
            ax.imshow(shown, interpolation="nearest", aspect="equal")
            if row == 0:
                ax.set_title(f"frame {number + 1}", fontsize=9.5, color=FAINT, pad=3)
            if column == 0:
                ax.set_ylabel(
                    label, rotation=0, ha="right", va="center", fontsize=10.5, color=INK,
                    fontweight="bold",
                )  # fmt: skip
