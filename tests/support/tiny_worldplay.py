"""A WorldPlay of a few thousand parameters, its VAE of Wan2.2's kind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.common.weights import Weights
from models.runs.checkpoint_folder import Sizes
from models.worldplay.config import WorldPlayConfig
from tests.support import tiny_self_forcing
from tests.support.wan_vae_22 import case, case_config

HEIGHT, WIDTH = 64, 96
CODEC = "qvg:num_centroids=4:group=16:storage=single"


def sizes() -> Sizes:
    """All three networks; real structure, hardly any width."""
    vae = case_config(case("wan_vae_22")["stored"])
    dit = WorldPlayConfig(
        layers=2, width=32, heads=2, ffn_width=40, latent_channels=vae.latent_channels,
        out_channels=vae.latent_channels,
        time_width=8, text_width=12, text_slots=7, rope_frames=24, frames_per_block=2,
        dtype=jnp.float32,
    )  # fmt: skip
    return dataclasses.replace(tiny_self_forcing.sizes(), dit=dit, vae=vae)


@functools.cache
def drawn(weights: Weights, config, seed: int = 0) -> nnx.Module:
    """In the place of `Weights.random`, whose initialisers take seconds to compile."""
    graphdef, state = nnx.split(weights.skeleton(config))
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(draw, state))
