"""The ladder of noise levels: flow matching with a shifted, discrete schedule.

Everything that depends on the schedule alone is computed on the host, once, in NumPy; what depends
on data is three lines of JAX in float32.
"""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.self_forcing.config import SamplerConfig


@dataclass(frozen=True)
class Ladder:
    """The noise levels sigma_i of a `SamplerConfig` and the way from timesteps to them.

    s_i = top (1 - i / n), sigma_i = shift s_i / (1 + (shift - 1) s_i), t_i = n sigma_i, i = 0..n-1.

    sigma = 1 is pure noise; the clean end, sigma = 0, is not a rung.

    Source: Wan2.1 (arXiv 2503.20314) and Self-Forcing (arXiv 2506.08009), inference schedule.
    """

    config: SamplerConfig = SamplerConfig()

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Float32 [n], falling: the fraction of noise at each rung."""
        n, shift = self.config.train_steps, self.config.shift
        straight = self.config.top * (1.0 - np.arange(n, dtype=np.float64) / n)
        return (shift * straight / (1.0 + (shift - 1.0) * straight)).astype(np.float32)

    @cached_property
    def timesteps(self) -> np.ndarray:
        """Float32 [n]: what the network is told, 0..n."""
        told = self.sigmas * np.float32(self.config.train_steps)
        return np.floor(told) if self.config.whole_timesteps else told

    @cached_property
    def training_weights(self) -> np.ndarray:
        """Float32 [n]: a bell over the timesteps with mean 1, the weight of each in the loss."""
        n = self.config.train_steps
        t = self.timesteps.astype(np.float64)
        bell = np.exp(-2.0 * ((t - n / 2) / n) ** 2)
        bell -= bell.min()
        return (bell * (n / bell.sum())).astype(np.float32)

    @cached_property
    def steps(self) -> np.ndarray:
        """Float32 [J]: the timesteps of the denoising passes, warped onto the ladder if asked for."""
        if not self.config.warped:
            return np.asarray(self.config.steps, np.float32)
        with_end = np.append(self.timesteps, np.float32(0.0))
        return with_end[self.config.train_steps - np.asarray(self.config.steps)]

    def index(self, timesteps) -> np.ndarray:
        """The rung nearest to each timestep (the noisier one of two equally near)."""
        wanted = np.asarray(timesteps, np.float32)
        return np.asarray(np.abs(self.timesteps - wanted[..., None]).argmin(-1))

    def sigma(self, timesteps) -> np.ndarray:
        """Float32 noise fraction of each timestep, looked up at the nearest rung."""
        return np.asarray(self.sigmas[self.index(timesteps)])

    @cached_property
    def step_sigmas(self) -> np.ndarray:
        """Float32 [J + 1]: sigma of each denoising pass, then 0 for "keep the prediction".

        Looked up by the timestep: where whole timesteps make rungs equal, the noisiest of them.
        """
        return np.append(self.sigma(self.steps), np.float32(0.0))


type Sigma = Float[Array | np.ndarray, "..."] | float


def _per_item(sigma: Sigma, like: Array) -> Array:
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def add_noise(
    x0: Float[Array, "*shape"], noise: Float[Array, "*shape"], sigma: Sigma
) -> Float[Array, "*shape"]:
    """x = (1 - sigma) x0 + sigma noise, in float32, returned in the dtype of `x0`.

    Args:
        x0: clean latents.
        noise: standard normal, same shape.
        sigma: noise fraction; its axes are the leading axes of `x0`.
    """
    s = _per_item(sigma, x0)
    x = (1.0 - s) * x0.astype(jnp.float32) + s * noise.astype(jnp.float32)
    return x.astype(x0.dtype)


def flow_to_x0(
    flow: Float[Array, "*shape"], x: Float[Array, "*shape"], sigma: Sigma
) -> Float[Array, "*shape"]:
    """x0 = x - sigma flow, in float32, returned in the dtype of `flow`.

    Args:
        flow: the network's output, noise - x0.
        x: the network's input.
        sigma: noise fraction of `x`; its axes are the leading axes of `x`.
    """
    x0 = x.astype(jnp.float32) - _per_item(sigma, x) * flow.astype(jnp.float32)
    return x0.astype(flow.dtype)


def x0_to_flow(
    x0: Float[Array, "*shape"], x: Float[Array, "*shape"], sigma: Sigma
) -> Float[Array, "*shape"]:
    """flow = (x - x0) / sigma, in float32, returned in the dtype of `x0`: inverts `flow_to_x0`."""
    flow = (x.astype(jnp.float32) - x0.astype(jnp.float32)) / _per_item(sigma, x)
    return flow.astype(x0.dtype)
