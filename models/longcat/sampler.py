"""From noise to latents: guidance with the optimised scale, and Euler steps.

The network predicts x0 - noise, so the velocity dx / dsigma is its negative.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from models.longcat.condition import view_condition
from models.longcat.modeling import LongCatDiT, TextKV
from models.longcat.passes import cached_forward, clip_forward
from models.longcat.schedule import Schedule
from qvg_jax.cache.operations import KVCache
from qvg_jax.loop import rollout

type Progress = Callable[[int, int, Any], None]  # progress(steps_done, steps, latents)


class StepInput(NamedTuple):
    """What one step needs to know: the timestep, and the noise fraction before and after."""

    timestep: Float[Array, ""]
    sigma: Float[Array, ""]
    next_sigma: Float[Array, ""]


class Trace(NamedTuple):
    """What each step left: latents of the noise frames, and the optimised scale (1 without)."""

    x_JBFZYX: Float[np.ndarray, "J B F Z Y X"]
    scale_JB: Float[np.ndarray, "J B"]


def guide(
    negative_BFZYX: Float[Array, "B F Z Y X"],
    positive_BFZYX: Float[Array, "B F Z Y X"],
    guidance_B: Float[Array, "B"],
) -> tuple[Float[Array, "B F Z Y X"], Float[Array, "B"]]:
    """s u + guidance (p - s u) with s = <p, u> / (<u, u> + 1e-8), for each video by itself.

    Args:
        negative_BFZYX, positive_BFZYX: u and p, outputs for the negative and the positive prompt.
        guidance_B: how far to go from u to p; 1 is p.

    Returns:
        The guided output and s.

    Source: CFG-Zero* (arXiv 2503.18886), the optimised scale, without its zero-init.
    """
    u, p = negative_BFZYX.astype(jnp.float32), positive_BFZYX.astype(jnp.float32)
    axes = tuple(range(1, u.ndim))
    s_B = (p * u).sum(axes) / ((u * u).sum(axes) + 1e-8)
    ones = (1,) * (u.ndim - 1)
    su = s_B.reshape(-1, *ones) * u
    return su + guidance_B.reshape(-1, *ones) * (p - su), s_B


def euler_step(
    x: Float[Array, "*shape"],
    out: Float[Array, "*shape"],
    sigma: Float[Array, ""] | float,
    next_sigma: Float[Array, ""] | float,
) -> Float[Array, "*shape"]:
    """x + (sigma' - sigma) v with v = -out, float32."""
    return x.astype(jnp.float32) - (next_sigma - sigma) * out.astype(jnp.float32)


def _branches(guidance_B: Array | None, *arrays: Array) -> tuple[Array, ...]:
    """One copy for each prompt: all negative ones, then all positive ones."""
    if guidance_B is None:
        return arrays
    return tuple(jnp.concatenate([x, x]) for x in arrays)


def _guided(out: Array, guidance_B: Array | None, videos: int) -> tuple[Array, Array]:
    if guidance_B is None:
        return out, jnp.ones((videos,), jnp.float32)
    return guide(out[:videos], out[videos:], guidance_B)


def clip_step(
    model: LongCatDiT,
    text_kv: TextKV,
    guidance_B: Float[Array, "B"] | None,
    given_BFZYX: Float[Array, "B G Z Y X"],
    x_BFZYX: Float[Array, "B F Z Y X"],
    step: StepInput,
) -> tuple[Float[Array, "B F Z Y X"], tuple[Array, Array]]:
    """One plain or joint step.

    The optimised scale is that of the whole output, given frames included. They are the same in
    both branches and draw it towards 1, so a guided joint run is not the cached run.

    Args:
        model: the transformer.
        text_kv: negative prompts, then positive ones; positive ones only without guidance.
        guidance_B: guidance of each video; None for none.
        given_BFZYX: clean latents of the given frames; G = 0 for a plain step.
        x_BFZYX: latents of the noise frames, float32.
        step: where on the schedule.

    Returns:
        The latents after the step; and them again with the optimised scale, to look at.
    """
    videos, given = given_BFZYX.shape[:2]
    clip = jnp.concatenate([given_BFZYX.astype(x_BFZYX.dtype), x_BFZYX], axis=1)
    t_F = jnp.where(jnp.arange(clip.shape[1]) < given, 0.0, step.timestep)
    (doubled,) = _branches(guidance_B, clip)
    out = clip_forward(model, doubled, t_F[None], text_kv, given_frames=given).out_BFZYX
    out, scale_B = _guided(out, guidance_B, videos)
    x_BFZYX = euler_step(x_BFZYX, out[:, given:], step.sigma, step.next_sigma)
    return x_BFZYX, (x_BFZYX, scale_B)


def cached_step(
    model: LongCatDiT,
    text_kv: TextKV,
    guidance_B: Float[Array, "B"] | None,
    cache: KVCache,
    x_BFZYX: Float[Array, "B F Z Y X"],
    step: StepInput,
) -> tuple[Float[Array, "B F Z Y X"], tuple[Array, Array]]:
    """One step that reads the given frames from their cache; else as `clip_step`."""
    view = view_condition(model.config, cache, x_BFZYX.shape)
    (doubled,) = _branches(guidance_B, x_BFZYX)
    t = step.timestep[None, None]
    out = cached_forward(model, doubled, t, text_kv, view).out_BFZYX
    out, scale_B = _guided(out, guidance_B, x_BFZYX.shape[0])
    x_BFZYX = euler_step(x_BFZYX, out, step.sigma, step.next_sigma)
    return x_BFZYX, (x_BFZYX, scale_B)


def denoise(
    step: Partial,
    noise_BFZYX: Float[Array | np.ndarray, "B F Z Y X"],
    schedule: Schedule,
    *,
    chunk: int = 8,
    progress: Progress | None = None,
) -> tuple[Float[Array, "B F Z Y X"], Trace]:
    """Takes noise down a schedule.

    Args:
        step: `Partial(clip_step or cached_step, ...)` of all but the last two arguments.
        noise_BFZYX: standard normal start.
        schedule: the noise levels.
        chunk: steps in one device call; schedules of any length run the same program.
        progress: called as `progress(steps_done, steps, latents)` after each call; it must not
            keep the latents.

    Returns:
        Clean latents, float32, and what each step left, on the host.
    """
    sigmas = schedule.sigmas
    xs = StepInput(schedule.timesteps, sigmas[:-1], sigmas[1:])
    start = jnp.array(noise_BFZYX, jnp.float32)  # a copy: the loop donates its state
    x_BFZYX, ys = rollout(step, start, xs, chunk=chunk, progress=progress)
    return x_BFZYX, Trace(*ys)
