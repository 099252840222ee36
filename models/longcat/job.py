"""The job of LongCat-Video: a prompt becomes a long video, once for each kind of cache."""

import collections
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.lora import merge_lora
from models.longcat.entry import NAME, NEEDS, Options, PlanOptions
from models.longcat.params import RULES, check_dit, load_dit, random_dit
from models.longcat.pipeline import LongCat, Prompt
from models.longcat.plan import make_plan
from models.longcat.player import Source, first_clip, image_latent, play
from models.longcat.settings import (
    TEXT_SLOTS,
    Settings,
    chosen_sizes,
    condition_bytes,
    released_sizes,
    settle,
)
from models.longcat.sharding import heads_mesh, placement
from models.runs import latent_job
from models.runs.checkpoint_folder import Parts
from models.runs.latent_job import LatentModel, Run
from models.runs.pictures import as_video, pictures
from models.runs.prompts import embed_prompts, stand_in_embedding
from models.runs.request_checks import file_digest
from qvg_jax.app.job import Arm, Job, Played
from qvg_jax.app.memory_plan import Plan
from qvg_jax.errors import UserError, told_to_user

__all__ = ["finished", "plan", "prepare"]

LORA_RANK = 128  # of the released ones

log = logging.getLogger(__name__)


class _LongCat(LatentModel[Options, Settings]):
    """LongCat-Video as a latent model."""

    name = NAME
    needs = NEEDS
    fps = 15
    plans = ("heads",)
    dit_names = ("dit", "LongCat*", "longcat*", "transformer", "diffusion_pytorch_model*")
    config_folder = "dit"

    def settle(self, options: Options, parts: Parts | None) -> Settings:
        settings = settle(options, chosen_sizes(options, parts, released_sizes()))
        self.mesh = _mesh(settings, options)
        self.opening: np.ndarray | None = None
        return settings

    def identity(self, options: Options, settings: Settings) -> dict[str, Any]:
        given = options.image or options.video
        lora = options.lora and Path(options.lora)
        return {
            "lora": lora and {lora.name: lora.stat().st_size if lora.is_file() else None},
            "steps": options.steps,
            "cond_frames": settings.segments.num_cond_frames,
            "given": given and file_digest(given),
        }

    def latent_block(self, settings: Settings) -> tuple[tuple[int, ...], Any]:
        return settings.clip, np.float32

    def check_dit(self, files: tuple[Any, ...], settings: Settings) -> None:
        check_dit(files, settings.sizes.dit)

    def load_dit(self, files: tuple[Any, ...], options: Options, settings: Settings) -> Any:
        return _distilled(load_dit(files, settings.sizes.dit, device=placement(self.mesh)), options)

    def random_dit(self, options: Options, settings: Settings) -> Any:
        return _distilled(random_dit(settings.sizes.dit, device=placement(self.mesh)), options)

    def read_given(self, options: Options, settings: Settings) -> dict[str, np.ndarray]:
        path = options.image or options.video
        if path is None:
            return {}
        found = pictures(path, settings.height, settings.width)
        if options.image:
            return {"image": as_video([next(found)])}
        wanted = settings.segments.num_cond_frames
        tail = list(collections.deque(found, maxlen=wanted))
        if len(tail) < wanted:
            raise UserError(
                f"--video {path} has {len(tail)} frames; a segment goes on from "
                f"num_cond_frames={wanted}: give a longer video, or fewer --cond-frames (1 + 4 k)"
            )
        return {"given_BTYX3": np.stack([np.asarray(p.convert("RGB")) for p in tail])[None]}

    def encode_given(
        self, options: Options, settings: Settings, given: Any, vae: Any
    ) -> dict[str, np.ndarray]:
        if "image" not in given:
            return given
        return {"image_B1ZYX": image_latent(vae, given["image"])}

    def given_frames(self, run: Run[Options, Settings]) -> int:
        return run.settings.segments.num_cond_frames if run.settings.continued else 0

    def encode_prompt(self, options: Options, settings: Settings, parts: Parts | None) -> Prompt:
        """The prompt and, for guidance, the empty one; padded, for padding counts here."""
        text = options.prompt or ""
        texts = [text, ""] if settings.guidance > 1 else [text]
        if parts:
            embedded = embed_prompts(texts, parts, settings.sizes.text, slots=TEXT_SLOTS)
            text_BUE, mask_BU, said = embedded
        else:
            text_BUE, mask_BU, said = _stand_ins(texts, settings)
        for warning in said:
            log.warning(warning)
        text_BUE, negative = np.asarray(text_BUE), {}
        if len(texts) > 1:
            negative = dict(negative_BUE=text_BUE[1:], negative_mask_BU=mask_BU[1:])
        return Prompt(text_BUE=text_BUE[:1], mask_BU=mask_BU[:1], **negative)

    def blocks(self, run: Run[Options, Settings]) -> range:
        return range(1, 2 + run.settings.count)

    def block_frames(self, settings: Settings) -> int:
        return settings.segments.frames

    def play(self, run: Run[Options, Settings], arm: Arm, xs: Iterator[Any]) -> Iterator[Played]:
        key_codec, value_codec = run.settings.codecs[arm.name]
        pipeline = LongCat(
            run.reader(arm.name), key_codec=key_codec, value_codec=value_codec, mesh=self.mesh
        )
        source = Source(
            arm=arm.name,
            pipeline=pipeline,
            vae=run.vae,
            prompt=run.prompt,
            settings=run.settings,
            key=run.seed_key,
            saved=run.saved,
            size=condition_bytes(arm.state),
            first=lambda: self.first_clip(run),
            given_BTYX3=run.given.get("given_BTYX3"),
        )
        return play(source, xs)

    def first_clip(self, run: Run[Options, Settings]) -> np.ndarray:
        """Latents of the clip that the video begins with, made once: it reads no cache."""
        if self.opening is None:
            pipeline, image = LongCat(run.dit, mesh=self.mesh), run.given.get("image_B1ZYX")
            self.opening = first_clip(pipeline, run.prompt, run.settings, run.seed_key, image)
        return self.opening

    def describe_cache(self, options: Options, settings: Settings, arm: Arm) -> dict[str, Any]:
        return {
            "given_latent_frames": settings.segments.given_latents,
            "tokens": arm.state.layout.span_tokens,
            "bytes_in_bf16": condition_bytes(arm.state).bf16,
        }

    def report(self, run: Run[Options, Settings]) -> dict[str, Any]:
        settings = run.settings
        return {
            "segments": settings.count,
            "clip_frames": settings.segments.frames,
            "new_frames_of_a_segment": settings.segments.new_frames,
            "sampler": {
                "first_clip_evaluations": 0 if settings.continued else settings.first.steps,
                "segment_evaluations": settings.next.steps,
                "guidance": settings.guidance,
            },
            "devices": 1 if self.mesh is None else self.mesh.size,
        }


