"""What a model tells the command: its name, its options, and the functions that plan, run and capture it.

A model is one `ModelEntry`. The command finds it by name through a registry (`models.registry`), which
also finds entries of other packages: an entry point of the group `qvg.models` that names a
`ModelEntry` is enough. `docs/add-a-model.md` adds one in a screen of code.

Options are frozen dataclasses. Their fields are exactly the options that the command accepts for the
model; the "Attributes" of the docstring are the help texts. This module imports no JAX, and the module
of an entry should not either: `deferred` names a function without importing it.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvg_jax.app.hub import Download
from qvg_jax.app.option_types import (
    ByteSize,
    File,
    Frames,
    Indices,
    Names,
    Port,
    Rate,
    Steps,
    Whole,
)
from qvg_jax.app.protocol import Protocol
from qvg_jax.codecs.recommended import CAUTIOUS

if TYPE_CHECKING:
    from qvg_jax.app.job import Job
    from qvg_jax.app.memory_plan import Plan
    from qvg_jax.app.play.walk import World
    from qvg_jax.study.capture import Captured

__all__ = [
    "DEFAULT",
    "CaptureOptions",
    "GenerateOptions",
    "ModelEntry",
    "PlanOptions",
    "PlayOptions",
    "ResumableOptions",
    "deferred",
]

DEFAULT = ("", "auto")  # codecs that stand for the model's default


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `qvg generate` that every model has; a model adds its own, and sets `codec`.

    Attributes:
        codec: codec of the compressed cache, NAME or NAME:SETTING=VALUE:...; see `qvg codecs`.
        compare: more codecs to run beside it, such as rtn,qvg-pro.
        frames: frames to generate.
        steps: denoising steps per block.
        seed: seed of everything that is random.
        fps: frames a second of the video; the model's own if left out.
        out: folder for the files.
        stream: write a video that can be played while it grows.
        weights: other weights than the model's own.
    """

    codec: str = CAUTIOUS
    compare: Names = ()
    frames: Frames | None = None
    steps: Steps | None = None
    seed: Whole = 0
    fps: Rate | None = None
    out: File = Path("out")
    stream: bool = False
    weights: str | None = None

    @property
    def codecs(self) -> tuple[str, ...]:
        """Recipes of all arms, the main one first."""
        default = type(self).codec
        return tuple(default if name in DEFAULT else name for name in (self.codec, *self.compare))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumableOptions(GenerateOptions):
    """Options of a model whose interrupted runs can go on.

    Attributes:
        resume: go on with an interrupted run in --out.
        restart: replace an interrupted run in --out.
    """

    resume: bool = False
    restart: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `qvg plan` that every model has.

    Attributes:
        memory: memory of the device, such as 24GB or 22.4GiB; a number alone is in GB below a million, else
            in bytes.
        codec: codecs to compare.
    """

    memory: ByteSize
    codec: Names = ("bf16", "qvg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlayOptions:
    """Options of `qvg play` that every model has.

    Attributes:
        codec: codec to begin with; see `qvg codecs`.
        seed: seed of everything that is random.
        steps: denoising steps per block.
        memory: frames to remember at least.
        weights: other weights than the model's own.
        host: address to listen at.
        port: port to listen at, 0 for any that is free.
        no_browser: do not open a browser.
    """

    codec: str = CAUTIOUS
    seed: Whole = 0
    steps: Steps | None = None
    memory: Frames | None = None
    weights: str | None = None
    host: str = "127.0.0.1"
    port: Port = 8080
    no_browser: bool = False

    @property
    def chosen_codec(self) -> str:
        """The recipe to begin with."""
        return type(self).codec if self.codec in DEFAULT else self.codec


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """Options of `qvg capture`.

    Attributes:
        frames: frames of history.
        layers: layers to write.
        seed: seed of everything that is random.
        out: file to write.
    """

    frames: Frames = 128
    layers: Indices = (0, 2, 5)
    seed: Whole = 0
    out: File = Path("captured.npz")


def _no_advice(options: Any) -> str:
    return "accepted: fewer --frames or --compare"


def _no_check(options: Any) -> None:
    """Accepts all options."""


def _unknown(options: Any) -> bool:
    """Knows of no run that it is finished."""
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model as the command knows it.

    Attributes:
        name: what a user calls it, such as "self-forcing".
        summary: one line for the help.
        options: dataclass of the options of `qvg generate`, a `GenerateOptions`; its `codec` is the
            model's default codec.
        prepare: `prepare(options) -> Job`: checks the options, loads the weights, makes the caches.
            What the user can mend is a `UserError`.
        finished: `finished(options) -> bool`: whether `options.out` has the files of this very run, told
            in a moment, before `prepare` loads anything; False where that cannot be told.
        plan_options, plan: options of `qvg plan`, and `plan(options) -> Plan`; None if the model
            has none.
        capture_options, capture: options of `qvg capture`, and `capture(options) -> Captured`.
        play_options, play: options of `qvg play`, and `play(options) -> World`.
        needs: files on a model hub that the released weights are made of, the transformer first;
            `qvg fetch` gets them. Empty for a model that brings its weights along.
        protocol: what `qvg verify` does with the model; None if nothing is agreed on.
        loop: `loop(recipes, span_tokens) -> {recipe: dB to bf16}`, a short run for `qvg tune`.
        check: `check(options)` raises a `UserError` for what is wrong whatever the weights are, such as a
            codec that is not known. It runs before `prepare`, and its module should import little.
        memory_advice: `memory_advice(options) -> str`, what to change where memory is not enough.
    """

    name: str
    summary: str
    options: type[GenerateOptions]
    prepare: "Callable[[Any], Job]"
    finished: Callable[[Any], bool] = _unknown
    plan_options: type[PlanOptions] | None = None
    plan: "Callable[[Any], Plan] | None" = None
    capture_options: type[CaptureOptions] | None = None
    capture: "Callable[[Any], Captured] | None" = None
    play_options: type[PlayOptions] | None = None
    play: "Callable[[Any], World] | None" = None
    needs: tuple[Download, ...] = ()
    protocol: Protocol | None = None
    loop: Callable[[Sequence[str], int], dict[str, float]] | None = None
    check: Callable[[Any], None] = _no_check
    memory_advice: Callable[[Any], str] = _no_advice

    def __post_init__(self) -> None:
        for task in ("plan", "capture", "play"):
            if (getattr(self, task) is None) != (getattr(self, f"{task}_options") is None):
                raise TypeError(f"{self.name}: give both {task} and {task}_options, or neither")

    @property
    def default_codec(self) -> str:
        """The recipe that the model's cache uses unless its user names another."""
        return self.options.codec

    def task_options(self, task: str) -> type | None:
        """Options of "generate", "verify", "plan", "capture" or "play"; None without such a task."""
        if task == "verify":
            return self.options if self.protocol else None
        return self.options if task == "generate" else getattr(self, f"{task}_options")


def deferred(path: str) -> Callable[..., Any]:
    """A function that is imported when it is called first.

    Args:
        path: "package.module:function".
    """
    module, _, name = path.partition(":")

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call
