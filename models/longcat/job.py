"""The main job on LongCat-Video: a prompt becomes a long video, once for each kind of cache."""

import collections
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.attention import with_attention
from models.longcat.lora import merge_lora
from models.longcat.params import check_dit, load_dit, random_dit
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
from models.runs.checkpoint_folder import Parts, find_parts
from models.runs.pictures import as_video, pictures
from models.runs.prompts import embed_prompts, stand_in_embedding
from models.runs.request_checks import RANDOM, attention_of, check_needed, file_digest, plain_config
from models.runs.saved_latents import Kept
from models.umt5.params import WEIGHTS as TEXT_WEIGHTS
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from qvg_jax.app import job as compare
from qvg_jax.app.job import Arm, Job
from qvg_jax.app.memory_plan import Plan
from qvg_jax.codecs import presets

MODEL = "longcat"
DEFAULT_CODEC = presets.recommended("longcat")
FPS = 15
NAMES = ("dit", "LongCat*", "longcat*", "transformer", "diffusion_pytorch_model*")
LORA_RANK = 128  # of the released ones

log = logging.getLogger(__name__)


def memory_advice(request: compare.Request) -> str:
    """What to do when the device's memory is not enough, in words."""
    codecs = ",".join(request.codecs)
    return (
        f"`qvg plan --model {MODEL} --codec {codecs} --memory SIZE` says what needs it; accepted: "
        "a smaller codec, fewer --cond-frames, --height or --width, or more devices, of which all "
        "that divide the heads are used"
    )


def plan(request: compare.Request, memory: int) -> Plan:
    """What of a request fits into so many bytes; see `make_plan`."""
    request.refuse(
        MODEL, "tour", "actions", *compare.HISTORY_OPTIONS, "resume", "lora", "decode_last"
    )
    return make_plan(request, memory, released_sizes())


def prepare(request: compare.Request) -> Job:
    """Checks the request, encodes the prompt, loads transformer and VAE.

    The text encoder is loaded first and gone before anything else is loaded.

    Args:
        request: what is wanted; `frames` are latent frames of the whole video: a first clip of 24
            (or, with `video`, its last 73 frames as 19) and 5 for each segment.

    Returns:
        The job; nothing has been generated yet.

    Raises:
        ValueError: a value that is not accepted, named with what would be.
    """
    request.refuse(MODEL, "tour", "actions", *compare.HISTORY_OPTIONS, "decode_last")
    check_needed(MODEL, request)
    parts = None if request.weights == RANDOM else find_parts(request.weights, NAMES, config="dit")
    sizes = chosen_sizes(request, parts, released_sizes())
    settings = settle(request, sizes)
    mesh = _mesh(sizes.dit)
    if parts:  # all files now: the last one is read when minutes have been spent on the others
        check_dit(parts.dit, sizes.dit)
        VAE_WEIGHTS.check(parts.vae, sizes.vae)
        TEXT_WEIGHTS.check(parts.text, sizes.text)
    beginning = _pictures(request, settings)
    identity = _identity(request, settings, parts)
    out, resume = request.out or "out", request.resume
    kept = Kept(out, identity, settings.clip, np.float32, resume=resume)
    log.info("encoding the prompt" if parts else "random weights, and a stand-in for the prompt")
    prompt = _prompt(request, settings, parts)
    log.info("loading the transformer and the VAE")
    place = placement(mesh)
    model = (
        load_dit(parts.dit, sizes.dit, device=place)
        if parts
        else random_dit(sizes.dit, device=place)
    )
    if request.lora:
        model = merge_lora(model, request.lora, rank=LORA_RANK)
    vae = VAE_WEIGHTS.load(parts.vae, sizes.vae) if parts else VAE_WEIGHTS.random(sizes.vae)
    image = image_latent(vae, beginning.pop("image")) if request.image else None
    key = jax.random.key(request.seed)

    @functools.cache
    def first():
        return first_clip(LongCat(model, mesh=mesh), prompt, settings, key, image)

    arms = tuple(Arm(name=name, state=settings.cache(name)) for name in settings.codecs)

    def played(arm, xs):
        key_codec, value_codec = settings.codecs[arm.name]
        reader = with_attention(model, attention_of(arm.name, request))
        source = Source(
            arm=arm.name,
            pipeline=LongCat(reader, key_codec=key_codec, value_codec=value_codec, mesh=mesh),
            vae=vae,
            prompt=prompt,
            settings=settings,
            key=key,
            kept=kept,
            size=condition_bytes(arm.state),
            first=first,
            **beginning,
        )
        return play(source, xs)

    segments = settings.segments
    tour = segments.num_cond_frames if settings.continued else 0
    return Job(
        model=MODEL,
        play=played,
        arms=arms,
        blocks=(compare.Block(i) for i in range(1 + settings.count)),
        cache=lambda cache: cache,
        tour=tour,
        frames=sizes.vae.video_frames(settings.frames) - tour,
        block_frames=segments.frames,
        height=settings.height,
        width=settings.width,
        fps=FPS,
        truth=False,
        config=_report(request, settings, identity, arms, tour, mesh),
    )