def _distilled(dit: Any, options: Options) -> Any:
    """The transformer with the user's LoRA merged into it, if there is one."""
    return merge_lora(dit, options.lora, RULES, rank=LORA_RANK) if options.lora else dit


def _mesh(settings: Settings, options: Options) -> jax.sharding.Mesh | None:
    """The devices that the user asked for; else all if they divide the heads, or None for the first one.

    Raises:
        UserError: the user asked for a number that does not divide the heads.
    """
    if options.devices is not None:
        with told_to_user():
            return heads_mesh(settings.sizes.dit, jax.devices()[: options.devices])
    try:
        return heads_mesh(settings.sizes.dit, jax.devices())
    except ValueError as error:
        log.info(f"on one device: {error}")
        return None


def _stand_ins(texts: list[str], settings: Settings) -> tuple[jax.Array, np.ndarray, list[str]]:
    """Stand-ins for the embeddings of prompts, padded to `TEXT_SLOTS`; their mask; warnings."""
    dit = settings.sizes.dit
    size = dict(slots=TEXT_SLOTS, width=dit.text_width, dtype=dit.dtype)
    each = [stand_in_embedding(text, **size) for text in texts]
    room = [TEXT_SLOTS - e.text_BUE.shape[1] for e in each]
    pairs = list(zip(each, room, strict=True))
    text_BUE = jnp.concatenate([jnp.pad(e.text_BUE, ((0, 0), (0, n), (0, 0))) for e, n in pairs])
    mask_BU = np.concatenate([np.pad(e.mask_BU, ((0, 0), (0, n))) for e, n in pairs])
    return text_BUE, mask_BU, each[0].said


def prepare(options: Options) -> Job:
    """The job of a user's options; `options.frames` are latent frames. See `latent_job.prepare`."""
    return latent_job.prepare(_LongCat(), options)


def finished(options: Options) -> bool:
    """Whether `options.out` has the files of this very run; see `latent_job.finished`."""
    return latent_job.finished(_LongCat(), options)


def plan(options: PlanOptions) -> Plan:
    """What of a run fits into the memory; see `make_plan`."""
    return make_plan(options.request(Options), options.memory, released_sizes())
