"""report.png: PSNR and memory over time, and frames to look at."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qvg_jax.compare import BASELINE
from qvg_jax.files import replacing
from qvg_jax.report import SEEN

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
        strip: (frame number, {name: picture}) with "truth" and the arms, as in `Record.strip`.
    """
    arms = report["arms"]
    rows, columns = 1 + len(arms), len(strip)
    aspect = np.divide(*strip[0][1]["truth"].shape[:2])
    width, top = 15.0, 4.1
    cell = (width - 1.4) / max(columns, 4)
    bottom = rows * cell * aspect + 0.35
    figure = Figure((width, top + bottom + 0.75), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
    plots, pictures = figure.subfigures(2, 1, height_ratios=(top, bottom))
    config = report["config"]
    figure.suptitle(
        f"{report['model']}, seed {config['seed']}: {config['tour_frames']} real frames, then "
        f"{config['frames']} generated",
        fontsize=14,
        fontweight="bold",
        color=INK,
    )
    _plots(plots, report)
    _pictures(pictures, strip, ["truth", *arms], rows, max(columns, 4))
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


def _plots(figure: Any, report: Mapping[str, Any]) -> None:
    arms = report["arms"]
    others = len(arms) > 1
    axes = figure.subplots(1, 2 + others)
    colours = dict(zip(arms, COLOURS * len(arms), strict=False))
    seen = np.array(report["seen_in_tour"])
    number = np.arange(1, len(seen) + 1)

    ax = _axes(axes[0], "PSNR to ground truth", "generated frame", "dB")
    for name, arm in arms.items():
        ax.plot(number, arm["frames"]["psnr_vs_truth"], color=colours[name], lw=1.3, label=name)
    if (seen < SEEN).any():
        ax.fill_between(
            number, 0, 1, where=seen < SEEN, transform=ax.get_xaxis_transform(), step="mid",
            color=FAINT, alpha=0.18, lw=0, label="not in the tour",
        )  # fmt: skip
    ax.legend(frameon=False, fontsize=9, ncols=2)

    if others:
        ax = _axes(axes[1], f"PSNR to the {BASELINE} arm", "generated frame", "dB")
        for name, arm in arms.items():
            if name != BASELINE:
                values = arm["frames"][f"psnr_vs_{BASELINE}"]
                ax.plot(number, values, color=colours[name], lw=1.3, label=name)
        ax.legend(frameon=False, fontsize=9, ncols=2)

    ax = _axes(axes[-1], "KV cache in use", "frame", "MB")
    config = report["config"]
    for name, arm in arms.items():
        size = np.array(arm["bytes"]["in_use_after_block"]) / 1e6
        frame = np.minimum(
            np.arange(1, len(size) + 1) * config["cache"]["block_frames"],
            config["tour_frames"] + config["frames"],
        )
        label = f"{name}: {size[-1]:.1f} MB"
        ax.plot(frame, size, color=colours[name], lw=1.6, label=label)
    ax.axvspan(0, config["tour_frames"], color=FAINT, alpha=0.14, lw=0, label="tour")
    ax.set_xlim(0, frame[-1])
    ax.set_ylim(0, None)
    ax.legend(frameon=False, fontsize=9, loc="upper left")


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
                ax.set_ylabel(name, fontsize=11, color=INK, fontweight="bold")
