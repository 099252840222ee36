"""Options that the large latent models share; without JAX."""

import dataclasses
from typing import Literal

from qvg_jax.app.model_entry import PlanOptions, ResumableOptions
from qvg_jax.app.option_types import Count, Frames, Layers, Name, Side, Whole

__all__ = ["LatentOptions", "LatentPlanOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentOptions(ResumableOptions):
    """Options of a model that makes latent frames from a prompt.

    Attributes:
        frames: latent frames to generate.
        weights: folder laid out like the release, an address hf:ORGANISATION/NAME[@REVISION][:FOLDER]
            of another transformer on a hub, or "random" for random weights of the true size; what
            `qvg fetch` got if left out.
        prompt: what to see.
        height: height of the video in pixels, whole tokens.
        width: width of the video in pixels, whole tokens.
        image: file with the first frame of the video.
        layers: layers of a transformer of random weights.
        attention: what reads the cache; the fastest that serves if left out.
        precision: precision in which the cache is read. If it is left out, fp8 on Hopper GPUs for codecs of
            at most two bits and one stage of k-means, else bf16.
        devices: devices that share a run; what the model does by itself if left out.
        plan: what they divide: compressed spans, heads, or spans that go around; the model's best if
            left out.
        coordinator: HOST:PORT of the first process of a run of several, each with its own devices.
        processes: processes of such a run.
        process: which of them this is, from 0 on.
    """

    prompt: str | None = None
    height: Side = 480
    width: Side = 832
    image: Name | None = None
    layers: Layers | None = None
    attention: Literal["xla", "cudnn", "mosaic", "mosaic_fp8", "triton"] | None = None
    precision: Literal["bf16", "fp8"] | None = None
    devices: Count | None = None
    plan: Literal["spans", "heads", "ring"] | None = None
    coordinator: str | None = None
    processes: Count | None = None
    process: Whole | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentPlanOptions(PlanOptions):
    """Options of a plan for a model that makes latent frames.

    Attributes:
        frames: latent frames of the video.
        height: height of the video in pixels, whole tokens.
        width: width of the video in pixels, whole tokens.
        layers: layers of the transformer.
    """

    frames: Frames | None = None
    height: Side = 480
    width: Side = 832
    layers: Layers | None = None

    def request[O: LatentOptions](self, options: type[O], **more: object) -> O:
        """The options of the run that is planned.

        Args:
            options: the model's options of a run.
            **more: fields of them that `LatentPlanOptions` does not have.
        """
        first, *rest = self.codec
        names = {f.name for f in dataclasses.fields(options)} & {
            f.name for f in dataclasses.fields(self)
        }
        given = {name: getattr(self, name) for name in names} | dict(codec=first, compare=(*rest,))
        return options(**(given | more))  # type: ignore[arg-type]
