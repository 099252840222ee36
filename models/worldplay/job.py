"""The main job on WorldPlay: a picture and a walk become a video, once for each kind of memory."""

import dataclasses
import logging
from typing import Any

import jax

from models.common.attention import with_attention
from models.runs import decode as player
from models.runs.checkpoint_folder import Parts, find_parts
from models.runs.prompts import embed_prompts, stand_in_embedding
from models.runs.request_checks import RANDOM, attention_of, check_needed, file_digest, plain_config
from models.runs.saved_latents import Kept
from models.umt5.params import WEIGHTS as TEXT_WEIGHTS
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from models.worldplay.params import WEIGHTS
from models.worldplay.picture import check_picture, picture_latent
from models.worldplay.pipeline import WorldPlay
from models.worldplay.plan import make_plan
from models.worldplay.request import Request
from models.worldplay.settings import ACTIONS, Settings, released_sizes, settle
from qvg_jax.app import job as compare
from qvg_jax.app.job import Arm, Job
from qvg_jax.app.memory_plan import Plan
from qvg_jax.cache.health import cache_bytes
from qvg_jax.codecs import presets

MODEL = "worldplay"
DEFAULT_CODEC = f"{presets.recommended('worldplay')}:storage=single"
FPS = 16
# In order of preference: Wan's own transformer, which knows no actions, is refused by its names.
NAMES = ("*worldplay*", "*generator*", "*distill*", "transformer", "diffusion_pytorch_model*")
MEANS_NOTHING = ("cond_frames", "lora", "tour", "video", *compare.HISTORY_OPTIONS)

log = logging.getLogger(__name__)


def memory_advice(request: compare.Request) -> str:
    """What to do when the device's memory is not enough, in words."""
    command = f"qvg plan --model {MODEL} --codec {','.join(request.codecs)} --memory SIZE"
    return (
        f"`{command}` says what needs it; accepted: a codec of fewer bits, storage=single, fewer "
        "--frames, --height or --width, or no --compare, for all arms are in memory together"
    )


def plan(request: compare.Request, memory: int) -> Plan:
    """What of a request fits into so many bytes; see `make_plan`."""
    request.refuse(MODEL, *MEANS_NOTHING, "resume")
    return make_plan(request, memory, released_sizes())


def prepare(request: compare.Request) -> Job:
    """Checks the request, encodes the prompt, loads transformer and VAE, encodes the picture.

    The text encoder is loaded first and gone before anything else is loaded. Caches are made when
    the first block is.

    Args:
        request: what is wanted; `frames` are latent frames, all of the walk if None.

    Returns:
        The job; nothing has been generated yet.

    Raises:
        ValueError: a value that is not accepted, named with what would be.
    """
    request.refuse(MODEL, *MEANS_NOTHING)
    check_needed(MODEL, request)
    if request.actions is None:
        raise ValueError(f"actions is missing: model {MODEL} needs --actions, such as {ACTIONS!r}")
    settings = settle(request, released_sizes())
    sizes = settings.sizes
    if request.image:
        check_picture(request.image, settings.height, settings.width)
    parts = None if request.weights == RANDOM else find_parts(request.weights, NAMES)
    if parts:  # all files now: the last one is read when minutes have been spent on the others
        WEIGHTS.check(parts.dit, sizes.dit)
        VAE_WEIGHTS.check(parts.vae, sizes.vae)
        TEXT_WEIGHTS.check(parts.text, sizes.text)
    dit = sizes.dit
    done = Kept(
        request.out or "out",
        _identity(request, settings, parts),
        (1, dit.frames_per_block, dit.latent_channels, *settings.latent),
        dit.dtype,
        resume=request.resume,
    )
    log.info("encoding the prompt" if parts else "random weights, and a stand-in for the prompt")
    if parts:
        text = embed_prompts([request.prompt], parts, sizes.text, slots=dit.text_slots)
    else:
        size = dict(slots=dit.text_slots, width=dit.text_width, dtype=dit.dtype)
        text = stand_in_embedding(request.prompt, **size)
    for warning in text.said:
        log.warning(warning)
    log.info("loading the transformer and the VAE")
    model = WEIGHTS.load(parts.dit, dit) if parts else WEIGHTS.random(dit)
    vae = VAE_WEIGHTS.load(parts.vae, sizes.vae) if parts else VAE_WEIGHTS.random(sizes.vae)
    size = (settings.height, settings.width)
    image = picture_latent(vae, request.image, *size) if request.image else None
    return _job(request, settings, parts, done, model, vae, text.text_BUE, image)


