"""One sentence about each compressed arm of a report: what report.png and report.html begin with."""

from collections.abc import Mapping
from typing import Any

from qvg_jax.app.job import BASELINE

__all__ = ["headlines", "mean_label", "title"]


def title(report: Mapping[str, Any]) -> str:
    """The run in a line: model, seed and lengths."""
    config = report["config"]
    seed = f", seed {config['seed']}" if "seed" in config else ""
    given = f"{config['tour_frames']} real frames, then " if config["tour_frames"] else ""
    return f"{report['model']}{seed}: {given}{config['frames']} frames generated"


def headlines(report: Mapping[str, Any]) -> dict[str, str]:
    """For each arm beside bf16: how much smaller its cache is, and how close its frames are.

    Alone, the bf16 arm has the sentence.
    """
    arms = report["arms"]
    return {name: _sentence(report, name) for name in arms if name != BASELINE or len(arms) == 1}


def _sentence(report: Mapping[str, Any], name: str) -> str:
    arm, baseline = report["arms"][name], report["arms"].get(BASELINE)
    means, size, first = arm["means"], arm["bytes"], arm["first_compressed_frame"]
    parts = []
    if name != BASELINE and size["times_smaller"] is not None:
        parts.append(f"a cache {size['times_smaller']:.1f}x smaller than in bf16")
    else:
        parts.append(f"a cache of {size['in_use']['total'] / 1e6:.1f} MB")
    if (value := means.get(f"psnr_vs_{BASELINE}")) is not None:
        parts.append(f"{value:.1f} dB to its frames")
    if (value := means.get("psnr_vs_truth")) is not None:
        other = baseline and name != BASELINE and baseline["means"].get("psnr_vs_truth")
        beside = f" (bf16: {other:.1f})" if other is not None and other else ""
        parts.append(f"{value:.1f} dB to the truth{beside}")
    if first is None:
        where = " - nothing was compressed" if name != BASELINE else ""
    else:
        count = report["config"]["frames"]
        where = f", over frames {first + 1} to {count}" if len(parts) > 1 else ""
    return f"{name}: {', '.join(parts)}{where}"


def mean_label(report: Mapping[str, Any], name: str, reference: str) -> str:
    """An arm's name with its mean PSNR to a reference, "truth" or "bf16", for the key of a plot."""
    value = report["arms"][name]["means"].get(f"psnr_vs_{reference}")
    return name if value is None else f"{name}: mean {value:.1f} dB"
