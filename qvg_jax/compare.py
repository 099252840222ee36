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

from qvg_jax.cache_state import KVCache
from qvg_jax.codec import Codec
from qvg_jax.health import CacheBytes, CacheFullError, NonFiniteError, cache_bytes
from qvg_jax.metrics import to_uint8
from qvg_jax.rollout import stream

__all__ = ["Arm", "Block", "Job", "Made", "Request", "lockstep"]

BASELINE = "bf16"  # the arm that the others are compared with; it always comes first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asked for; None leaves the choice to the model's job."""

    frames: int | None = None
    tour: int | None = None
    actions: str | None = None
    seed: int = 0
    codecs: tuple[str, ...] = ("qvg",)  # NAME or NAME:SETTING=VALUE:...
    steps: int = 4
    weights: str | None = None


class Block(NamedTuple):
    """One block of the path, as all arms are given it; F frames."""

    x: Any  # what the step reads
    truth_FHW3: UInt8[np.ndarray, "F H W 3"]
    seen_F: Float[np.ndarray, "F"]  # share of the view that the tour has shown; 1 in the tour


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of keeping the cache: its name, its codec, and a state to start from."""

    name: str
    codec: Codec
    state: Any  # consumed by the run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run needs to know of a model.

    Attributes:
        model: its name.
        step: `step(state, x) -> (state, frames)`, for `stream`; frames [1, F, H, W, 3] in [-1, 1].
        arms: `BASELINE` first; all start from the same noise.
        blocks: the path, block by block, made when wanted.
        cache: the cache in an arm's state.
        tour, frames: real frames at the start, and frames to make after them. The last block may
            have more frames than are asked for.
        block_frames, height, width: of a block and a frame.
        config: what else the report should say, as JSON types.
    """

    model: str
    step: Any
    arms: tuple[Arm, ...]
    blocks: Iterable[Block]
    cache: Callable[[Any], KVCache]
    tour: int
    frames: int
    block_frames: int
    height: int
    width: int
    config: dict[str, Any]


class Made(NamedTuple):
    """A block after all arms have made it; no more frames than were asked for."""

    first: int  # number of its first frame
    truth_FHW3: UInt8[np.ndarray, "F H W 3"]
    seen_F: Float[np.ndarray, "F"]
    frames: dict[str, UInt8[np.ndarray, "F H W 3"]]
    bytes: dict[str, CacheBytes]
    seconds: dict[str, float]


def lockstep(job: Job) -> Iterator[Made]:
    """Runs all arms of a job, block by block.

    Raises:
        NonFiniteError, CacheFullError: in place of the block in which it happened, with the name
            of the arm.
    """
    ours, *theirs = itertools.tee(job.blocks, 1 + len(job.arms))
    streams = {
        arm.name: stream(job.step, arm.state, (b.x for b in blocks))
        for arm, blocks in zip(job.arms, theirs, strict=True)
    }
    first, end = 0, job.tour + job.frames
    for block in ours:
        frames, sizes, seconds = {}, {}, {}
        keep = min(job.block_frames, end - first)
        for name, blocks in streams.items():
            begin = time.perf_counter()
            try:
                y = next(blocks)
            except (NonFiniteError, CacheFullError) as error:
                raise type(error)(f"{name}: {error}") from error
            seconds[name] = time.perf_counter() - begin
            frames[name] = to_uint8(y[0, :keep])
            sizes[name] = cache_bytes(job.cache(blocks.state))
        yield Made(first, block.truth_FHW3[:keep], block.seen_F[:keep], frames, sizes, seconds)
        first += keep
