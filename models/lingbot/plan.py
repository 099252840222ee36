"""Device memory of a walk, before it begins: from shapes and from the compiled programs."""

import dataclasses
import time

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from models.common.wan_text import TextKV
from models.lingbot.entry import Options
from models.lingbot.params import WEIGHTS
from models.lingbot.pipeline import BlockInput, generating_step
from models.lingbot.settings import Settings, settle
from models.runs import decode
from models.runs.checkpoint_folder import Sizes
from models.runs.memory import most, text_encoder_bytes, text_kv_bytes, with_decoder
from models.runs.reading import precision_notes
from models.self_forcing.block import Known, State
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from qvg_jax.app.memory_plan import Need, Plan, shape_bytes, temporary_bytes
from qvg_jax.loop import run_chunk


def make_plan(options: Options, memory: int, released: Sizes) -> Plan:
    """What each codec of a request needs, as if its arm ran alone.

    Compiles the step of each arm and the decoder for the default backend; allocates nothing.

    Args:
        options: codecs, frames and size count.
        memory: bytes of the device, for the longest video that fits.
        released: sizes of the networks.

    Raises:
        UserError: a value that is not accepted, named with what would be.
    """
    settings = settle(options, released)
    begin = time.perf_counter()
    dit, model = settings.sizes.dit, WEIGHTS.skeleton(settings.sizes.dit)
    vae = VAE_WEIGHTS.skeleton(settings.sizes.vae)
    latent = _frames(settings, 1, dit.latent_channels, dit.dtype)
    past = jax.eval_shape(decode.decode_frame, vae, latent, None)[1]
    decoding = temporary_bytes(decode.decode_frame, vae, latent, past)
    needs = []
    for name in settings.histories:
        cache = settings.cache(name)
        held = {
            "transformer": shape_bytes(model),
            "cache": shape_bytes(cache),
            "prompt K/V": text_kv_bytes(dit, dit.text_slots),
            "VAE": shape_bytes(vae),
        }
        block = temporary_bytes(run_chunk, *_step(settings, model, cache))
        parts = (name, held, block, shape_bytes(past), decoding)
        need = with_decoder(*parts, last=options.decode_last)
        needs.append(dataclasses.replace(need, longest=_longest(settings, need, memory)))
    best = max(needs, key=lambda need: need.longest)
    advice = f"{best.name} could make at most {best.longest} latent frames" if best.longest else ""
    return Plan(
        what=f"LingBot-World, {settings.frames} latent frames of {settings.height} x "
        f"{settings.width}, {dit.layers} layers, each codec alone",
        before={"text encoder": text_encoder_bytes(settings.sizes.text, dit.text_slots)},
        needs=tuple(needs),
        backend=jax.default_backend(),
        seconds=time.perf_counter() - begin,
        advice=f"{advice or 'not one block'}; accepted: fewer --frames, a smaller --height and "
        "--width, --decode-last, or a codec of fewer bits (`qvg codecs`)",
        notes=precision_notes({name: settings.cache(name) for name in settings.histories}, options),
    )


def _frames(settings: Settings, frames: int, channels: int, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((1, frames, channels, *settings.latent), dtype)


def _step(settings: Settings, model, cache):
    """Arguments of the program that makes a block, as the command runs it."""
    dit = settings.sizes.dit
    n = dit.frames_per_block
    text = (dit.layers, 1, dit.text_slots, dit.heads, dit.head_dim)
    text_kv = TextKV(*(jax.ShapeDtypeStruct(text, dit.dtype) for _ in range(2)))
    block = BlockInput(
        jax.eval_shape(lambda: jax.random.key(0)),
        _frames(settings, n, dit.condition_channels),
        _frames(settings, n, settings.camera.shape[2]),
        Known(
            jax.ShapeDtypeStruct((), jnp.bool_),
            _frames(settings, n, dit.latent_channels, dit.dtype),
        ),
    )
    xs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), block)
    step = generating_step(settings.sampler, (1, n, *settings.latent))
    state = State(cache=cache, text_kv=text_kv)
    return Partial(step, model), state, xs, jax.ShapeDtypeStruct((), jnp.int32)


def _longest(settings: Settings, need: Need, memory: int) -> int:
    """The most latent frames that fit, if only the cache changes with them."""
    n, top = settings.sizes.dit.frames_per_block, settings.sizes.dit.rope_frames

    def fits(blocks: int) -> bool:
        cache = shape_bytes(settings.cache(need.name, blocks * n))
        return dataclasses.replace(need, held=need.held | {"cache": cache}).total <= memory

    return most(fits, top // n) * n
