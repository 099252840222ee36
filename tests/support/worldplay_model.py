"""The tiny WorldPlay of the golden vectors, for the tests that use it."""

import functools

import jax.numpy as jnp
import numpy as np

from models.worldplay.block import Frames
from models.worldplay.config import WorldPlayConfig
from models.worldplay.params import load_dit


def config_of(sizes, dtype=jnp.float32):
    """The configuration that the vectors' config.json describes."""
    return WorldPlayConfig(
        layers=sizes["layers"],
        width=sizes["heads"] * sizes["hd"],
        heads=sizes["heads"],
        ffn_width=sizes["ffn"],
        latent_channels=sizes["ch"],
        out_channels=sizes["ch"],
        time_width=sizes["freq_dim"],
        text_width=sizes["text_dim"],
        text_slots=sizes["text_len"],
        rope_frames=sizes["rope_max"],
        dtype=dtype,
    )


def loader(folder):
    """load(dtype) -> the model, once per dtype."""

    @functools.cache
    def load(dtype=jnp.float32):
        config = config_of(folder.config, dtype)
        return load_dit(folder.path / "dit_tiny.safetensors", config)

    return load


def frames_first(x_BZFYX):
    return jnp.asarray(np.swapaxes(x_BZFYX, 1, 2))


def frames_at(v, at):
    """Cameras and actions of some frames of `dit_tiny_io`."""
    return Frames(*(jnp.asarray(v[name][:, at]) for name in ("viewmats", "Ks", "action")))


def close(actual, expected, rel=2e-5, atol=3e-4):
    """Within a relative L2 distance and a largest difference: by default those of outputs."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    distance = np.linalg.norm(actual - expected)
    assert distance <= rel * np.linalg.norm(expected)
    assert np.abs(actual - expected).max() <= atol


close_kv = functools.partial(close, rel=3e-6, atol=3e-5)  # cache and inside of attention
