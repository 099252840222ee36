"""LingBot-World, version 2, as the command knows it."""

import dataclasses

from models.lingbot.protocol import PROTOCOL
from models.runs.latent_options import LatentOptions, LatentPlanOptions
from qvg_jax.app.hub import Download
from qvg_jax.app.model_entry import ModelEntry, deferred
from qvg_jax.app.option_types import Name
from qvg_jax.codecs.recommended import recommended

__all__ = ["ENTRY", "Options", "PlanOptions"]

NAME = "lingbot"

# After the code of the repository robbyant/lingbot-world-v2. Not tried against a hub.
NEEDS = (
    Download(
        what="the few-step transformer",
        repo="robbyant/lingbot-world-v2-14b-causal-fast",
        subfolder="transformers",
        files=("*.safetensors",),
        place="transformers",
        licence="cc-by-nc-sa-4.0, as others state it",
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
    """Options of LingBot-World.

    Attributes:
        frames: latent frames of the walk, whole blocks of 4; as many as the walk has if left out.
        actions: where to go, such as w-8,right-4.
        poses: in the place of actions, a NumPy file of camera-to-world matrices, one for each video
            frame.
        recall: keep the spans that leave the window packed in host memory, and have those in sight that share
            most of the field of view.
        decode_last: make the pictures when all latents are there, which needs less memory.
    """

    codec: str = recommended(NAME)
    actions: str | None = None
    poses: Name | None = None
    recall: bool = False
    decode_last: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(LatentPlanOptions):
    """Options of a plan for LingBot-World.

    Attributes:
        frames: latent frames of the walk; those of the published one, 244, if left out.
        decode_last: make the pictures when all latents are there and the cache is gone.
    """

    decode_last: bool = False


def memory_advice(options: Options) -> str:
    """What to do when the device's memory is not enough."""
    command = f"qvg plan {NAME} --codec {','.join(options.codecs)} --memory SIZE"
    return (
        f"`{command}` says what needs it; accepted: a codec of fewer bits, fewer --frames, --height "
        "or --width, or no --compare, for all arms are in memory together"
    )


ENTRY = ModelEntry(
    name=NAME,
    summary="LingBot-World 2 (Wan 14B, causal): a picture and a walk become a video.",
    options=Options,
    needs=NEEDS,
    check=deferred("models.worldplay.early_checks:check_walk"),
    protocol=PROTOCOL,
    prepare=deferred("models.lingbot.job:prepare"),
    finished=deferred("models.lingbot.job:finished"),
    plan_options=PlanOptions,
    plan=deferred("models.lingbot.job:plan"),
    memory_advice=memory_advice,
)
