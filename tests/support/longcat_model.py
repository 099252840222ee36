"""A LongCat transformer of a few thousand random parameters, and prompts for it."""

import functools

import jax.numpy as jnp
import numpy as np

from models.longcat.config import LongCatConfig
from models.longcat.params import random_dit
from models.longcat.pipeline import Prompt

CONFIG = LongCatConfig(
    layers=2,
    width=24,
    heads=2,
    mlp_ratio=1,
    latent_channels=4,
    out_channels=4,
    time_width=8,
    condition_width=10,
    text_width=6,
    dtype=jnp.float32,
)
U = 7  # rows of text


@functools.cache
def model():
    """The network, made once."""
    return random_dit(CONFIG, seed=0)


def normal(seed, *shape):
    """Normal float32 numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def prompt(*lengths, negative=True):
    """A prompt of so many words for each video, with or without a negative one."""
    mask = (np.arange(U)[None] < np.asarray(lengths or (4,))[:, None]).astype(int)
    text = normal(1, 2, U, CONFIG.text_width)[: len(mask)]
    if not negative:
        return Prompt(text_BUE=text, mask_BU=mask)
    other = normal(2, 1, U, CONFIG.text_width), np.ones((1, U), int)
    return Prompt(text_BUE=text, mask_BU=mask, negative_BUE=other[0], negative_mask_BU=other[1])
