"""A LingBot-World of a few thousand parameters."""

import dataclasses

import jax.numpy as jnp

from models.lingbot.config import LingBotConfig
from models.runs.checkpoint_folder import Sizes
from tests.support import tiny_self_forcing
from tests.support.checkpoint_shapes import wan_shapes

HEIGHT, WIDTH = 32, 48
CODEC = "qvg:num_centroids=4:group=16"


def sizes() -> Sizes:
    """All three networks; real structure, hardly any width."""
    dit = LingBotConfig(
        layers=2, width=32, heads=2, ffn_width=40, time_width=8, text_width=12, text_slots=7,
        rope_frames=24, frames_per_block=4, dtype=jnp.float32,
    )  # fmt: skip
    return dataclasses.replace(tiny_self_forcing.sizes(), dit=dit)


def shapes(c: LingBotConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a LingBot-World checkpoint, by its name."""
    M = c.width
    found = wan_shapes(c)
    found["patch_embedding.weight"] = (M, c.latent_channels + c.condition_channels, 1, *c.patch)
    matrices = {"patch_embedding_wancamctrl": (M, c.control_width)}
    matrices |= {f"c2ws_hidden_states_layer{i}": (M, M) for i in (1, 2)}
    for i in range(c.layers):
        names = ("cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer")
        matrices |= {f"blocks.{i}.{name}": (M, M) for name in names}
    for name, shape in matrices.items():
        found |= {name + ".weight": shape, name + ".bias": shape[:1]}
    return found
