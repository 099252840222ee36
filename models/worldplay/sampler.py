"""Euler steps along the predicted velocity, with the rounding of the released pipeline."""

import numpy as np
from jaxtyping import Array, Float

from models.common.rounding import round_to
from models.worldplay.config import SamplerConfig


def step_sizes(sampler: SamplerConfig) -> Float[np.ndarray, "J"]:
    """Float32 sigma_{i+1} - sigma_i of each denoising pass; all negative."""
    return np.diff(sampler.sigmas)


def euler_step(
    x: Float[Array, "*shape"], velocity: Float[Array, "*shape"], d_sigma: Float[Array, ""] | float
) -> Float[Array, "*shape"]:
    """x + d_sigma velocity; the step size, the product and the sum are each rounded to x's dtype.

    Args:
        x: latents.
        velocity: the network's output, noise - data.
        d_sigma: float32 scalar, next noise level minus this one.
    """
    size = round_to(np.float32(d_sigma) if isinstance(d_sigma, float) else d_sigma, x.dtype)
    change = round_to(size * round_to(velocity, x.dtype), x.dtype)
    return round_to(x.astype(change.dtype) + change, x.dtype).astype(x.dtype)
