"""Self-Forcing as the command knows it."""

import dataclasses

from models.runs.latent_options import LatentOptions, LatentPlanOptions
from qvg_jax.app.hub import Download
from qvg_jax.app.model_entry import ModelEntry, deferred
from qvg_jax.app.option_types import Count, Whole
from qvg_jax.codecs.recommended import recommended

__all__ = ["ENTRY", "Options", "PlanOptions"]

NAME = "self-forcing"
FRAMES = 21

# After the download instructions of the repository guandeh17/Self-Forcing. Not tried against a hub.
NEEDS = (
    Download(
        what="the transformer",
        repo="gdhe17/Self-Forcing",
        subfolder="checkpoints",
        files=("self_forcing_dmd.pt",),
        entry="generator_ema",
        licence="as its repository states it",
    ),
    Download(
        what="the video VAE, the text encoder and its tokenizer",
        repo="Wan-AI/Wan2.1-T2V-1.3B",
        files=("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/*"),
        licence="apache-2.0",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(LatentOptions):
    """Options of Self-Forcing.

    Attributes:
        frames: latent frames of the whole video; 21, or 22 with --image, if left out.
        video: file with a video to go on from.
        window: latent frames in sight at most; all if left out.
        sink: first latent frames, which are never compressed; 0 if left out.
        span: latent frames that are compressed together; 24 if left out.
        recent: newest latent frames, which are not compressed; 0 if left out.
        decode_last: make the pictures when all latents are there, which needs less memory.
    """

    codec: str = recommended(NAME)
    video: str | None = None
    window: Count | None = None
    sink: Whole | None = None
    span: Count | None = None
    recent: Whole | None = None
    decode_last: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(LatentPlanOptions):
    """Options of a plan for Self-Forcing.

    Attributes:
        frames: latent frames of the whole video; 21 if left out.
        window: latent frames in sight at most; all if left out.
        sink: first latent frames, which are never compressed; 0 if left out.
        span: latent frames that are compressed together; 24 if left out.
        recent: newest latent frames, which are not compressed; 0 if left out.
        decode_last: make the pictures when all latents are there and the cache is gone.
        devices: devices that would share a run; each plan for them gets a line.
    """

    devices: Count | None = None
    window: Count | None = None
    sink: Whole | None = None
    span: Count | None = None
    recent: Whole | None = None
    decode_last: bool = False


def memory_advice(options: Options) -> str:
    """What to do when the device's memory is not enough."""
    command = f"qvg plan {NAME} --frames {options.frames or FRAMES}"
    command += f" --codec {','.join(options.codecs)} --memory SIZE"
    return (
        f"`{command}` says what needs it; accepted: a smaller codec, fewer --frames, --height or "
        "--width, a --window, or no --compare, for all arms are in memory together"
    )


ENTRY = ModelEntry(
    name=NAME,
    summary="Self-Forcing (Wan2.1 1.3B, causal): a prompt becomes a video.",
    options=Options,
    needs=NEEDS,
    prepare=deferred("models.self_forcing.job:prepare"),
    plan_options=PlanOptions,
    plan=deferred("models.self_forcing.job:plan"),
    memory_advice=memory_advice,
)
