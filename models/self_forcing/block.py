"""One block of frames: from noise to clean latents, and into the cache.

A block of frames starts as noise and is denoised in a few passes, each predicting the clean block
and adding less noise to it than before. A last pass over the clean block, at the context timestep,
gives the K and V that later blocks read. Given frames (an image, a video to go on from) take that
last pass only.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from models.common.wan_text import TextKV
from models.runs.devices import whole_on_all
from models.self_forcing.averaged_sink import before_the_window
from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from models.self_forcing.history import append_frames, block_positions
from models.self_forcing.modeling import Output, SelfForcingDiT
from models.self_forcing.rope import model_rope
from models.self_forcing.sampler import Ladder, add_noise, flow_to_x0
from qvg_jax.attention.api import attend
from qvg_jax.cache.operations import KVCache, compress
from qvg_jax.cache.view import CacheView


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """All that a generation carries from block to block.

    Attributes:
        cache: K and V of what was made.
        text_kv: K and V of the prompt.
        sink_average: of the `History`.
    """

    cache: KVCache
    text_kv: TextKV
    sink_average: float | None = dataclasses.field(default=None, metadata=dict(static=True))


class BlockNoise(NamedTuple):
    """Standard normal noise of one block: where it starts, and what each later pass adds."""

    start_BFZYX: Float[Array, "B F Z Y X"]
    renoise_JBFZYX: Float[Array, "J B F Z Y X"]  # J = denoising steps - 1


class Trace(NamedTuple):
    """What the denoising passes of one block saw and said, leading axis the pass."""

    x_JBFZYX: Float[Array, "J B F Z Y X"]
    flow_JBFZYX: Float[Array, "J B F Z Y X"]
    x0_JBFZYX: Float[Array, "J B F Z Y X"]


def draw_noise(
    key: PRNGKeyArray,
    config: SelfForcingConfig,
    sampler: SamplerConfig,
    shape: tuple[int, int, int, int],
) -> BlockNoise:
    """All noise of one block.

    Args:
        key: the block's own key.
        config, sampler: channels and dtype; number of passes.
        shape: (B, F, Y, X) of the block's latents.
    """
    B, F, Y, X = shape
    start, renoise = jax.random.split(key)
    latents = (B, F, config.latent_channels, Y, X)

    def normal(key, shape):  # float32 draws, so that all dtypes see the same noise
        return jax.random.normal(key, shape, jnp.float32).astype(config.dtype)

    return BlockNoise(normal(start, latents), normal(renoise, (len(sampler.steps) - 1, *latents)))


def cached_forward(
    model: SelfForcingDiT,
    x_BFZYX: Float[Array, "B F Z Y X"],
    t: Float[Array, "..."],
    text_kv: TextKV,
    view: CacheView,
    *,
    keep_kv: bool = False,
) -> Output:
    """One pass over a block whose queries also see everything in the cache.

    Args:
        model: the transformer.
        x_BFZYX: the block's latents.
        t: timesteps, as the model takes them.
        text_kv: from `model.text_kv`.
        view: `cache.view(positions_BTP, rope)`; all passes over a block share one.
        keep_kv: also return the block's K (before RoPE) and V.
    """

    def attention(q_BTHD, k_BTHD, v_BTHD, layer):
        way = dict(implementation=model.config.attention, precision=model.config.precision)
        return attend(q_BTHD, view, k_BTHD, v_BTHD, layer=layer, **way)

    return model(x_BFZYX, t, text_kv, attention, keep_kv=keep_kv, plan=view.cache.layout.plan)


def denoise_block(
    model: SelfForcingDiT, text_kv: TextKV, view: CacheView, noise: BlockNoise, ladder: Ladder
) -> tuple[Float[Array, "B F Z Y X"], Trace]:
    """Denoises one block: x0 = x - sigma flow(x), then x = (1 - sigma') x0 + sigma' noise.

    After the last pass sigma' is 0, so its prediction is returned as it is.

    Source: Self-Forcing (arXiv 2506.08009), the few-step roll-out.
    """
    last = jnp.zeros_like(noise.start_BFZYX)[None]
    passes = (
        jnp.asarray(ladder.steps),
        jnp.asarray(ladder.step_sigmas[:-1]),
        jnp.asarray(ladder.step_sigmas[1:]),
        jnp.concatenate([noise.renoise_JBFZYX.astype(last.dtype), last]),
    )

    def one_pass(x, step):
        t, sigma, next_sigma, eps = step
        flow = cached_forward(model, x, t[None, None], text_kv, view).flow_BFZYX
        x0 = flow_to_x0(flow, x, sigma)
        return add_noise(x0, eps, next_sigma), Trace(x, flow, x0)

    return jax.lax.scan(one_pass, noise.start_BFZYX, passes)


def _look(model: SelfForcingDiT, state: State, shape: tuple[int, ...]):
    """Compresses what is due; then the block's positions, and the view its passes share."""
    cache = compress(state.cache)
    if state.sink_average is not None:
        cache = before_the_window(cache)
    positions_BTP = block_positions(model.config, cache, shape)
    config = model.config
    return positions_BTP, cache.view(positions_BTP, model_rope(config), relative=config.relative)


def _remember(model, state, view, positions_BTP, x0_BFZYX, timestep) -> State:
    """The clean pass: its K and V go into the cache that `view` shows."""
    t = jnp.full((1, 1), timestep, jnp.float32)
    out = cached_forward(model, x0_BFZYX, t, state.text_kv, view, keep_kv=True)
    cache = append_frames(view.cache, out.k_LBTHD, out.v_LBTHD, positions_BTP, state.sink_average)
    return dataclasses.replace(state, cache=cache)


def read_block(
    model: SelfForcingDiT, state: State, x0_BFZYX: Float[Array, "B F Z Y X"], timestep: float = 0.0
) -> State:
    """Puts given frames (an image, a video to go on from) into the cache by one clean pass.

    Args:
        model: the transformer.
        state: donate it at the outermost jit.
        x0_BFZYX: clean latents of one block.
        timestep: what the pass is told; given frames are clean whatever the sampler's context is.
    """
    x0_BFZYX = x0_BFZYX.astype(model.config.dtype)
    positions_BTP, view = _look(model, state, x0_BFZYX.shape)
    return _remember(model, state, view, positions_BTP, x0_BFZYX, timestep)


class Known(NamedTuple):
    """A block that an earlier run may have generated already."""

    done: Bool[Array, ""]  # whether it has
    x0_BFZYX: Float[Array, "B F Z Y X"]  # its latents; not looked at otherwise


def generate_block(
    model: SelfForcingDiT,
    state: State,
    noise: BlockNoise,
    sampler: SamplerConfig,
    known: Known | None = None,
) -> tuple[State, Float[Array, "B F Z Y X"]]:
    """One step of the roll-out: compress what is due, denoise a block, remember it.

    A block that is known already is not denoised again, only remembered. Whether it is, is data:
    the clean pass of both cases is one and the same program, so a run that was interrupted and
    goes on has, bit for bit, the cache that it would have had.

    Args:
        model: the transformer.
        state: donate it at the outermost jit.
        noise: the block's noise; its shape decides the number of frames.
        sampler: the few-step schedule (static).
        known: the block, if it may be there from an earlier run.

    Returns:
        The state for the next block, and the block's clean latents.
    """
    noise = jax.tree.map(lambda x: x.astype(model.config.dtype), noise)
    positions_BTP, view = _look(model, state, noise.start_BFZYX.shape)

    def denoised():
        return denoise_block(model, state.text_kv, view, noise, Ladder(sampler))[0]

    if known is None:
        x0_BFZYX = denoised()
    else:
        given = known.x0_BFZYX.astype(model.config.dtype)
        x0_BFZYX = jax.lax.cond(known.done, lambda: given, denoised)
    x0_BFZYX = whole_on_all(x0_BFZYX, state.cache.layout.plan)
    timestep = sampler.context_timestep
    return _remember(model, state, view, positions_BTP, x0_BFZYX, timestep), x0_BFZYX
