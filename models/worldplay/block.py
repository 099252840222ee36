"""One block of the roll-out: context pass, denoising, and the frames that join the history.

A block starts as noise. Before its first denoising pass, the clean frames it looks back at go
through the network once, at the context timestep, and their K and V into the cache; each of the
few passes then predicts the velocity of the block's frames and moves them along it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.common.wan_text import TextKV
from models.runs.devices import whole_on_all
from models.worldplay.attention import Sight, cached_attention, look
from models.worldplay.config import SamplerConfig, WorldPlayConfig
from models.worldplay.context import ContextKV, context_kv
from models.worldplay.encoding import here, positions
from models.worldplay.history import History
from models.worldplay.memory import remember_all, remember_block
from models.worldplay.modeling import Branches, WorldPlayDiT
from models.worldplay.prope import camera_matrices
from models.worldplay.sampler import euler_step, step_sizes
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.plan import Plan


class Frames(NamedTuple):
    """Cameras and actions of latent frames."""

    w2c_BF44: Float[Array, "B F 4 4"]
    intrinsics_BF33: Float[Array, "B F 3 3"]
    actions_BF: Float[Array, "B F"]


class BlockInput(NamedTuple):
    """What one block needs from outside; S is the most frames of a context."""

    noise_BFZYX: Float[Array, "B F Z Y X"]
    frames: Frames
    given_BFZYX: Float[Array, "B F Z Y X"]  # clean latents of frames that are not generated
    is_given_F: Bool[Array, "F"]
    context_S: Int[Array, "S"]  # sorted frame numbers of the context, then -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """All that a generation carries from block to block."""

    cache: KVCache
    text_kv: TextKV
    latents_BFZYX: Float[Array, "B F Z Y X"]  # clean frames so far, then zeros
    frames: Frames  # of the same frames
    blocks: Int[Array, ""]  # how many blocks are done


class Trace(NamedTuple):
    """What the denoising passes of one block saw and said, leading axis the pass."""

    x_JBFZYX: Float[Array, "J B F Z Y X"]
    t_JBF: Float[Array, "J B F"]
    velocity_JBFZYX: Float[Array, "J B F Z Y X"]


def look_from(
    config: WorldPlayConfig,
    cache: KVCache,
    frames: Frames,
    first_slot: Int[Array, ""] | int,
    frame_size: tuple[int, int],
) -> Sight:
    """What new frames see of a cache and of themselves.

    Args:
        config: sizes of the model.
        cache: holds the context.
        frames: cameras of the new frames.
        first_slot: RoPE position of the first of them: the number of frames in the cache.
        frame_size: (Y, X) of the latents.
    """
    camera = camera_matrices(frames.w2c_BF44, frames.intrinsics_BF33, config.dtype)
    slots_F = first_slot + jnp.arange(frames.w2c_BF44.shape[1])
    at_BTP = positions(slots_F, config.grid(*frame_size), camera)
    return look(config, cache, here(config, at_BTP, camera))


def denoise_block(
    model: WorldPlayDiT,
    text_kv: TextKV,
    attention: Callable[..., Branches],
    x: BlockInput,
    sampler: SamplerConfig,
    plan: Plan | None = None,
) -> tuple[Float[Array, "B F Z Y X"], Trace]:
    """Denoises one block: x <- x + (sigma' - sigma) velocity(x) down to sigma = 0.

    Given frames stay as they are, and the model is told that they are clean.

    Args:
        model: the transformer.
        text_kv: from `model.text_kv`.
        attention: as the model takes it; all passes share it.
        x: the block's noise, cameras and actions.
        sampler: the few-step schedule.
        plan: of the devices that run the network together; None for one.
    """
    given = x.is_given_F[None, :, None, None, None]
    start = jnp.where(given, x.given_BFZYX, x.noise_BFZYX).astype(model.config.dtype)
    steps = (jnp.asarray(sampler.timesteps[:-1]), jnp.asarray(step_sizes(sampler)))

    def one_pass(latents, step):
        t, d_sigma = step
        t_F = jnp.where(x.is_given_F, jnp.float32(sampler.context_timestep), t)
        t_BF = jnp.broadcast_to(t_F[None], latents.shape[:2])
        out = model(latents, t_BF, x.frames.actions_BF, text_kv, attention, plan=plan)
        velocity = out.velocity_BFZYX
        moved = euler_step(latents, velocity.astype(latents.dtype), d_sigma)
        return jnp.where(given, latents, moved), Trace(latents, t_BF, velocity)

    return jax.lax.scan(one_pass, start, steps)


def remember_context(
    model: WorldPlayDiT,
    state: State,
    context_S: Int[Array, "S"],
    timestep: float,
    history: History,
) -> KVCache:
    """The cache after the context pass over the chosen frames, and after compression.

    Args:
        model: the transformer.
        state: donate it at the outermost jit.
        context_S: sorted frame numbers, then -1; whole blocks of them. Without any, the cache is
            returned as it is.
        timestep: what the pass is told.
        history: what is stored (static).
    """
    config, cache = model.config, state.cache
    if not context_S.shape[0]:
        return cache
    blocks = (context_S >= 0).sum(dtype=jnp.int32) // config.frames_per_block

    def run(cache):
        last = not history.recomputes
        kv, at_BTP = context_pass(
            model, state, context_S, timestep, last_only=last, plan=cache.layout.plan
        )
        if history.recomputes:
            return remember_all(config, cache, kv, at_BTP, blocks)
        return remember_block(config, cache, kv, at_BTP)

    return jax.lax.cond(blocks > 0, run, lambda cache: cache, cache)


def context_pass(
    model: WorldPlayDiT,
    state: State,
    context_S: Int[Array, "S"],
    timestep: float,
    *,
    last_only: bool,
    plan: Plan | None = None,
) -> tuple[ContextKV, Float[Array, "B T 15"]]:
    """K and V of chosen frames that see each other, and where their tokens are.

    Args:
        model: the transformer.
        state: has the frames; its cache is not read.
        context_S: as for `remember_context`; at least one block.
        timestep: what the pass is told.
        last_only: only of the last block of them, not of all frames.
        plan: of the devices that share the tokens; None for one device.
    """
    config, n = model.config, model.config.frames_per_block
    blocks = (context_S >= 0).sum(dtype=jnp.int32) // n
    chosen = jnp.maximum(context_S, 0)
    x, frames = jax.tree.map(lambda a: a[:, chosen], (state.latents_BFZYX, state.frames))
    camera = camera_matrices(frames.w2c_BF44, frames.intrinsics_BF33, config.dtype)
    # Positions count the chosen frames, wherever in the video they are.
    at_BTP = positions(jnp.arange(chosen.shape[0]), config.grid(*x.shape[3:]), camera)
    kv = context_kv(
        model,
        x,
        timestep,
        frames.actions_BF,
        here(config, at_BTP, camera),
        state.text_kv,
        blocks,
        last_only=last_only,
        plan=plan,
    )
    if last_only:
        size = at_BTP.shape[1] // (chosen.shape[0] // n)
        at_BTP = jax.lax.dynamic_slice_in_dim(at_BTP, (blocks - 1) * size, size, 1)
    return kv, at_BTP


def generate_block(
    model: WorldPlayDiT, state: State, x: BlockInput, sampler: SamplerConfig, history: History
) -> tuple[State, Float[Array, "B F Z Y X"], Trace]:
    """One step of the roll-out.

    Args:
        model: the transformer.
        state: donate it at the outermost jit.
        x: the block's noise, cameras, actions and context.
        sampler, history: the few-step schedule; what is remembered (static).

    Returns:
        The state for the next block, the block's clean latents, and what its passes saw.
    """
    config, plan = model.config, state.cache.layout.plan
    cache = remember_context(model, state, x.context_S, sampler.context_timestep, history)
    seen = (x.context_S >= 0).sum(dtype=jnp.int32)
    sight = look_from(config, cache, x.frames, seen, x.noise_BFZYX.shape[3:])
    latents, trace = denoise_or_take(
        model, state.text_kv, cached_attention(config, sight), x, sampler, plan
    )
    latents = whole_on_all(latents, plan)
    return with_block(state, cache, latents, x.frames), latents, trace


def denoise_or_take(
    model: WorldPlayDiT,
    text_kv: TextKV,
    attention: Callable[..., Branches],
    x: BlockInput,
    sampler: SamplerConfig,
    plan: Plan | None = None,
) -> tuple[Float[Array, "B F Z Y X"], Trace]:
    """`denoise_block`, or at once the frames that are all given: those of an earlier run."""

    def given():
        latents = x.given_BFZYX.astype(model.config.dtype)
        return latents, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), trace)

    def denoised():
        return denoise_block(model, text_kv, attention, x, sampler, plan)

    trace = jax.eval_shape(denoised)[1]
    return jax.lax.cond(x.is_given_F.all(), given, denoised)


def with_block(
    state: State, cache: KVCache, latents: Float[Array, "B F Z Y X"], frames: Frames
) -> State:
    """The state after a block."""
    first = state.blocks * latents.shape[1]

    def put(buffer, new):
        return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), first, 1)

    return dataclasses.replace(
        state,
        cache=cache,
        latents_BFZYX=put(state.latents_BFZYX, latents),
        frames=jax.tree.map(put, state.frames, frames),
        blocks=state.blocks + 1,
    )
