"""Device memory of a run, before it runs: from shapes and from the compiled programs."""

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
from models.self_forcing.block import Known, State
from models.self_forcing.entry import NAME, Options
from models.self_forcing.params import WEIGHTS
from models.self_forcing.pipeline import generating_step
from models.self_forcing.predicted import SOURCE, block_seconds
from models.self_forcing.releases import RELEASES, Release
from models.self_forcing.settings import PLANS, Settings, chosen_sizes, settle
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from qvg_jax.app.memory_plan import Need, Plan, shape_bytes, temporary_bytes
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.plan import Plan as CachePlan
from qvg_jax.loop import run_chunk


def make_plan(
    options: Options, memory: int, released: Sizes, release: Release = RELEASES[NAME]
) -> Plan:
    """What each codec of a request needs, as if its arm ran alone.

    Compiles the step of each arm and the decoder for the default backend; allocates nothing.

    Args:
        options: codecs, frames, size, window, sink and spans count.
        memory: bytes of the device, for the longest video that fits.
        released: sizes of the networks.
        release: whose steps and memory are the defaults.

    Raises:
        UserError: a value that is not accepted, named with what would be.
    """
    count, share = options.devices or 1, options.share_weights
    check_sharing(share, None if count == 1 else CachePlan(spans=count))
    options = dataclasses.replace(options, devices=None, plan=None, share_weights=False)
    settings = settle(options, chosen_sizes(options, None, released), release=release)
    begin = time.perf_counter()
    networks = {
        "transformer": WEIGHTS.skeleton(settings.sizes.dit),
        "VAE": VAE_WEIGHTS.skeleton(settings.sizes.vae),
    }
    latent = _latents(settings, 1)
    past = jax.eval_shape(decode.decode_frame, networks["VAE"], latent, None)[1]
    decoding = temporary_bytes(decode.decode_frame, networks["VAE"], latent, past)
    layer = shape_bytes(networks["transformer"].blocks) // settings.sizes.dit.layers if share else 0
    needs, left_out = [], LeftOut()
    for name in settings.histories:
        cache = settings.cache(name)
        held = {
            "transformer": shape_bytes(networks["transformer"]),
            "cache": shape_bytes(cache),
            "prompt K/V": text_kv_bytes(settings.sizes.dit, settings.sizes.dit.text_slots),
            "VAE": shape_bytes(networks["VAE"]),
        }
        block = temporary_bytes(run_chunk, *_step(settings, networks["transformer"], cache))
        parts = (name, held, block, shape_bytes(past), decoding)
        need = with_decoder(*parts, last=options.decode_last)
        longest = _longest(settings, name, need, memory, shape_bytes)
        seconds = functools.partial(block_seconds, settings, name, cache, layer_bytes=layer)
        alone = seconds(CachePlan()) if count > 1 else None
        needs.append(dataclasses.replace(need, longest=longest, seconds=alone))
        needs += needs_on_devices(
            need,
            cache,
            count,
            axes=PLANS,
            left_out=left_out,
            tokens=settings.block_tokens(),
            longest=functools.partial(_longest, settings, name, need, memory),
            seconds=seconds,
            weights=shared_weight_bytes(networks["transformer"], count) if share else None,
        )
    left_out.say()
    slots = settings.sizes.dit.text_slots
    before = {"text encoder": text_encoder_bytes(settings.sizes.text, slots)}
    best = max(needs, key=lambda need: need.longest)
    advice = f"{best.name} could make at most {best.longest} latent frames" if best.longest else ""
    return Plan(
        what=f"{release.title}, {settings.frames} latent frames of {settings.height} x "
        f"{settings.width}, {settings.sizes.dit.layers} layers, each codec alone",
        before=before,
        needs=tuple(needs),
        backend=jax.default_backend(),
        seconds=time.perf_counter() - begin,
        advice=f"{advice or 'not one block'}; accepted: fewer --frames, a shorter --span, a --window, "
        "a smaller --height and --width, --decode-last, or a codec of fewer bits (`qvg codecs`)",
        larger="a device with more memory, or several with --share-weights",
        notes=(
            *precision_notes({name: settings.cache(name) for name in settings.histories}, options),
            *((SOURCE,) if any(need.seconds is not None for need in needs) else ()),
        ),
    )


def _latents(settings: Settings, frames: int):
    dit = settings.sizes.dit
    shape = (1, frames, dit.latent_channels, *settings.latent)
    return jax.ShapeDtypeStruct(shape, dit.dtype)


def _text_kv(settings: Settings) -> TextKV:
    dit = settings.sizes.dit
    shape = (dit.layers, 1, dit.text_slots, dit.heads, dit.head_dim)
    return TextKV(*(jax.ShapeDtypeStruct(shape, dit.dtype) for _ in range(2)))


def _step(settings: Settings, model, cache):
    """Arguments of the program that makes a block, as the command runs it."""
    latents = _latents(settings, settings.sizes.dit.frames_per_block)
    sampler = settings.sampler.of_block(latents.shape[1])
    step = generating_step(sampler, (1, latents.shape[1], *settings.latent), True)
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    stacked = jax.ShapeDtypeStruct((1, *latents.shape), latents.dtype)
    known = Known(jax.ShapeDtypeStruct((1,), jnp.bool_), stacked)
    average = next(iter(settings.histories.values())).sink_average
    state = State(cache=cache, text_kv=_text_kv(settings), sink_average=average)
    return Partial(step, model), state, (key, known), jax.ShapeDtypeStruct((), jnp.int32)


def _longest(
    settings: Settings, arm: str, need: Need, memory: int, size: Callable[[KVCache], int]
) -> int:
    """The most latent frames that fit, if only the cache changes with them."""
    dit = settings.sizes.dit
    n, top = dit.frames_per_block, dit.rope_frames
    if dit.horizon is not None:
        top = max(top, settings.frames)

    def fits(blocks: int) -> bool:
        cache = size(settings.cache(arm, blocks * n))
        return dataclasses.replace(need, held=need.held | {"cache": cache}).total <= memory

    return most(fits, top // n) * n
