"""A WorldPlay of a few thousand parameters, with the VAE and text encoder of a tiny Self-Forcing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.common.parts import Sizes
from models.common.weights import Weights
from models.worldplay import WorldPlayConfig
from tests import tiny_self_forcing

HEIGHT, WIDTH = 32, 48
CODEC = "qvg:num_centroids=4:group=16:storage=single"


def sizes() -> Sizes:
    """The VAE has the structure of Wan2.1's: what the job asks of one does not depend on it."""
    tiny = tiny_self_forcing.sizes()
    dit = WorldPlayConfig(
        layers=2, width=32, heads=2, ffn_width=40, latent_channels=16, out_channels=16,
        time_width=8, text_width=12, text_slots=7, rope_frames=24, frames_per_block=2,
        dtype=jnp.float32,
    )  # fmt: skip
    return dataclasses.replace(tiny, dit=dit)


@functools.cache
def drawn(weights: Weights, config, seed: int = 0) -> nnx.Module:
    """In the place of `Weights.random`, whose initialisers take seconds to compile."""
    graphdef, state = nnx.split(weights.skeleton(config))
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(draw, state))
