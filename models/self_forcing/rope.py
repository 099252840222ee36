"""Wan's rotation in the sizes of this model."""

from models.common.wan_rope import wan_rope
from models.self_forcing.config import SelfForcingConfig
from qvg_jax.cache.rope import Rope


def model_rope(config: SelfForcingConfig) -> Rope:
    """The rotation of a model of this size."""
    return wan_rope(config.head_dim, config.rope_frames, config.rope_theta)
