"""One video made several times, with a cache of its own each: arms that advance in lock-step.

Lock-step and not one arm after another: after every block all arms have the same frames, so the
video beside the truth grows from the first block on, and whatever ends the run (Ctrl-C, NaN, a
full disk) leaves it complete up to there. The price is that all caches are alive at once; a
run is as large as its arms together.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from qvg_jax.app.metrics import to_uint8
from qvg_jax.cache.health import (
    CacheBytes,
    CacheFullError,
    NonFiniteError,
    cache_bytes,
    raise_if_not_finite,
)
from qvg_jax.cache.state import KVCache
from qvg_jax.loop import stream

__all__ = ["Arm", "Block", "Job", "Made", "Played", "lockstep"]

BASELINE = "bf16"  # the arm that the others are compared with; if it is there, it comes first


class Block(NamedTuple):
    """One block of the path, as all arms are given it; F frames."""

    x: Any  # what the step reads
    truth_FHW3: UInt8[np.ndarray, "F H W 3"] | None = None  # None: nobody knows it
    seen_F: Float[np.ndarray, "F"] | None = None  # share of the view that the tour has shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of keeping the cache: its name and a state to start from."""

    name: str
    state: Any  # consumed by the run; jobs with a `play` of their own may give shapes only


class Played(NamedTuple):
    """One block of one arm."""

    frames_FHW3: UInt8[np.ndarray, "F H W 3"]
    bytes: CacheBytes
    parts: dict[str, float] = {}  # seconds, by what they were spent on
    kept: bool = False  # read again from an earlier run, not generated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run of a model: its step or its way of playing an arm, the arms, the path, sizes and report.

    Attributes:
        model: its name.
        step: `step(state, x) -> (state, frames)`, for `stream`; frames [1, F, H, W, 3] in [-1, 1];
            a `play` may do without.
        arms: `BASELINE` first, if it is there; all start from the same noise.
        blocks: the path, block by block, made when wanted.
        cache: the cache in an arm's state.
        tour, frames: real frames at the start, and frames to make after them. The last block may
            have more frames than are asked for.
        block_frames, height, width: of a block (the largest) and a frame.
        config: what else the report should say, as JSON types.
        play: `play(arm, xs)` yields a `Played` for each x; None runs `step` through `stream`.
        fps: frames a second at which the model's videos are meant to be seen.
        truth: whether frames have a ground truth; if not, `blocks` give none.
        finished: called when all files of the run are written.
        anew: whether a run that should go on (`--resume`) would begin anew: nothing of it was found.
    """

    model: str
    step: Any = None
    arms: tuple[Arm, ...]
    blocks: Iterable[Block]
    cache: Callable[[Any], KVCache]
    tour: int
    frames: int
    block_frames: int
    height: int
    width: int
    config: dict[str, Any]
    play: Callable[[Arm, Iterator[Any]], Iterator[Played]] | None = None
    fps: int = 8
    truth: bool = True
    finished: Callable[[], None] = lambda: None
    anew: bool = False

    @property
    def baseline(self) -> str | None:
        """`BASELINE` if there is such an arm."""
        return BASELINE if any(arm.name == BASELINE for arm in self.arms) else None


class Made(NamedTuple):
    """A block after all arms have made it; no more frames than were asked for."""

    first: int  # number of its first frame
    count: int  # of its frames
    truth_FHW3: UInt8[np.ndarray, "F H W 3"] | None
    seen_F: Float[np.ndarray, "F"] | None
    frames: dict[str, UInt8[np.ndarray, "F H W 3"]]
    bytes: dict[str, CacheBytes]
    seconds: dict[str, float]
    parts: dict[str, dict[str, float]]  # of the seconds
    kept: dict[str, bool]  # see `Played`


def lockstep(job: Job, begins: Callable[[str], None] | None = None) -> Iterator[Made]:
    """Runs all arms of a job, block by block.

    Args:
        job: the run.
        begins: called with an arm's name before it makes its next block.

    Raises:
        NonFiniteError, CacheFullError: in place of the block in which it happened, with the name
            of the arm.
    """
    play = _steps(job) if job.play is None else job.play
    ours, *theirs = itertools.tee(job.blocks, 1 + len(job.arms))
    players = {
        arm.name: play(arm, (b.x for b in blocks))
        for arm, blocks in zip(job.arms, theirs, strict=True)
    }
    first, end = 0, job.tour + job.frames
    for block in ours:
        played, seconds = {}, {}
        for name, player in players.items():
            if begins is not None:
                begins(name)
            begin = time.perf_counter()
            try:
                played[name] = next(player)
            except (NonFiniteError, CacheFullError) as error:
                raise type(error)(f"{name}: {error}") from error
            seconds[name] = time.perf_counter() - begin
        count = min(end - first, *(len(p.frames_FHW3) for p in played.values()))
        yield Made(
            first=first,
            count=count,
            truth_FHW3=None if block.truth_FHW3 is None else block.truth_FHW3[:count],
            seen_F=None if block.seen_F is None else block.seen_F[:count],
            frames={name: p.frames_FHW3[:count] for name, p in played.items()},
            bytes={name: p.bytes for name, p in played.items()},
            seconds=seconds,
            parts={name: p.parts for name, p in played.items()},
            kept={name: p.kept for name, p in played.items()},
        )
        first += count


def _steps(job: Job) -> Callable[[Arm, Iterator[Any]], Iterator[Played]]:
    """The `play` of a job whose step makes frames."""

    def play(arm, xs):
        blocks = stream(job.step, arm.state, xs)
        for number, y in enumerate(blocks):
            raise_if_not_finite(f"frames of block {number}", y)
            yield Played(to_uint8(y[0]), cache_bytes(job.cache(blocks.state)))

    return play
