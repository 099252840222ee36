"""Released checkpoints of Self-Forcing's kind: one transformer, other weights, steps and memories.

Each is a frozen `Release` with its source. What differs beyond weights, steps, blocks, window and LoRA is
not here: see "Other checkpoints" in the README of this folder. This module imports no JAX, for the
command reads it before it answers.
"""

import dataclasses
from typing import Any

from qvg_jax.app.hub import Download

__all__ = ["RELEASES", "Release"]

_AS_STATED = "as its repository states it"
WAN = Download(
    what="the video VAE, the text encoder and its tokenizer",
    repo="Wan-AI/Wan2.1-T2V-1.3B",
    files=("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/*"),
    licence="apache-2.0",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """One released checkpoint.

    Attributes:
        name: what a user calls it, such as "causal-forcing".
        title: its name in prose.
        summary: one line for the help.
        source: paper and repository that the settings are from.
        transformer: the file of the transformer, or the files if a LoRA comes with it.
        size: "1.3B" or "14B", the sizes of Wan2.1.
        frames_per_block: latent frames that are denoised together.
        sampler: changes of `SamplerConfig`.
        window_frames, sink_frames, span_frames: defaults of `History`; None is its own.
        sink_average: of `History`; with it nothing is compressed.
        lora: pattern of the file of a LoRA that is merged into the weights; None for none.
        dit_names: patterns of the transformer's name in a folder of weights, the best first.
    """

    name: str
    title: str
    summary: str
    source: str
    transformer: tuple[Download, ...]
    size: str = "1.3B"
    frames_per_block: int = 3
    sampler: tuple[tuple[str, Any], ...] = ()
    window_frames: int | None = None
    sink_frames: int | None = None
    span_frames: int | None = None
    sink_average: float | None = None
    lora: str | None = None
    dit_names: tuple[str, ...] = ("*dmd*", "*generator*", "transformer", "diffusion_pytorch_model*")

    @property
    def needs(self) -> tuple[Download, ...]:
        """Files on a hub that the release is made of, the transformer first."""
        return (*self.transformer, WAN)


# Files after the download instructions of each repository. None was tried against a hub.
_RELEASES = (
    Release(
        name="self-forcing",
        title="Self-Forcing",
        summary="Self-Forcing (Wan2.1 1.3B, causal): a prompt becomes a video.",
        source="arXiv 2506.08009, github.com/guandeh17/Self-Forcing",
        transformer=(
            Download(
                what="the transformer",
                repo="gdhe17/Self-Forcing",
                subfolder="checkpoints",
                files=("self_forcing_dmd.pt",),
                entry="generator_ema",
                licence=_AS_STATED,
            ),
        ),
        # Wan's own transformer, without Self-Forcing's training, comes last.
        dit_names=(
            "self_forcing*",
            "*dmd*",
            "*generator*",
            "transformer",
            "diffusion_pytorch_model*",
        ),
    ),
    Release(
        name="causal-forcing",
        title="Causal-Forcing, chunkwise",
        summary="Causal-Forcing (Wan2.1 1.3B), blocks of three latent frames.",
        source="github.com/thu-ml/Causal-Forcing, chunkwise",
        transformer=(
            Download(
                what="the transformer",
                repo="zhuhz22/Causal-Forcing",
                subfolder="chunkwise",
                files=("causal_forcing.pt",),
                licence=_AS_STATED,
            ),
        ),
        dit_names=("causal_forcing*", "*dmd*", "*generator*"),
    ),
    Release(
        name="causal-forcing-framewise",
        title="Causal-Forcing, framewise",
        summary="Causal-Forcing (Wan2.1 1.3B), blocks of one latent frame.",
        source="github.com/thu-ml/Causal-Forcing, framewise",
        transformer=(
            Download(
                what="the transformer",
                repo="zhuhz22/Causal-Forcing",
                subfolder="framewise",
                files=("causal_forcing.pt",),
                licence=_AS_STATED,
            ),
        ),
        frames_per_block=1,
        dit_names=("causal_forcing*", "*dmd*", "*generator*"),
    ),
    *(
        Release(
            name=f"causal-forcing-{steps}-step",
            title=f"Causal-Forcing++, {steps} step{'s' * (steps > 1)}",
            summary=f"Causal-Forcing++ (Wan2.1 1.3B), blocks of one latent frame, {what}.",
            source="arXiv 2605.15141, github.com/thu-ml/Causal-Forcing",
            transformer=(
                Download(
                    what="the transformer",
                    repo="zhuhz22/Causal-Forcing",
                    subfolder="causal-forcing++",
                    files=(f"framewise-{steps}step.pt",),
                    entry="generator_ema",
                    licence=_AS_STATED,
                ),
            ),
            frames_per_block=1,
            sampler=(("steps", (1000, 500)[:steps]), ("first_steps", (1000, 750, 500, 250))),
            dit_names=(f"framewise-{steps}step*", "*dmd*", "*generator*"),
        )
        for steps, what in ((2, "two steps each"), (1, "one step each"))
    ),
    Release(
        name="raven",
        title="RAVEN with CM-GRPO",
        summary="RAVEN (Wan2.1 1.3B) with its CM-GRPO LoRA merged.",
        source="arXiv 2605.15190, github.com/mvp-ai-lab/RAVEN",
        transformer=(
            Download(
                what="the transformer",
                repo="mvp-lab/RAVEN",
                files=("raven_model.pt",),
                licence=_AS_STATED,
            ),
            Download(
                what="the LoRA",
                repo="mvp-lab/RAVEN",
                files=("cmgrpo_raven_lora.safetensors",),
                licence=_AS_STATED,
            ),
        ),
        lora="*lora*.safetensors",
        dit_names=("raven_model*", "*generator*"),
    ),
    Release(
        name="longlive",
        title="LongLive-1.3B",
        summary="LongLive (Wan2.1 1.3B) with its LoRA merged, 12 latent frames in sight.",
        source="arXiv 2509.22622, github.com/NVlabs/LongLive",
        transformer=(
            Download(
                what="the transformer",
                repo="Efficient-Large-Model/LongLive-1.3B",
                subfolder="models",
                files=("longlive_base.pt",),
                licence=_AS_STATED,
            ),
            Download(
                what="the LoRA",
                repo="Efficient-Large-Model/LongLive-1.3B",
                subfolder="models",
                files=("lora.pt",),
                entry="generator_lora",
                licence=_AS_STATED,
            ),
        ),
        window_frames=12,
        sink_frames=3,
        span_frames=3,
        lora="*lora*.safetensors",
        dit_names=("longlive*", "*generator*"),
    ),
    Release(
        name="reward-forcing",
        title="Reward-Forcing",
        summary="Reward-Forcing (Wan2.1 1.3B), 9 latent frames in sight, a sink that averages the past.",
        source="github.com/JaydenLyh/Reward-Forcing",
        transformer=(
            Download(
                what="the transformer",
                repo="JaydenLu666/Reward-Forcing-T2V-1.3B",
                files=("rewardforcing.pt",),
                entry="generator_ema",
                licence=_AS_STATED,
            ),
        ),
        window_frames=9,
        sink_frames=3,
        sink_average=0.999,
        dit_names=("rewardforcing*", "*dmd*", "*generator*"),
    ),
    Release(
        name="krea-realtime",
        title="Krea Realtime 14B",
        summary="Krea Realtime (Wan2.1 14B, Self-Forcing): a prompt becomes a video.",
        source="huggingface.co/krea/krea-realtime-video",
        transformer=(
            Download(
                what="the transformer",
                repo="krea/krea-realtime-video",
                files=("krea-realtime-video-14b.safetensors",),
                licence="cc-by-nc-sa-4.0, as others state it",
            ),
        ),
        size="14B",
        sampler=(("steps", (1000, 937, 833, 625)), ("warped", False)),
        dit_names=("krea*", "*generator*", "transformer"),
    ),
)
RELEASES = {release.name: release for release in _RELEASES}
