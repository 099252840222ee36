"""HY-WorldPlay as the command knows it."""

import dataclasses

from models.runs.latent_options import LatentOptions, LatentPlanOptions
from models.worldplay.protocol import PROTOCOL
from qvg_jax.app.hub import Download
from qvg_jax.app.model_entry import ModelEntry, deferred
from qvg_jax.app.option_types import Count, Side
from qvg_jax.codecs.recommended import recommended

__all__ = ["ENTRY", "Options", "PlanOptions"]

NAME = "worldplay"
# After the download instructions of the repository Tencent-Hunyuan/HY-WorldPlay. Not tried against a hub.
NEEDS = (
    Download(
        what="the distilled transformer",
        repo="tencent/HY-WorldPlay",
        subfolder="wan_distilled_model",
        files=("model.pt",),
        name="worldplay_distilled",
        licence="as its repository states it",
    ),
    Download(
        what="the video VAE, the text encoder and its tokenizer",
        repo="Wan-AI/Wan2.2-TI2V-5B",
        files=("Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/*"),
        licence="apache-2.0",
    ),
)
CODEC = f"{recommended(NAME)}:storage=single"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(LatentOptions):
    """Options of WorldPlay.

    Attributes:
        frames: latent frames of the walk; all of it if left out.
        actions: where to go, such as w-8,right-4.
        recall: spans of eight latent frames that a block reads; the walk may be of any length. All spans are
            kept packed in host memory, and those come back that share most of the field of view.
        share_weights: with --devices, keep a part of every layer's weights on each; layers are gathered
            as they run.
        decode_last: make the pictures when all latents are there, which needs less memory.
    """

    codec: str = CODEC
    height: Side = 704
    width: Side = 1280
    actions: str | None = None
    recall: Count | None = None
    share_weights: bool = False
    decode_last: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(LatentPlanOptions):
    """Options of a plan for WorldPlay.

    Attributes:
        frames: latent frames of the walk; those of the published one, 48, if left out.
        recall: spans of eight latent frames that a block reads; the others are in host memory.
        decode_last: make the pictures when all latents are there and the cache is gone.
        devices: devices that would share a run; each plan for them gets a line.
        share_weights: with --devices, keep a part of every layer's weights on each; layers are gathered
            as they run.
    """

    recall: Count | None = None
    devices: Count | None = None
    share_weights: bool = False
    height: Side = 704
    width: Side = 1280
    decode_last: bool = False


def memory_advice(options: Options) -> str:
    """What to do when the device's memory is not enough."""
    command = f"qvg plan {NAME} --codec {','.join(options.codecs)} --memory SIZE"
    return (
        f"`{command}` says what needs it; accepted: a codec of fewer bits, storage=single, fewer "
        "--frames, --height or --width, or no --compare, for all arms are in memory together"
    )


ENTRY = ModelEntry(
    name=NAME,
    summary="HY-WorldPlay (Wan2.2 5B): a picture and a walk become a video.",
    options=Options,
    needs=NEEDS,
    check=deferred("models.worldplay.early_checks:check_walk"),
    protocol=PROTOCOL,
    prepare=deferred("models.worldplay.job:prepare"),
    finished=deferred("models.worldplay.job:finished"),
    plan_options=PlanOptions,
    plan=deferred("models.worldplay.job:plan"),
    memory_advice=memory_advice,
)
