"""Settings that the models share which make a video block by block from one cache an arm."""

import abc
import dataclasses
from typing import Any

import jax

from models.runs.checkpoint_folder import Sizes
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.plan import Plan

__all__ = ["BlockSettings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSettings(abc.ABC):
    """The options of a user without choices left; a model adds its own and `frames`, its latent frames.

    Attributes:
        sizes: of the networks.
        sampler: the few-step schedule.
        histories: what each arm remembers, by the name of the arm; bf16 first.
        height, width: of the video, in pixels.
    """

    sizes: Sizes
    sampler: Any
    histories: dict[str, Any]
    height: int
    width: int

    @staticmethod
    @abc.abstractmethod
    def make_cache(config: Any, history: Any, **sizes: int) -> KVCache:
        """The model's own `make_cache(config, history, frames, latent_height, latent_width)`."""

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, bf16 first."""
        return tuple(self.histories)

    @property
    def plan(self) -> Plan | None:
        """The plan by which the caches of all arms are spread over devices; None for one."""
        return next(iter(self.histories.values())).plan

    @property
    def latent(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        side = self.sizes.vae.spatial_stride
        return self.height // side, self.width // side

    def cache(self, arm: str, frames: int | None = None) -> KVCache:
        """An arm's cache, shapes only; for another number of frames if given."""
        sizes = dict(
            frames=self.frames if frames is None else frames,  # type: ignore[attr-defined]
            latent_height=self.latent[0],
            latent_width=self.latent[1],
        )
        return jax.eval_shape(lambda: self.make_cache(self.sizes.dit, self.histories[arm], **sizes))
