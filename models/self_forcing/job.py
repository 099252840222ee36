"""The main job on Self-Forcing: a prompt becomes a video, once for each kind of cache."""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from models.common.attention import with_attention
from models.runs import decode as player
from models.runs.checkpoint_folder import Parts, find_parts
from models.runs.prompts import embed_prompts, stand_in_embedding
from models.runs.request_checks import RANDOM, attention_of, check_needed, file_digest, plain_config
from models.runs.saved_latents import Kept
from models.self_forcing.initial import initial_latents
from models.self_forcing.params import WEIGHTS
from models.self_forcing.pipeline import Request, SelfForcing
from models.self_forcing.plan import make_plan
from models.self_forcing.schedule import Block, plan_blocks
from models.self_forcing.settings import FRAMES, Settings, chosen_sizes, released_sizes, settle
from models.umt5.params import WEIGHTS as TEXT_WEIGHTS
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from qvg_jax.app import job as compare
from qvg_jax.app.job import Arm, Job
from qvg_jax.app.memory_plan import Plan
from qvg_jax.cache.health import cache_bytes
from qvg_jax.codecs import presets

MODEL = "self-forcing"
DEFAULT_CODEC = presets.recommended("self-forcing")
FPS = 16
# In order of preference: Wan's own transformer, without Self-Forcing's training, comes last.
NAMES = ("self_forcing*", "*dmd*", "*generator*", "transformer", "diffusion_pytorch_model*")

log = logging.getLogger(__name__)


def memory_advice(request: compare.Request) -> str:
    """What to do when the device's memory is not enough, in words."""
    command = f"qvg plan --model {MODEL} --frames {request.frames or FRAMES}"
    command += f" --codec {','.join(request.codecs)} --memory SIZE"
    return (
        f"`{command}` says what needs it; accepted: a smaller codec, fewer --frames, --height or "
        "--width, a --window, or no --compare, for all arms are in memory together"
    )


def plan(request: compare.Request, memory: int) -> Plan:
    """What of a request fits into so many bytes; see `make_plan`."""
    request.refuse(MODEL, "cond_frames", "lora", "tour", "actions", "resume")
    return make_plan(request, memory, released_sizes())


def prepare(request: compare.Request) -> Job:
    """Checks the request, encodes the prompt, loads transformer and VAE.

    The text encoder is loaded first and gone before anything else is loaded. Caches are made when
    the first block is.

    Args:
        request: what is wanted; `frames` are latent frames.

    Returns:
        The job; nothing has been generated yet.

    Raises:
        ValueError: a value that is not accepted, named with what would be.
    """
    request.refuse(MODEL, "cond_frames", "lora", "tour", "actions")
    check_needed(MODEL, request)
    parts = None if request.weights == RANDOM else find_parts(request.weights, NAMES)
    sizes = chosen_sizes(request, parts, released_sizes())
    settings = settle(request, sizes, first_frame_alone=bool(request.image))
    if parts:  # all files now: the last one is read when minutes have been spent on the others
        WEIGHTS.check(parts.dit, sizes.dit)
        VAE_WEIGHTS.check(parts.vae, sizes.vae)
        TEXT_WEIGHTS.check(parts.text, sizes.text)
    done = Kept(
        request.out or "out",
        _identity(request, settings, parts),
        (1, sizes.dit.frames_per_block, sizes.dit.latent_channels, *settings.latent),
        sizes.dit.dtype,
        resume=request.resume,
    )
    log.info("encoding the prompt" if parts else "random weights, and a stand-in for the prompt")
    dit = sizes.dit
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
    initial = _initial(request, settings, vae)
    return _job(request, settings, parts, done, model, vae, text.text_BUE, initial)


