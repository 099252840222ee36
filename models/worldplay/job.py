"""The job of WorldPlay: a picture and a walk become a video, once for each kind of memory."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from models.runs import latent_job
from models.runs.block_model import BlockModel, Look
from models.runs.checkpoint_folder import Parts
from models.runs.devices import on_all_devices, weight_placement
from models.runs.latent_job import Run
from models.runs.reading import attention_told
from models.runs.request_checks import file_digest
from models.worldplay.entry import NAME, NEEDS, Options, PlanOptions
from models.worldplay.params import WEIGHTS
from models.worldplay.picture import check_picture, picture_latent
from models.worldplay.pipeline import WorldPlay
from models.worldplay.plan import make_plan
from models.worldplay.request import Walk
from models.worldplay.settings import ACTIONS, PLANS, Settings, released_sizes, settle
from qvg_jax.app.job import Arm, Job
from qvg_jax.app.memory_plan import Plan
from qvg_jax.errors import UserError

__all__ = ["finished", "plan", "prepare"]


class _WorldPlay(BlockModel[Options, Settings]):
    """WorldPlay as a latent model."""

    name = NAME
    needs = NEEDS
    weights = WEIGHTS
    fps = 16
    plans = PLANS
    # Wan's own transformer, which knows no actions, is refused by its names.
    dit_names = (
        "*worldplay*", "*generator*", "*distill*", "transformer", "diffusion_pytorch_model*",
    )  # fmt: skip

    def settle(self, options: Options, parts: Parts | None) -> Settings:
        if options.actions is None:
            raise UserError(
                f"actions is missing: model {NAME} needs --actions, such as {ACTIONS!r}"
            )
        return settle(options, released_sizes())

    def identity(self, options: Options, settings: Settings) -> dict[str, Any]:
        return {
            "actions": options.actions,
            "steps": list(settings.sampler.steps),
            **({} if options.recall is None else {"recall": options.recall}),
            "image": options.image and file_digest(options.image),
        }

    def load_dit(self, files: tuple[Any, ...], options: Options, settings: Settings) -> Any:
        place = weight_placement(settings.plan, share=options.share_weights)
        return self.weights.load(files, settings.sizes.dit, device=place)

    def random_dit(self, options: Options, settings: Settings) -> Any:
        dit = super().random_dit(options, settings)
        return on_all_devices(dit, settings.plan, share=options.share_weights)

    def read_given(self, options: Options, settings: Settings) -> None:
        if options.image:
            check_picture(options.image, settings.height, settings.width)

    def encode_given(
        self, options: Options, settings: Settings, given: Any, vae: Any
    ) -> np.ndarray | None:
        if not options.image:
            return None
        return picture_latent(vae, options.image, settings.height, settings.width)

    def latents(
        self, run: Run[Options, Settings], arm: Arm, stored: np.ndarray, look: Look
    ) -> Iterator[Any]:
        settings = run.settings
        pipeline = WorldPlay(
            run.reader(arm.name),
            sampler=settings.sampler,
            history=settings.histories[arm.name],
            share_weights=run.options.share_weights,
        )
        walk = Walk(
            text_BUE=run.prompt,
            path=settings.path,
            frames=settings.frames,
            latent_height=settings.latent[0],
            latent_width=settings.latent[1],
            noise=jax.random.fold_in(run.seed_key, 1),
            image_BZYX=run.given,
            done_BFZYX=stored,
        )
        return pipeline.stream(walk, progress=look)

    def describe_cache(self, options: Options, settings: Settings, arm: Arm) -> dict[str, Any]:
        lay, n = arm.state.layout, settings.sizes.dit.frames_per_block
        return {
            "storage": settings.histories[arm.name].storage,
            "span_frames": lay.span_blocks * n if lay.max_spans else 0,
            "spans": lay.max_spans,
            "window_frames": lay.window_blocks * n,
            "attention": attention_told(arm.name, options, arm.state),
            "tokens_of_a_frame": lay.block_tokens // n,
            "devices": 1 if lay.plan is None else lay.plan.devices,
        }

    def report(self, run: Run[Options, Settings]) -> dict[str, Any]:
        return {
            "image": run.options.image,
            "blocks": len(self.blocks(run)),
            "sampler": {"steps": [round(t, 4) for t in run.settings.sampler.steps]},
        }


def prepare(options: Options) -> Job:
    """The job of a user's options; `options.frames` are latent frames. See `latent_job.prepare`."""
    return latent_job.prepare(_WorldPlay(), options)


def finished(options: Options) -> bool:
    """Whether `options.out` has the files of this very run; see `latent_job.finished`."""
    return latent_job.finished(_WorldPlay(), options)


def plan(options: PlanOptions) -> Plan:
    """What of a walk fits into the memory; see `make_plan`."""
    return make_plan(options.request(Options), options.memory, released_sizes())
