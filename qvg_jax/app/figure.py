"""report.png: PSNR and memory over time, and frames to look at."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qvg_jax.app.job import BASELINE
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
    names = list(strip[0][1])
    rows, columns = len(names), len(strip)
    aspect = np.divide(*strip[0][1][names[0]].shape[:2])
    width, top = 15.0, 4.1 + 0.25 * (len(arms) // 3)
    cell = (width - 1.4) / max(columns, 4)
    bottom = rows * cell * aspect + 0.35
    figure = Figure((width, top + bottom + 0.75), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
    plots, pictures = figure.subfigures(2, 1, height_ratios=(top, bottom))
    config = report["config"]
    seed = f", seed {config['seed']}" if "seed" in config else ""
    given = f"{config['tour_frames']} real frames, then " if config["tour_frames"] else ""
    figure.suptitle(
        f"{report['model']}{seed}: {given}{config['frames']} frames generated",
        fontsize=14,
        fontweight="bold",
        color=INK,
    )
    _plots(plots, report)
    _pictures(pictures, strip, names, rows, max(columns, 4))
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


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
    memory = _axes(axes[-1], "KV cache in use", "frame", "MB")
    sizes = []
    end = np.array(report["block_end_frames"])
    for name, arm in arms.items():
        size = np.array(arm["bytes"]["in_use_after_block"]) / 1e6
        bits = arm["bits_per_element"]["from_buffers"]
        label = f"{name}: {bits:.4g} bits per element, {size[-1]:.1f} MB"
        sizes += memory.plot(end, size, label=label, color=colours[name], lw=1.4)
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
        ax.plot(number, arm["frames"]["psnr_vs_truth"], color=colours[name], lw=1.4)
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
    for name, arm in report["arms"].items():
        if name != BASELINE:
            values = arm["frames"][f"psnr_vs_{BASELINE}"]
            ax.plot(np.arange(1, len(values) + 1), values, color=colours[name], lw=1.4)
    return []


def _seconds_plot(ax: Any, report: Mapping[str, Any], colours: Mapping[str, str]) -> list[Any]:
    ax = _axes(ax, "Seconds for a block, without the first", "frame", "s")
    end = report["block_end_frames"]
    for name, timing in report["timings"]["arms"].items():
        ax.plot(end[1:], timing["block_seconds"][1:], color=colours[name], lw=1.4)
    ax.set_ylim(0, None)
    return []


def _axes(ax: Any, title: str, x: str, y: str) -> Any:
    ax.set_title(title, fontsize=11.5, loc="left", color=INK)
    ax.set_xlabel(x, fontsize=9.5, color=INK)
    ax.set_ylabel(y, fontsize=9.5, color=INK)
    ax.tick_params(labelsize=9, colors=INK, length=3)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.grid(axis="y", color=FAINT, alpha=0.25, lw=0.6)
    return ax


def _pictures(figure: Any, strip: Any, names: list[str], rows: int, columns: int) -> None:
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=dict(wspace=0.03, hspace=0.04))
    for row, name in enumerate(names):
        for column, ax in enumerate(axes[row]):
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            if column >= len(strip):
                continue
            number, frames = strip[column]
            ax.imshow(frames[name], interpolation="nearest", aspect="equal")
            if row == 0:
                ax.set_title(f"frame {number + 1}", fontsize=9.5, color=FAINT, pad=3)
            if column == 0:
                label = name.replace(":", "\n")
                ax.set_ylabel(
                    label, rotation=0, ha="right", va="center", fontsize=10.5, color=INK,
                    fontweight="bold",
                )  # fmt: skip
