"""What a generation will do, worked out on the host before it runs.

Which blocks of frames there are, how often the network is called and on what, and which frames are
compressed when. The cache reaches the same decisions from its own counters; this account sizes it,
and says early what would not fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from models.self_forcing.sampler import Ladder


@dataclass(frozen=True)
class Block:
    """Latent frames that go through the network together; `given` ones are only read."""

    first_frame: int
    frames: int
    given: bool

    @property
    def end_frame(self) -> int:
        """One past the last frame."""
        return self.first_frame + self.frames


@dataclass(frozen=True)
class Call:
    """One pass through the network: where, and the timestep it is told."""

    block: Block
    timestep: float


@dataclass(frozen=True)
class Compression:
    """Frames [first, end) become one compressed span when `stored` frames are in the cache."""

    first: int
    end: int
    stored: int


def plan_blocks(
    config: SelfForcingConfig,
    frames: int,
    *,
    initial_frames: int = 0,
    first_frame_alone: bool | None = None,
) -> tuple[Block, ...]:
    """Cuts a video into blocks.

    Args:
        config: gives the frames per block and the longest video.
        frames: latent frames of the whole video, given ones included.
        initial_frames: frames given as latents: an image (1) or a video to go on from.
        first_frame_alone: whether frame 0 is a block of its own, as in image-to-video; the released
            model was trained without. None: only if the number of initial frames asks for it.

    Raises:
        ValueError: a number of frames that blocks cannot make up, or a video longer than the RoPE
            table without a horizon.
    """
    n = config.frames_per_block
    if first_frame_alone is None:
        first_frame_alone = n > 1 and initial_frames % n == 1
    alone = int(first_frame_alone)
    sizes = f"{n} k" + (" + 1" if alone else "")
    if not 0 <= initial_frames <= frames or frames < 1:
        raise ValueError(
            f"initial_frames={initial_frames} must lie in 0..frames, and frames={frames} above 0"
        )
    if initial_frames and (initial_frames - alone) % n:
        raise ValueError(f"initial_frames={initial_frames} must be {sizes}: blocks are {n} frames")
    if (frames - alone) % n:
        below = (frames - alone) // n * n + alone
        raise ValueError(
            f"frames={frames} must be {sizes}: blocks are {n} frames; "
            f"the nearest are {below} and {below + n}"
        )
    if frames > config.rope_frames and config.horizon is None:
        raise ValueError(
            f"frames={frames} is more than rope_frames={config.rope_frames}, the rows of the "
            "model's RoPE table: positions beyond it were never defined"
        )
    starts = [0] * alone + list(range(alone, frames, n))
    ends = [*starts[1:], frames] if alone else [s + n for s in starts]
    return tuple(Block(a, b - a, b <= initial_frames) for a, b in zip(starts, ends, strict=True))


def network_calls(blocks: Sequence[Block], sampler: SamplerConfig) -> tuple[Call, ...]:
    """All passes of the network in order.

    A generated block has its denoising steps and a clean pass, a given block the clean pass alone.
    """

    def told(block: Block) -> list[float]:
        if block.given:
            return [0.0]
        steps = Ladder(sampler.of_block(block.first_frame)).steps.tolist()
        return [*steps, sampler.context_timestep]

    return tuple(Call(block, t) for block in blocks for t in told(block))


def compressions(
    blocks: Sequence[Block], *, span_frames: int, keep_recent: int = 0, sink_frames: int = 0
) -> tuple[Compression, ...]:
    """Which frames are compressed, and before which block.

    Before a block runs, the oldest `span_frames` uncompressed frames after the sink become a span
    if at least `keep_recent` more are stored behind them. With the paper's 24 and 0 that is: before
    block c = 8, 16, ..., blocks c - 8 .. c - 1.

    Args:
        blocks: from `plan_blocks`.
        span_frames: frames of one span.
        keep_recent: newest frames that are left alone.
        sink_frames: first frames of the video, never compressed.

    Source: Quant VideoGen (arXiv 2602.02958), the released Self-Forcing schedule.
    """
    done, events = sink_frames, []
    for block in blocks:
        stored = block.first_frame
        if stored - done >= span_frames + keep_recent:
            events.append(Compression(done, done + span_frames, stored))
            done += span_frames
    return tuple(events)
