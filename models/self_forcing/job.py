"""The job of Self-Forcing: a prompt becomes a video, once for each kind of cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.common.checkpoint import CheckpointError
from models.common.lora import merge_lora
from models.runs import latent_job
from models.runs.block_model import BlockModel, Look
from models.runs.checkpoint_folder import Parts
from models.runs.devices import on_all_devices, weight_placement
from models.runs.latent_job import Run
from models.runs.request_checks import file_digest
from models.self_forcing.config import SamplerConfig
from models.self_forcing.entry import NAME, Options, PlanOptions
from models.self_forcing.initial import initial_latents
from models.self_forcing.params import RULES, WEIGHTS
from models.self_forcing.pipeline import Generation, SelfForcing
from models.self_forcing.plan import make_plan
from models.self_forcing.releases import RELEASES, Release
from models.self_forcing.schedule import Block, plan_blocks
from models.self_forcing.settings import (
    PLANS,
    Settings,
    chosen_sizes,
    released_sizes,
    settle,
    sizes_of,
)
from qvg_jax.app import memory_plan
from qvg_jax.app.job import Arm, Job

__all__ = ["finished", "plan", "prepare"]


class _SelfForcing(BlockModel[Options, Settings]):
    """Self-Forcing, or another release of its kind, as a latent model."""

    fps = 16
    weights = WEIGHTS
    plans = PLANS

    def __init__(self, release: Release):
        self.release = release
        self.name, self.needs, self.dit_names = release.name, release.needs, release.dit_names
        self.loras: tuple[Path, ...] = ()

    def settle(self, options: Options, parts: Parts | None) -> Settings:
        self.loras = loras(options, self.release, parts)
        sizes = chosen_sizes(options, parts, sizes_of(self.release, released_sizes()))
        alone = bool(options.image) and sizes.dit.frames_per_block > 1
        return settle(options, sizes, first_frame_alone=alone, release=self.release)

    def identity(self, options: Options, settings: Settings) -> dict[str, Any]:
        given = options.image or options.video
        return {
            **_steps(settings.sampler),
            "window": options.window,
            "sink": options.sink,
            "span": options.span,
            "recent": options.recent,
            "given": given and file_digest(given),
            **({"horizon": settings.sizes.dit.horizon} if options.endless else {}),
            **_said_of_heads(settings),
            **({"loras": {f.name: f.stat().st_size for f in self.loras}} if self.loras else {}),
        }

    def load_dit(self, files: tuple[Any, ...], options: Options, settings: Settings) -> Any:
        place = weight_placement(settings.plan, share=options.share_weights)
        return self._merged(self.weights.load(files, settings.sizes.dit, device=place))

    def random_dit(self, options: Options, settings: Settings) -> Any:
        dit = super().random_dit(options, settings)
        return self._merged(on_all_devices(dit, settings.plan, share=options.share_weights))

    def _merged(self, dit: Any) -> Any:
        for file in self.loras:
            dit = merge_lora(dit, file, RULES)
        return dit

    def encode_given(
        self, options: Options, settings: Settings, given: Any, vae: Any
    ) -> np.ndarray | None:
        path = options.image or options.video
        if path is None:
            return None
        return initial_latents(
            vae,
            settings.sizes.dit,
            path,
            image=bool(options.image),
            frames=settings.frames,
            height=settings.height,
            width=settings.width,
        )

    def given_latents(self, run: Run[Options, Settings]) -> int:
        return 0 if run.given is None else run.given.shape[1]

    def given_frames(self, run: Run[Options, Settings]) -> int:
        count = self.given_latents(run)
        return run.settings.sizes.vae.video_frames(count) if count else 0

    def blocks(self, run: Run[Options, Settings]) -> tuple[Block, ...]:
        return plan_blocks(
            run.settings.sizes.dit, run.settings.frames, initial_frames=self.given_latents(run)
        )

    def latents(
        self, run: Run[Options, Settings], arm: Arm, stored: np.ndarray, look: Look
    ) -> Iterator[Any]:
        settings = run.settings
        pipeline = SelfForcing(
            run.reader(arm.name),
            sampler=settings.sampler,
            history=settings.histories[arm.name],
            share_weights=run.options.share_weights,
        )
        generation = Generation(
            text_BUE=run.prompt,
            frames=settings.frames,
            latent_height=settings.latent[0],
            latent_width=settings.latent[1],
            noise=jax.random.fold_in(run.seed_key, 1),
            initial_BFZYX=run.given,
            done_BFZYX=stored,
        )
        return pipeline.stream(generation, progress=look)

    def describe_cache(self, options: Options, settings: Settings, arm: Arm) -> dict[str, Any]:
        plan = arm.state.layout.plan
        devices = {"devices": 1 if plan is None else plan.devices}
        return super().describe_cache(options, settings, arm) | devices

    def report(self, run: Run[Options, Settings]) -> dict[str, Any]:
        sampler = run.settings.sampler
        return {
            "blocks": len(self.blocks(run)),
            "sampler": {**_steps(sampler), "shift": sampler.shift},
        }


def _steps(sampler: SamplerConfig) -> dict[str, list[int]]:
    """The noise levels of the blocks, and those of the first one if it has others."""
    first = {} if sampler.first_steps is None else {"first_steps": list(sampler.first_steps)}
    return {"steps": list(sampler.steps), **first}


def _said_of_heads(settings: Settings) -> dict[str, str]:
    """Which heads have a history, in words that differ if the tables do; nothing if all have one."""
    found = {str(h.heads) for h in settings.histories.values() if h.heads is not None}
    return {"heads": found.pop()} if found else {}


def loras(options: Options, release: Release, parts: Parts | None) -> tuple[Path, ...]:
    """The LoRA files that a run merges: the release's, from the folder of weights, and the user's.

    Raises:
        CheckpointError: one of them is not there.
    """
    found = []
    if parts and release.lora:
        folder = Path(options.weights or ".")
        files = sorted(folder.glob(release.lora))
        if len(files) != 1:
            raise CheckpointError(
                f"weights={str(folder)!r} has {len(files)} files {release.lora}; accepted: the one "
                f"LoRA of {release.title}"
            )
        found += files
    if options.lora:
        if not Path(options.lora).is_file():
            raise CheckpointError(f"lora={options.lora!r} is not a file")
        found.append(Path(options.lora))
    return tuple(found)


def prepare(options: Options, release: str = NAME) -> Job:
    """The job of a user's options; `options.frames` are latent frames. See `latent_job.prepare`."""
    return latent_job.prepare(_SelfForcing(RELEASES[release]), options)


def finished(options: Options, release: str = NAME) -> bool:
    """Whether `options.out` has the files of this very run; see `latent_job.finished`."""
    return latent_job.finished(_SelfForcing(RELEASES[release]), options)


def plan(options: PlanOptions, release: str = NAME) -> memory_plan.Plan:
    """What of a run fits into the memory; see `make_plan`."""
    asked, chosen = options.request(Options), RELEASES[release]
    return make_plan(asked, options.memory, sizes_of(chosen, released_sizes()), chosen)
