"""LongCat-Video as the command knows it."""

import dataclasses

from models.longcat.protocol import PROTOCOL
from models.runs.latent_options import LatentOptions, LatentPlanOptions
from qvg_jax.app.hub import Download
from qvg_jax.app.model_entry import ModelEntry, deferred
from qvg_jax.app.option_types import Count, Frames, Name
from qvg_jax.codecs.recommended import recommended

__all__ = ["ENTRY", "Options", "PlanOptions"]

NAME = "longcat"

# After the files of the repository meituan-longcat/LongCat-Video. Not tried against a hub.
NEEDS = (
    Download(
        what="the transformer, the video VAE, the text encoder and its tokenizer",
        repo="meituan-longcat/LongCat-Video",
        files=(
            "dit/*.json", "dit/*.safetensors", "vae/*.json", "vae/*.safetensors",
            "text_encoder/*.json", "text_encoder/*.safetensors", "tokenizer/*",
        ),
        licence="mit",
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(LatentOptions):
    """Options of LongCat-Video.

    Attributes:
        frames: latent frames of the whole video, 24 + 5 k for k segments; 29 if left out.
        steps: denoising steps of a clip; 50, or 16 with --lora, if left out.
        video: file with a video to go on from.
        cond_frames: frames that a segment goes on from, 1 + 4 k; 73 if left out.
        lora: file with a distillation LoRA to merge into the weights: 16 steps, no guidance.
    """

    codec: str = recommended(NAME)
    video: Name | None = None
    cond_frames: Frames | None = None
    lora: Name | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(LatentPlanOptions):
    """Options of a plan for LongCat-Video.

    Attributes:
        frames: latent frames of the whole video, on which the memory does not depend.
        cond_frames: frames that a segment goes on from, 1 + 4 k; 73 if left out.
        devices: devices that would share transformer and cache; each codec gets a line for them.
    """

    cond_frames: Frames | None = None
    devices: Count | None = None


def memory_advice(options: Options) -> str:
    """What to do when the device's memory is not enough."""
    codecs = ",".join(options.codecs)
    return (
        f"`qvg plan {NAME} --codec {codecs} --memory SIZE` says what needs it; accepted: "
        "a smaller codec, fewer --cond-frames, --height or --width, or more devices, of which all "
        "that divide the heads are used"
    )


ENTRY = ModelEntry(
    name=NAME,
    summary="LongCat-Video (13.6B): a prompt becomes a long video, segment by segment.",
    options=Options,
    needs=NEEDS,
    check=deferred("models.runs.early_checks:check_codecs"),
    protocol=PROTOCOL,
    prepare=deferred("models.longcat.job:prepare"),
    finished=deferred("models.longcat.job:finished"),
    plan_options=PlanOptions,
    plan=deferred("models.longcat.job:plan"),
    memory_advice=memory_advice,
)
