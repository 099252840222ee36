"""Progress on a terminal: how far, how fast, and how large the caches are."""

import sys
from typing import Self

from tqdm import tqdm

from qvg_jax.app.job import Job, Made

__all__ = ["Bars"]


class Bars:
    """A progress bar for each arm, with its own speed and the size of its cache."""

    def __init__(self, job: Job):
        width = max(len(arm.name) for arm in job.arms)
        form = (
            "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        )
        self._bars = {
            arm.name: tqdm(
                desc=arm.name.ljust(width),
                total=job.tour + job.frames,
                position=i,
                disable=None,  # no bars where stderr is not a terminal
                file=sys.stderr,
                bar_format=form,
                dynamic_ncols=True,
                mininterval=0.2,
            )
            for i, arm in enumerate(job.arms)
        }
        for bar in self._bars.values():
            bar.set_postfix_str("compiling")

    def update(self, made: Made) -> None:
        """Moves all bars by one block."""
        for name, bar in self._bars.items():
            size = made.bytes[name]
            speed = f"{made.count / made.seconds[name]:.1f} frames/s"
            cache = f"cache MB: bf16 {size.bf16 / 1e6:.1f} | {size.in_use.total / 1e6:.1f}"
            bar.set_postfix_str(f"{speed}, {cache}", refresh=False)
            bar.update(made.count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for bar in self._bars.values():
            bar.refresh()
            bar.close()
