"""Device memory of a run, before it runs: from shapes and from the compiled programs."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from models.longcat.condition import build_condition
from models.longcat.entry import Options
from models.longcat.modeling import TextKV
from models.longcat.params import skeleton
from models.longcat.predicted import SOURCE, evaluation_seconds
from models.longcat.sampler import StepInput, cached_step, clip_step
from models.longcat.segments import decode, encode
from models.longcat.settings import TEXT_SLOTS, Settings, chosen_sizes, settle
from models.longcat.sharding import check_division, share_bytes
from models.runs.checkpoint_folder import Sizes
from models.runs.memory import text_encoder_bytes, text_kv_bytes
from models.runs.reading import precision_notes
from models.runs.shared_needs import LeftOut
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from qvg_jax.app.memory_plan import Need, Plan, shape_bytes, temporary_bytes
from qvg_jax.attention.spread import check_spread
from qvg_jax.cache.devices import share_bytes as share_of_cache
from qvg_jax.cache.plan import Plan as CachePlan
from qvg_jax.errors import told_to_user
from qvg_jax.loop import run_chunk

CHUNK = 8  # steps in one device call, as `denoise` has it
ROWS = 64  # rows of the text that a short prompt keeps


def make_plan(options: Options, memory: int, released: Sizes) -> Plan:
    """What each codec of a request needs, as if its arm ran alone; on one device, and on `options.devices`.

    Compiles all programs of a run for the default backend; allocates nothing. The length of the
    video does not matter: each segment has its own cache, of one size.

    Args:
        options: codecs, size and given frames.
        memory: bytes of the device.
        released: sizes of the networks.

    Raises:
        UserError: a value that is not accepted, named with what would be.
    """
    settings = settle(options, chosen_sizes(options, None, released))
    count = options.devices or 1
    with told_to_user():
        check_division(settings.sizes.dit, count)
    begin = time.perf_counter()
    dit, vae = skeleton(settings.sizes.dit), VAE_WEIGHTS.skeleton(settings.sizes.vae)
    decoding = temporary_bytes(decode, vae, _clip(settings))
    encoding = temporary_bytes(encode, vae, _frames(settings))
    first = temporary_bytes(run_chunk, *_loop(settings, dit, None))
    needs, left_out = [], LeftOut()
    for name in settings.codecs:
        cache = settings.cache(name)
        size = shape_bytes(cache)
        held = {
            "transformer": shape_bytes(dit),
            "cache": size,
            "prompt K/V": text_kv_bytes(settings.sizes.dit, ROWS, prompts=2),
            "VAE": shape_bytes(vae),
        }
        temporaries = {
            "a segment's steps": temporary_bytes(run_chunk, *_loop(settings, dit, cache)),
            "building the cache": _building(settings, dit, name) - size,
            # The rest has no cache beside it.
            "the first clip": max(0, first - size),
            "decoding": max(0, decoding - size),
            "encoding": max(0, encoding - size),
        }
        alone = Need(name=name, held=held, temporaries=temporaries)
        for need in (alone, *_on_devices(settings, dit, alone, count, left_out)):
            longest, devices = None if need.total <= memory else 0, 1 if need is alone else count
            seconds = evaluation_seconds(settings, name, devices) if count > 1 else None
            needs.append(dataclasses.replace(need, longest=longest, seconds=seconds))
    left_out.say()
    return Plan(
        what=f"LongCat-Video, {settings.segments.num_cond_frames} given frames of "
        f"{settings.height} x {settings.width}, {settings.sizes.dit.layers} layers, each codec "
        "alone" + (", on one device" if count == 1 else ""),
        before={"text encoder": text_encoder_bytes(settings.sizes.text, TEXT_SLOTS, prompts=2)},
        needs=tuple(needs),
        backend=jax.default_backend(),
        seconds=time.perf_counter() - begin,
        advice="accepted: fewer --cond-frames, a smaller --height and --width, a codec of fewer "
        "bits (`qvg codecs`), or several devices, which share transformer and cache",
        larger="a device with more memory, or several, which share the transformer",
        notes=(
            *precision_notes({name: settings.cache(name) for name in settings.codecs}, options),
            *((SOURCE,) if any(need.seconds is not None for need in needs) else ()),
        ),
        timed="an evaluation",
    )


def _on_devices(settings: Settings, dit, need: Need, count: int, left_out: LeftOut) -> list[Need]:
    """The need of one of several devices, which have some of the heads each; temporaries are those of one alone.

    A codec that keeps heads together is left out.
    """
    if count == 1:
        return []
    plan, cache = CachePlan(heads=count), settings.cache(need.name)
    name = f"{need.name}, heads over {count}"
    try:
        check_spread(cache, plan, 0)
    except NotImplementedError as error:
        left_out.add(name, error)
        return []
    share = {"transformer": share_bytes(dit, count), "cache": share_of_cache(cache, plan)}
    return [dataclasses.replace(need, name=name, held=need.held | share)]


def _clip(settings: Settings, first: int = 0):
    B, F, *frame = settings.clip
    return jax.ShapeDtypeStruct((B, F - first, *frame), jnp.float32)


def _frames(settings: Settings):
    shape = (1, settings.segments.num_cond_frames, settings.height, settings.width, 3)
    return jax.ShapeDtypeStruct(shape, jnp.uint8)


def _building(settings: Settings, dit, name: str) -> int:
    key_codec, value_codec = settings.codecs[name]
    B, F, *frame = settings.clip
    given = jax.ShapeDtypeStruct((B, settings.segments.given_latents, *frame), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    build = functools.partial(build_condition, key_codec=key_codec, value_codec=value_codec)
    return temporary_bytes(jax.jit(lambda model, x, key: build(model, x, key=key)), dit, given, key)


def _loop(settings: Settings, dit, cache):
    """Arguments of the program that denoises: a segment with its cache, or the first clip."""
    config, branches = settings.sizes.dit, 2
    text = (config.layers, branches, ROWS, config.heads, config.head_dim)
    text = jax.ShapeDtypeStruct(text, config.dtype)
    text_kv = TextKV(text, text, jax.ShapeDtypeStruct((branches, ROWS), jnp.float32))
    guidance = jax.ShapeDtypeStruct((1,), jnp.float32)
    if cache is None:
        x = _clip(settings)
        step = Partial(
            clip_step, dit, text_kv, guidance, jax.ShapeDtypeStruct((1, 0, *x.shape[2:]), x.dtype)
        )
    else:
        x = _clip(settings, settings.segments.given_latents)
        step = Partial(cached_step, dit, text_kv, guidance, cache)
    levels = StepInput(*[jax.ShapeDtypeStruct((CHUNK,), np.float32)] * 3)
    return step, x, levels, jax.ShapeDtypeStruct((), jnp.int32)
