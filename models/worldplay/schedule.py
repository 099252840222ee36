"""What a generation will do, worked out on the host before it runs.

Which network calls there are, on which positions, and which frames are compressed when. The program
reaches the same decisions from its own counters; this account is to plan and to check.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from models.worldplay.config import SamplerConfig, WorldPlayConfig
from models.worldplay.history import History


@dataclass(frozen=True)
class Call:
    """One pass through the network.

    Attributes:
        context: whether it is a context pass, whose output is K and V.
        first, end: RoPE positions of its frames; context frames count from 0 in their own order.
        timesteps: what each frame is told.
    """

    context: bool
    first: int
    end: int
    timesteps: tuple[float, ...]


@dataclass(frozen=True)
class Compression:
    """Frames [first, end) become one compressed span before block `block` is denoised."""

    first: int
    end: int
    block: int


def count_blocks(config: WorldPlayConfig, frames: int) -> int:
    """Blocks of a video of `frames` latent frames; raises ValueError if they make up no blocks."""
    n = config.frames_per_block
    if frames < 1 or frames % n:
        below = max(frames // n, 0) * n
        near = f"{below} and {below + n}" if below else f"{n}"
        raise ValueError(f"frames={frames} must be a multiple of {n} above 0; the nearest: {near}")
    return frames // n


def network_calls(
    config: WorldPlayConfig,
    sampler: SamplerConfig,
    context_frames: Sequence[int],
    *,
    image: bool = False,
) -> tuple[Call, ...]:
    """All passes of the network in order.

    Each block has a context pass, if there is a context, and then its denoising passes.

    Args:
        config, sampler: frames of a block; steps.
        context_frames: number of context frames of each block: 0, 4, 8, ... until it is bounded.
        image: whether the first frame of the first block is given.
    """
    n, clean, calls = config.frames_per_block, sampler.context_timestep, []
    for block, seen in enumerate(context_frames):
        if seen:
            calls.append(Call(True, 0, seen, (clean,) * seen))
        given = int(image and block == 0)
        for t in sampler.steps:
            calls.append(Call(False, seen, seen + n, (clean,) * given + (t,) * (n - given)))
    return tuple(calls)


def compressions(config: WorldPlayConfig, history: History, blocks: int) -> tuple[Compression, ...]:
    """Which frames are compressed, and before which block.

    When block c is about to be denoised, blocks 0 .. c - 1 are in the cache, and the oldest
    uncompressed `span_blocks` become a span if `keep_recent` more follow them. With the published
    2 and 0 that is: before block c = 2, 4, ..., blocks c - 2 and c - 1.
    """
    done, events, n = 0, [], config.frames_per_block
    for block in range(blocks if history.compressed else 0):
        if block - done >= history.span_blocks + history.keep_recent:
            events.append(Compression(done * n, (done + history.span_blocks) * n, block))
            done += history.span_blocks
    return tuple(events)
