"""Device memory of a walk, before it begins: from shapes and from the compiled programs."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from models.common.wan_text import TextKV
from models.runs import decode
from models.runs.checkpoint_folder import Sizes
from models.runs.devices import check_sharing, shared_weight_bytes
from models.runs.memory import most, text_encoder_bytes, text_kv_bytes, with_decoder
from models.runs.reading import precision_notes
from models.runs.shared_needs import LeftOut, needs_on_devices
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from models.worldplay.block import BlockInput, Frames, State
from models.worldplay.entry import Options
from models.worldplay.params import WEIGHTS
from models.worldplay.pipeline import generating_step
from models.worldplay.predicted import SOURCE, block_seconds
from models.worldplay.settings import PLANS, Settings, settle
from qvg_jax.app.memory_plan import Need, Plan, shape_bytes, temporary_bytes
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.plan import Plan as CachePlan
from qvg_jax.errors import UserError
from qvg_jax.loop import run_chunk


def make_plan(options: Options, memory: int, released: Sizes) -> Plan:
    """What each codec of a request needs, as if its arm ran alone.

    Compiles the step of each arm twice, for the walk and for one of three blocks, since what a
    context pass needs grows with the walk; and the decoder. Allocates nothing.

    Args:
        options: codecs, actions, frames and size.
        memory: bytes of the device, for the longest video that fits.
        released: sizes of the networks.

    Raises:
        UserError: a value that is not accepted, named with what would be.
    """
    count, share = options.devices or 1, options.share_weights
    check_sharing(share, None if count == 1 else CachePlan(spans=count))
    if options.recall is not None and count > 1:
        raise UserError(
            f"recall={options.recall} and --devices {count}: spans are recalled on one device"
        )
    options = dataclasses.replace(options, devices=None, plan=None, share_weights=False)
    settings = settle(options, released)
    begin = time.perf_counter()
    dit, model = settings.sizes.dit, WEIGHTS.skeleton(settings.sizes.dit)
    vae = VAE_WEIGHTS.skeleton(settings.sizes.vae)
    latent = _latents(settings, 1, dit.dtype)
    past = jax.eval_shape(decode.decode_frame, vae, latent, None)[1]
    decoding = temporary_bytes(decode.decode_frame, vae, latent, past)
    layer = shape_bytes(model.blocks) // dit.layers if share else 0
    needs, left_out = [], LeftOut()
    for name, history in settings.histories.items():
        room = history.room_frames(dit, settings.frames)
        held = {
            "transformer": shape_bytes(model),
            "cache": shape_bytes(settings.cache(name)),
            "latents": shape_bytes(_latents(settings, room, dit.dtype)),
            "prompt K/V": text_kv_bytes(dit, dit.text_slots),
            "VAE": shape_bytes(vae),
        }

        def block(frames, name=name):
            return temporary_bytes(run_chunk, *_step(settings, model, name, frames))

        parts = (name, held, block(settings.frames), shape_bytes(past), decoding)
        need = with_decoder(*parts, last=options.decode_last)
        few = 3 * dit.frames_per_block
        grows = 0.0
        if settings.frames > few and history.sight is None:
            grows = (need.temporaries["a block"] - block(few)) / (settings.frames - few)
        longest = functools.partial(_longest, settings, name, need, max(grows, 0.0), memory)
        if history.sight is not None:  # the same for every length
            longest = lambda _, need=need: None if need.total <= memory else 0  # noqa: E731
        cache = settings.cache(name)
        seconds = functools.partial(block_seconds, settings, name, cache, layer_bytes=layer)
        alone = seconds(CachePlan()) if count > 1 else None
        needs.append(dataclasses.replace(need, longest=longest(shape_bytes), seconds=alone))
        needs += needs_on_devices(
            need,
            cache,
            count,
            axes=PLANS,
            left_out=left_out,
            tokens={cache.layout.block_tokens},
            longest=longest,
            seconds=seconds,
            weights=shared_weight_bytes(model, count) if share else None,
        )
    left_out.say()
    before = {"text encoder": text_encoder_bytes(settings.sizes.text, dit.text_slots)}
    best = max(needs, key=lambda need: need.longest or 0)
    advice = f"{best.name} could make at most {best.longest} latent frames" if best.longest else ""
    return Plan(
        what=f"WorldPlay, {settings.frames} latent frames of {settings.height} x "
        f"{settings.width}, {dit.layers} layers, each codec alone",
        before=before,
        needs=tuple(needs),
        backend=jax.default_backend(),
        seconds=time.perf_counter() - begin,
        advice=f"{advice or 'not one block'}; accepted: fewer --frames, a smaller --height and "
        "--width, storage=single, --recall, --decode-last, or a codec of fewer bits (`qvg codecs`)",
        notes=(
            *precision_notes({name: settings.cache(name) for name in settings.histories}, options),
            *((SOURCE,) if any(need.seconds is not None for need in needs) else ()),
        ),
    )


def _latents(settings: Settings, frames: int, dtype):
    shape = (1, frames, settings.sizes.dit.latent_channels, *settings.latent)
    return jax.ShapeDtypeStruct(shape, dtype)


def _step(settings: Settings, model, arm: str, frames: int):
    """Arguments of the program that makes a block, as the command runs it."""
    dit, history = settings.sizes.dit, settings.histories[arm]
    room = history.room_frames(dit, frames)

    def like(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def cameras(*lead):
        return Frames(like(*lead, 4, 4), like(*lead, 3, 3), like(*lead))

    text = like(dit.layers, 1, dit.text_slots, dit.heads, dit.head_dim, dtype=dit.dtype)
    state = State(
        cache=settings.cache(arm, frames),
        text_kv=TextKV(text, text),
        latents_BFZYX=_latents(settings, room, dit.dtype),
        frames=cameras(1, room),
        blocks=like(dtype=jnp.int32),
    )
    n = dit.frames_per_block
    block = like(1, *_latents(settings, n, dit.dtype).shape)
    context = like(1, history.context_frames(dit, frames), dtype=jnp.int32)
    xs = BlockInput(block, cameras(1, 1, n), block, like(1, n, dtype=jnp.bool_), context)
    step = generating_step(settings.sampler, history)
    return Partial(step, model), state, xs, like(dtype=jnp.int32)


def _longest(
    settings: Settings,
    arm: str,
    need: Need,
    grows: float,
    memory: int,
    size: Callable[[KVCache], int],
) -> int:
    """The most latent frames that fit, if the memory and what a context pass needs grow with them."""
    n, top = settings.sizes.dit.frames_per_block, settings.sizes.dit.rope_frames

    def fits(blocks: int) -> bool:
        frames = blocks * n
        held = need.held | {"cache": size(settings.cache(arm, frames))}
        block = need.temporaries["a block"] + grows * (frames - settings.frames)
        busy = need.temporaries | {"a block": block}
        return dataclasses.replace(need, held=held, temporaries=busy).total <= memory

    return most(fits, top // n) * n