def _mesh(config):
    """All devices if they divide the heads, else the first one."""
    devices = jax.devices()
    try:
        return heads_mesh(config, devices)
    except ValueError as error:
        log.info(f"on one device: {error}")
        return None


def _pictures(request: compare.Request, settings: Settings) -> dict[str, np.ndarray]:
    """The frames that the video begins with, read before minutes are spent on weights."""
    path = request.image or request.video
    if path is None:
        return {}
    found = pictures(path, settings.height, settings.width)
    if request.image:
        return {"image": as_video([next(found)])}
    wanted = settings.segments.num_cond_frames
    tail = list(collections.deque(found, maxlen=wanted))
    if len(tail) < wanted:
        raise ValueError(
            f"--video {path} has {len(tail)} frames; a segment goes on from "
            f"num_cond_frames={wanted}: give a longer video, or fewer --cond-frames (1 + 4 k)"
        )
    return {"given_BTYX3": np.stack([np.asarray(p.convert("RGB")) for p in tail])[None]}


def _prompt(request: compare.Request, settings: Settings, parts: Parts | None) -> Prompt:
    """The prompt and, for guidance, the empty one; padded, for padding counts here."""
    texts = [request.prompt, ""] if settings.guidance > 1 else [request.prompt]
    if parts:
        text_BUE, mask_BU, said = embed_prompts(texts, parts, settings.sizes.text, slots=TEXT_SLOTS)
    else:
        dit = settings.sizes.dit
        size = dict(slots=TEXT_SLOTS, width=dit.text_width, dtype=dit.dtype)
        each = [stand_in_embedding(text, **size) for text in texts]
        room = [TEXT_SLOTS - e.text_BUE.shape[1] for e in each]
        pairs = list(zip(each, room, strict=True))
        text_BUE = jnp.concatenate(
            [jnp.pad(e.text_BUE, ((0, 0), (0, n), (0, 0))) for e, n in pairs]
        )
        mask_BU = np.concatenate([np.pad(e.mask_BU, ((0, 0), (0, n))) for e, n in pairs])
        said = each[0].said
    for warning in said:
        log.warning(warning)
    text_BUE, negative = np.asarray(text_BUE), {}
    if len(texts) > 1:
        negative = dict(negative_BUE=text_BUE[1:], negative_mask_BU=mask_BU[1:])
    return Prompt(text_BUE=text_BUE[:1], mask_BU=mask_BU[:1], **negative)


def _report(request, settings: Settings, identity, arms, tour, mesh) -> dict[str, Any]:
    def described(arm: Arm) -> dict[str, Any]:
        lay = arm.state.layout
        return {
            "given_latent_frames": settings.segments.given_latents,
            "tokens": lay.span_tokens,
            "bytes_in_bf16": condition_bytes(arm.state).bf16,
        }

    stand_in = "stand-in: noise drawn from each word"
    return identity | {
        "prompt_embedding": stand_in if request.weights == RANDOM else "umT5",
        "latent_frames": settings.frames,
        "tour_frames": tour,
        "frames": settings.sizes.vae.video_frames(settings.frames) - tour,
        "segments": settings.count,
        "clip_frames": settings.segments.frames,
        "new_frames_of_a_segment": settings.segments.new_frames,
        "sampler": {
            "first_clip_evaluations": 0 if settings.continued else settings.first.steps,
            "segment_evaluations": settings.next.steps,
            "guidance": settings.guidance,
        },
        "devices": 1 if mesh is None else mesh.size,
        "caches": {arm.name: described(arm) for arm in arms},
    }


def _identity(request: compare.Request, settings: Settings, parts: Parts | None) -> dict[str, Any]:
    """All that an arm's latents depend on; not the length, so that a video can be made longer."""
    given = request.image or request.video
    lora = request.lora and Path(request.lora)
    return {
        "weights": parts.identity() if parts else RANDOM,
        "model": plain_config(settings.sizes.dit),
        "lora": lora and {lora.name: lora.stat().st_size if lora.is_file() else None},
        "prompt": request.prompt,
        "seed": request.seed,
        "attention": request.attention,
        "height": settings.height,
        "width": settings.width,
        "steps": request.steps,
        "cond_frames": settings.segments.num_cond_frames,
        "given": given and file_digest(given),
    }
