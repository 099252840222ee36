"""Pocket world, the embedded model, as the command knows it."""

import dataclasses

from models.pocket_world.protocol import PROTOCOL
from qvg_jax.app.model_entry import (
    DEFAULT,
    CaptureOptions,
    ModelEntry,
    PlayOptions,
    ResumableOptions,
    deferred,
)
from qvg_jax.app.option_types import Frames, Name, SomeFrames
from qvg_jax.codecs.recommended import recommended

__all__ = ["ENTRY", "Options", "WalkOptions"]

NAME = "pocket-world"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ResumableOptions):
    """Options of pocket world.

    Attributes:
        compare: more codecs to run beside it, such as rtn,qvg-pro; qvg, where the default codec has
            no company. What qvg loses can be seen, what the default loses can hardly be.
        frames: frames to generate; 240, or as many as --actions say, if left out.
        steps: denoising steps per block; 4 if left out.
        tour: real frames before the generated ones.
        actions: where to go after the tour, such as w-8,d-4; back over the tour if left out.
        endless: a walk of any length: bounded memory, whose oldest frames make room, and frame numbers
            that count back from each block. Without --actions it wanders on from the tour.
        memory: with --endless, frames in sight at least; 256 if left out.
        recall: with --endless, keep what makes room packed in host memory, and have in sight what is
            nearest to each block.
        heads: which heads look back: all, auto for the list that comes along, or a file; see
            docs/heads.md. The bf16 arm has all.
    """

    codec: str = recommended(NAME)
    tour: Frames = 128
    actions: str | None = None
    endless: bool = False
    memory: Frames | None = None
    recall: bool = False
    heads: Name = "all"

    @property
    def codecs(self) -> tuple[str, ...]:
        """Recipes of all arms, the main one first."""
        alone = not self.compare and self.codec in (*DEFAULT, type(self).codec)
        return (*super().codecs, "qvg") if alone else super().codecs


@dataclasses.dataclass(frozen=True, kw_only=True)
class WalkOptions(PlayOptions):
    """Options of a walk through pocket world.

    Attributes:
        steps: denoising steps per block; 4 if left out.
        tour: real frames to begin with.
        memory: frames to remember at least; 256 if left out.
        endless: count frame numbers back from each block, so that a walk of any length looks to the
            model like one of at most 1,024 frames.
        recall: keep what makes room packed in host memory, up to 8,192 frames of it, and have in sight
            what is nearest to each block. A switch of codecs forgets what is out of sight.
    """

    # The smallest recipe that two CPU cores walk with at ease: with `trellis` a block takes twice as
    # long, over a second from a key to a frame where another block is under way.
    codec: str = "midrise-k1v3"
    tour: SomeFrames = 64
    endless: bool = False
    recall: bool = False


def memory_advice(options: Options) -> str:
    """What to do when the device's memory is not enough."""
    return "accepted: fewer --frames, --tour or --compare"


ENTRY = ModelEntry(
    name=NAME,
    summary="Pocket world, the embedded model: a walk through a small world with a ground truth.",
    options=Options,
    prepare=deferred("models.pocket_world.job:prepare"),
    check=deferred("models.pocket_world.early_checks:check_options"),
    protocol=PROTOCOL,
    capture_options=CaptureOptions,
    capture=deferred("models.pocket_world.job:capture"),
    play_options=WalkOptions,
    play=deferred("models.pocket_world.walk:walk"),
    loop=deferred("models.pocket_world.job:loop"),
    memory_advice=memory_advice,
)