def _job(request, settings: Settings, parts, done: Kept, model, vae, text_BUE, image) -> Job:
    sizes = settings.sizes
    walk = Request(
        text_BUE=text_BUE,
        path=settings.path,
        frames=settings.frames,
        latent_height=settings.latent[0],
        latent_width=settings.latent[1],
        noise=jax.random.fold_in(jax.random.key(request.seed), 1),
        image_BZYX=image,
    )
    arms = [Arm(name=name, state=settings.cache(name)) for name in settings.histories]
    blocks = settings.frames // sizes.dit.frames_per_block

    def play(arm, xs):
        history, size = settings.histories[arm.name], []
        reader = with_attention(model, attention_of(arm.name, request))
        pipeline = WorldPlay(reader, sampler=settings.sampler, history=history)
        stored = done.read(arm.name)[:, : settings.frames]

        def look(_done, _total, state):
            size[:] = [cache_bytes(state.cache)]

        latents = pipeline.stream(dataclasses.replace(walk, done_BFZYX=stored), progress=look)
        source = player.Source(
            arm=arm.name,
            latents=latents,
            given=0,
            stored=stored.shape[1],
            size=lambda: size[0],
            decode_last=request.decode_last,
        )
        return player.play(source, xs, vae=vae, kept=done)

    return Job(
        model=MODEL,
        play=play,
        arms=tuple(arms),
        blocks=(compare.Block(block) for block in range(blocks)),
        cache=lambda cache: cache,
        tour=0,
        frames=sizes.vae.video_frames(settings.frames),
        block_frames=sizes.vae.temporal_stride * sizes.dit.frames_per_block,
        height=settings.height,
        width=settings.width,
        fps=FPS,
        truth=False,
        config=_report(request, settings, parts, blocks, arms),
    )


def _report(request, settings: Settings, parts, blocks: int, arms: list[Arm]) -> dict[str, Any]:
    def described(arm: Arm) -> dict[str, Any]:
        lay, n = arm.state.layout, settings.sizes.dit.frames_per_block
        return {
            "storage": settings.histories[arm.name].storage,
            "span_frames": lay.span_blocks * n if lay.max_spans else 0,
            "spans": lay.max_spans,
            "window_frames": lay.window_blocks * n,
            "attention": attention_of(arm.name, request) or "chosen by attend",
            "tokens_of_a_frame": lay.block_tokens // n,
        }

    return {
        "prompt": request.prompt,
        "prompt_embedding": "umT5" if parts else "stand-in: noise drawn from each word",
        "actions": request.actions,
        "image": request.image,
        "seed": request.seed,
        "latent_frames": settings.frames,
        "tour_frames": 0,
        "frames": settings.sizes.vae.video_frames(settings.frames),
        "height": settings.height,
        "width": settings.width,
        "blocks": blocks,
        "sampler": {"steps": [round(t, 4) for t in settings.sampler.steps]},
        "model": plain_config(settings.sizes.dit),
        "weights": parts.identity() if parts else RANDOM,
        "caches": {arm.name: described(arm) for arm in arms},
    }


def _identity(request: compare.Request, settings: Settings, parts: Parts | None) -> dict[str, Any]:
    """All that an arm's latents depend on; not the length, so that more of the walk can be made."""
    return {
        "weights": parts.identity() if parts else RANDOM,
        "model": plain_config(settings.sizes.dit),
        "prompt": request.prompt,
        "actions": request.actions,
        "seed": request.seed,
        "attention": request.attention,
        "height": settings.height,
        "width": settings.width,
        "steps": list(settings.sampler.steps),
        "image": request.image and file_digest(request.image),
    }