def _job(request, settings, parts, done, model, vae, text_BUE, initial) -> Job:
    sizes = settings.sizes
    generation = Request(
        text_BUE=text_BUE,
        frames=settings.frames,
        latent_height=settings.latent[0],
        latent_width=settings.latent[1],
        noise=jax.random.fold_in(jax.random.key(request.seed), 1),
        initial_BFZYX=initial,
    )
    given = 0 if initial is None else initial.shape[1]
    blocks = plan_blocks(sizes.dit, settings.frames, initial_frames=given)
    arms = [Arm(name=name, state=settings.cache(name)) for name in settings.histories]

    def play(arm, xs):
        history, size = settings.histories[arm.name], []
        reader = with_attention(model, attention_of(arm.name, request))
        pipeline = SelfForcing(reader, sampler=settings.sampler, history=history)
        stored = done.read(arm.name)[:, : settings.frames - given]

        def look(_done, _total, state):
            size[:] = [cache_bytes(state.cache)]

        latents = pipeline.stream(dataclasses.replace(generation, done_BFZYX=stored), progress=look)
        source = player.Source(
            arm=arm.name,
            latents=latents,
            given=given,
            stored=stored.shape[1],
            size=lambda: size[0],
            decode_last=request.decode_last,
        )
        return player.play(source, xs, vae=vae, kept=done)

    video = sizes.vae.video_frames
    tour = video(given) if given else 0
    return Job(
        model=MODEL,
        play=play,
        arms=tuple(arms),
        blocks=(compare.Block(block) for block in blocks),
        cache=lambda cache: cache,
        tour=tour,
        frames=video(settings.frames) - tour,
        block_frames=sizes.vae.temporal_stride * sizes.dit.frames_per_block,
        height=settings.height,
        width=settings.width,
        fps=FPS,
        truth=False,
        config=_report(request, settings, parts, blocks, arms, tour),
    )


def _report(request, settings, parts, blocks: tuple[Block, ...], arms, tour) -> dict[str, Any]:
    def described(arm: Arm) -> dict[str, Any]:
        lay = arm.state.layout
        return {
            "sink_frames": lay.sink_blocks,
            "span_frames": lay.span_blocks if lay.max_spans else 0,
            "spans": lay.max_spans,
            "window_frames": lay.window_blocks,
            "attention": attention_of(arm.name, request) or "chosen by attend",
            "tokens_of_a_frame": lay.block_tokens,
        }

    return {
        "prompt": request.prompt,
        "prompt_embedding": "umT5" if parts else "stand-in: noise drawn from each word",
        "seed": request.seed,
        "latent_frames": settings.frames,
        "tour_frames": tour,
        "frames": settings.sizes.vae.video_frames(settings.frames) - tour,
        "height": settings.height,
        "width": settings.width,
        "blocks": len(blocks),
        "sampler": {"steps": list(settings.sampler.steps), "shift": settings.sampler.shift},
        "model": plain_config(settings.sizes.dit),
        "weights": parts.identity() if parts else RANDOM,
        "caches": {arm.name: described(arm) for arm in arms},
    }


def _initial(request: compare.Request, settings: Settings, vae) -> np.ndarray | None:
    path = request.image or request.video
    if path is None:
        return None
    return initial_latents(
        vae,
        settings.sizes.dit,
        path,
        image=bool(request.image),
        frames=settings.frames,
        height=settings.height,
        width=settings.width,
    )


def _identity(request: compare.Request, settings: Settings, parts: Parts | None) -> dict[str, Any]:
    """All that an arm's latents depend on; not the length, so that a video can be made longer."""
    given = request.image or request.video
    return {
        "weights": parts.identity() if parts else RANDOM,
        "model": plain_config(settings.sizes.dit),
        "prompt": request.prompt,
        "seed": request.seed,
        "attention": request.attention,
        "height": settings.height,
        "width": settings.width,
        "steps": list(settings.sampler.steps),
        "window": request.window,
        "sink": request.sink,
        "span": request.span,
        "recent": request.recent,
        "given": given and file_digest(given),
    }
