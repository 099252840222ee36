"""The protocol of `qvg verify`: what is generated, which frames are compared, and what others measured.

A model's protocol is data: prompts, windows of frames, published numbers with their source, and bands.
This module imports no JAX.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qvg_jax.app.option_types import Count

__all__ = ["Band", "Protocol", "Published", "VerifyOptions", "Window"]


@dataclasses.dataclass(frozen=True)
class Window:
    """Some frames of a video, over which a metric is averaged.

    Attributes:
        name: in words, such as "the first 16 frames".
        first: number of its first frame.
        end: number of the frame after its last one; None is the end of the video.
    """

    name: str
    first: int = 0
    end: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A number that others measured with the released weights.

    Attributes:
        recipe: what they call the codec.
        source: where the number stands.
        psnr: dB to their bf16 run.
        ssim, lpips: to their bf16 run; None if not stated.
        window: name of the `Window`; None if the source does not state which frames.
        ours: the recipe here that is the nearest; None if there is none.
    """

    recipe: str
    source: str
    psnr: float
    ssim: float | None = None
    lpips: float | None = None
    window: str | None = None
    ours: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """The least PSNR with which a recipe passes, and why.

    Attributes:
        recipe: the arm that is judged.
        window: name of the `Window`.
        least: dB to the bf16 arm.
        why: where the limit comes from.
    """

    recipe: str
    window: str
    least: float
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """What `qvg verify` does with a model.

    Attributes:
        frames: the model's `--frames`.
        recipes: codecs beside the model's default; bf16 always runs.
        windows: frames that are compared.
        prompts: one for each video; empty for a model without prompts.
        options: other options of the model that the protocol sets where its user does not.
        published: what others measured.
        bands: what passes, for released weights.
        notes: what a reader has to know to compare, a sentence each.
    """

    frames: int
    recipes: tuple[str, ...]
    windows: tuple[Window, ...]
    prompts: tuple[str, ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})
    published: tuple[Published, ...] = ()
    bands: tuple[Band, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = {window.name for window in self.windows}
        for row in (*self.published, *self.bands):
            if row.window is not None and row.window not in names:
                raise ValueError(f"window={row.window!r} is not one of {sorted(names)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of `qvg verify` beside those of `qvg generate`.

    Attributes:
        videos: videos to make, each with a prompt of the protocol and a seed of its own; as many as
            the protocol has prompts if left out.
        lpips: measure LPIPS, too, which needs the extra `lpips`.
    """

    videos: Count | None = None
    lpips: bool = False
