"""The job of LingBot-World: a picture and a walk become a video, once for each kind of cache."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from models.lingbot.condition import picture_condition
from models.lingbot.entry import NAME, NEEDS, Options, PlanOptions
from models.lingbot.params import WEIGHTS
from models.lingbot.pipeline import SteeredWalk, stream
from models.lingbot.plan import make_plan
from models.lingbot.settings import Settings, released_sizes, settle
from models.runs import latent_job
from models.runs.block_model import BlockModel, Look
from models.runs.checkpoint_folder import Parts
from models.runs.latent_job import Run
from models.runs.request_checks import file_digest
from models.worldplay.picture import check_picture
from qvg_jax.app.job import Arm, Job
from qvg_jax.app.memory_plan import Plan
from qvg_jax.errors import UserError

__all__ = ["finished", "plan", "prepare"]


class _LingBot(BlockModel[Options, Settings]):
    """LingBot-World as a latent model."""

    name = NAME
    needs = NEEDS
    weights = WEIGHTS
    fps = 16
    dit_names = ("transformers", "*lingbot*", "transformer", "diffusion_pytorch_model*")

    def settle(self, options: Options, parts: Parts | None) -> Settings:
        if (options.actions is None) == (options.poses is None):
            raise UserError(
                f"model {NAME} needs either --actions, such as 'w-8,right-4', or --poses FILE.npy"
            )
        if parts and not options.image:
            raise UserError(
                f"image is missing: model {NAME} was trained to begin with a picture; accepted: "
                "--image FILE, or --weights random"
            )
        return settle(options, released_sizes())

    def identity(self, options: Options, settings: Settings) -> dict[str, Any]:
        return {
            "actions": options.actions,
            "poses": options.poses and file_digest(options.poses),
            "steps": list(settings.sampler.steps),
            "image": options.image and file_digest(options.image),
            **({"recall": True} if options.recall else {}),
        }

    def read_given(self, options: Options, settings: Settings) -> None:
        if options.image:
            check_picture(options.image, settings.height, settings.width)

    def encode_given(
        self, options: Options, settings: Settings, given: Any, vae: Any
    ) -> np.ndarray:
        return picture_condition(
            vae,
            options.image,
            frames=settings.frames,
            height=settings.height,
            width=settings.width,
        )

    def latents(
        self, run: Run[Options, Settings], arm: Arm, stored: np.ndarray, look: Look
    ) -> Iterator[Any]:
        settings = run.settings
        walk = SteeredWalk(
            text_BUE=run.prompt,
            condition_BFZYX=run.given,
            camera_BFCYX=settings.camera,
            noise=jax.random.fold_in(run.seed_key, 1),
            done_BFZYX=stored,
        )
        history = settings.histories[arm.name]
        how = dict(recall=run.options.recall, progress=look)
        return stream(run.reader(arm.name), settings.sampler, history, walk, **how)

    def report(self, run: Run[Options, Settings]) -> dict[str, Any]:
        sampler = run.settings.sampler
        return {
            "image": run.options.image,
            "blocks": len(self.blocks(run)),
            "sampler": {"steps": list(sampler.steps), "shift": sampler.shift},
        }


def prepare(options: Options) -> Job:
    """The job of a user's options; `options.frames` are latent frames. See `latent_job.prepare`."""
    return latent_job.prepare(_LingBot(), options)


def finished(options: Options) -> bool:
    """Whether `options.out` has the files of this very run; see `latent_job.finished`."""
    return latent_job.finished(_LingBot(), options)


def plan(options: PlanOptions) -> Plan:
    """What of a walk fits into the memory; see `make_plan`."""
    return make_plan(options.request(Options), options.memory, released_sizes())
