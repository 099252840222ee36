"""The job of Self-Forcing: a prompt becomes a video, once for each kind of cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.common.checkpoint import CheckpointError
from models.common.lora import merge_lora
from models.runs import decode, latent_job
from models.runs.checkpoint_folder import Parts
from models.runs.latent_job import LatentModel, Run
from models.runs.request_checks import attention_of, file_digest
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
from qvg_jax.app.job import Arm, Job, Played
from qvg_jax.app.memory_plan import Plan
from qvg_jax.cache.health import cache_bytes

__all__ = ["plan", "prepare"]


class _SelfForcing(LatentModel[Options, Settings]):
    """Self-Forcing, or another release of its kind, as a latent model."""

    fps = 16
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
            "steps": list(settings.sampler.steps),
            "window": options.window,
            "sink": options.sink,
            "span": options.span,
            "recent": options.recent,
            "given": given and file_digest(given),
            **({"loras": {f.name: f.stat().st_size for f in self.loras}} if self.loras else {}),
        }

    def latent_block(self, settings: Settings) -> tuple[tuple[int, ...], Any]:
        dit = settings.sizes.dit
        return (1, dit.frames_per_block, dit.latent_channels, *settings.latent), dit.dtype

    def check_dit(self, files: tuple[Any, ...], settings: Settings) -> None:
        WEIGHTS.check(files, settings.sizes.dit)

    def load_dit(self, files: tuple[Any, ...], options: Options, settings: Settings) -> Any:
        return self._merged(WEIGHTS.load(files, settings.sizes.dit))

    def random_dit(self, options: Options, settings: Settings) -> Any:
        return self._merged(WEIGHTS.random(settings.sizes.dit))

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

    def given_frames(self, run: Run[Options, Settings]) -> int:
        count = _given(run)
        return run.settings.sizes.vae.video_frames(count) if count else 0

    def blocks(self, run: Run[Options, Settings]) -> tuple[Block, ...]:
        return plan_blocks(run.settings.sizes.dit, run.settings.frames, initial_frames=_given(run))

    def block_frames(self, settings: Settings) -> int:
        return settings.sizes.vae.temporal_stride * settings.sizes.dit.frames_per_block

    def play(self, run: Run[Options, Settings], arm: Arm, xs: Iterator[Any]) -> Iterator[Played]:
        settings, size = run.settings, []
        pipeline = SelfForcing(
            run.reader(arm.name), sampler=settings.sampler, history=settings.histories[arm.name]
        )
        stored = run.saved.read(arm.name)[:, : settings.frames - _given(run)]
        generation = Generation(
            text_BUE=run.prompt,
            frames=settings.frames,
            latent_height=settings.latent[0],
            latent_width=settings.latent[1],
            noise=jax.random.fold_in(run.seed_key, 1),
            initial_BFZYX=run.given,
            done_BFZYX=stored,
        )

        def look(_done, _total, state):
            size[:] = [cache_bytes(state.cache)]

        source = decode.Source(
            arm=arm.name,
            latents=pipeline.stream(generation, progress=look),
            given=_given(run),
            stored=stored.shape[1],
            size=lambda: size[0],
            decode_last=run.options.decode_last,
        )
        return decode.play(source, xs, vae=run.vae, saved=run.saved)

    def describe_cache(self, options: Options, settings: Settings, arm: Arm) -> dict[str, Any]:
        lay = arm.state.layout
        return {
            "sink_frames": lay.sink_blocks,
            "span_frames": lay.span_blocks if lay.max_spans else 0,
            "spans": lay.max_spans,
            "window_frames": lay.window_blocks,
            "attention": attention_of(arm.name, options) or "chosen by attend",
            "tokens_of_a_frame": lay.block_tokens,
            "devices": 1 if lay.plan is None else lay.plan.devices,
        }

    def report(self, run: Run[Options, Settings]) -> dict[str, Any]:
        sampler = run.settings.sampler
        return {
            "blocks": len(self.blocks(run)),
            "sampler": {"steps": list(sampler.steps), "shift": sampler.shift},
        }


def _given(run: Run[Options, Settings]) -> int:
    """Latent frames that the user gave."""
    return 0 if run.given is None else run.given.shape[1]


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


def plan(options: PlanOptions, release: str = NAME) -> Plan:
    """What of a run fits into the memory; see `make_plan`."""
    asked, chosen = options.request(Options), RELEASES[release]
    return make_plan(asked, options.memory, sizes_of(chosen, released_sizes()), chosen)
