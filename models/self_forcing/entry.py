"""Self-Forcing, and other checkpoints of its kind, as the command knows them."""

import dataclasses
import functools
from collections.abc import Callable

from models.runs.latent_options import LatentOptions, LatentPlanOptions
from models.self_forcing.protocol import PROTOCOL
from models.self_forcing.releases import RELEASES, Release
from qvg_jax.app.model_entry import ModelEntry, deferred
from qvg_jax.app.option_types import Count, Frames, Name, Names, SomeFrames
from qvg_jax.codecs.recommended import recommended

__all__ = ["ENTRIES", "ENTRY", "Options", "PlanOptions"]

NAME = "self-forcing"
FRAMES = 21


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(LatentOptions):
    """Options of Self-Forcing.

    Attributes:
        frames: latent frames of the whole video; 21, or 22 with --image, if left out.
        video: file with a video to go on from.
        window: latent frames in sight at most; those of the release, mostly all, if left out.
        sink: first latent frames, which are never compressed; 0, or those of the release.
        span: latent frames that are compressed together; 24, or 3 in a short window.
        recent: newest latent frames, which are not compressed; 0 if left out.
        endless: count positions back from each block, so that --frames may be more than the model's
            1,024 positions.
        horizon: with --endless, latent frames beyond which older history counts as so old; as far as the
            model's positions reach if left out.
        heads: which heads look back: all, or a file that lists them; see docs/heads.md. The others read the
            sink, which is then a block unless --sink says more, and the newest frames.
        local: newest latent frames that such a head reads; those of the file, or 4, if left out.
        lora: file of a LoRA to merge into the weights, beside that of the release.
        share_weights: with --devices, keep a part of every layer's weights on each; layers are gathered
            as they run.
        decode_last: make the pictures when all latents are there, which needs less memory.
    """

    codec: str = recommended(NAME)
    video: Name | None = None
    window: Frames | None = None
    sink: SomeFrames | None = None
    span: Frames | None = None
    recent: SomeFrames | None = None
    endless: bool = False
    horizon: Frames | None = None
    heads: Name = "all"
    local: SomeFrames | None = None
    lora: Name | None = None
    share_weights: bool = False
    decode_last: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(LatentPlanOptions):
    """Options of a plan for Self-Forcing.

    Attributes:
        frames: latent frames of the whole video; 21 if left out.
        window: latent frames in sight at most; those of the release, mostly all, if left out.
        sink: first latent frames, which are never compressed; 0, or those of the release.
        span: latent frames that are compressed together; 24, or 3 in a short window.
        recent: newest latent frames, which are not compressed; 0 if left out.
        endless: count positions back from each block, so that --frames may be more than the model's
            1,024 positions.
        heads: which heads look back: all, or a file that lists them.
        local: newest latent frames that the others read; those of the file, or 4, if left out.
        decode_last: make the pictures when all latents are there and the cache is gone.
        devices: devices that would share a run; each plan for them gets a line.
        share_weights: with --devices, keep a part of every layer's weights on each; layers are gathered
            as they run.
    """

    devices: Count | None = None
    share_weights: bool = False
    window: Frames | None = None
    sink: SomeFrames | None = None
    span: Frames | None = None
    recent: SomeFrames | None = None
    endless: bool = False
    heads: Name = "all"
    local: SomeFrames | None = None
    decode_last: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainOptions(Options):
    """Options of a release whose window is too short to compress any of it."""

    codec: str = recommended("reward-forcing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainPlanOptions(PlanOptions):
    """Options of a plan for such a release."""

    codec: Names = (recommended("reward-forcing"),)


def _advice(name: str) -> Callable[[Options], str]:
    """What to do when the device's memory is not enough for a release."""

    def memory_advice(options: Options) -> str:
        command = f"qvg plan {name} --frames {options.frames or FRAMES}"
        command += f" --codec {','.join(options.codecs)} --memory SIZE"
        return (
            f"`{command}` says what needs it; accepted: a smaller codec, fewer --frames, --height or "
            "--width, a --window, or no --compare, for all arms are in memory together"
        )

    return memory_advice


def _entry(release: Release) -> ModelEntry:
    prepare = deferred("models.self_forcing.job:prepare")
    finished = deferred("models.self_forcing.job:finished")
    plan = deferred("models.self_forcing.job:plan")
    return ModelEntry(
        name=release.name,
        summary=release.summary,
        options=Options if release.sink_average is None else PlainOptions,
        needs=release.needs,
        check=deferred("models.runs.early_checks:check_codecs"),
        protocol=PROTOCOL if release.name == NAME else None,
        prepare=functools.partial(prepare, release=release.name),
        finished=functools.partial(finished, release=release.name),
        plan_options=PlanOptions if release.sink_average is None else PlainPlanOptions,
        plan=functools.partial(plan, release=release.name),
        memory_advice=_advice(release.name),
    )


ENTRIES = {name: _entry(release) for name, release in RELEASES.items()}
ENTRY = ENTRIES[NAME]
