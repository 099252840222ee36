"""The part of a latent model that models share which make a video block by block from one cache an arm."""

import abc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from models.common.weights import Weights
from models.runs import decode
from models.runs.block_settings import BlockSettings
from models.runs.latent_job import LatentModel, Run
from models.runs.latent_options import LatentOptions
from models.runs.reading import attention_told
from qvg_jax.app.job import Arm, Played
from qvg_jax.cache.health import cache_bytes

__all__ = ["BlockModel", "Look"]

type Look = Callable[[int, int, Any], None]  # called after each block with the loop's state


class BlockModel[O: LatentOptions, S: BlockSettings](LatentModel[O, S]):
    """A latent model whose blocks are stored, decoded and counted as they are made.

    Attributes:
        weights: the table that loads its transformer.
    """

    weights: Weights

    @abc.abstractmethod
    def latents(self, run: Run[O, S], arm: Arm, stored: np.ndarray, look: Look) -> Iterator[Any]:
        """Yields the latents of one arm, block by block: given ones, stored ones, then new ones.

        Args:
            run: with the networks.
            arm: which cache.
            stored: latents [B, F, Z, Y, X] of an earlier run.
            look: the loop's `progress`.
        """

    def given_latents(self, run: Run[O, S]) -> int:
        """Latent frames at the start that the user gave."""
        return 0

    def latent_block(self, settings: S) -> tuple[tuple[int, ...], Any]:
        dit = settings.sizes.dit
        return (1, dit.frames_per_block, dit.latent_channels, *settings.latent), dit.dtype

    def check_dit(self, files: tuple[Any, ...], settings: S) -> None:
        self.weights.check(files, settings.sizes.dit)

    def load_dit(self, files: tuple[Any, ...], options: O, settings: S) -> Any:
        return self.weights.load(files, settings.sizes.dit)

    def random_dit(self, options: O, settings: S) -> Any:
        return self.weights.random(settings.sizes.dit)

    def blocks(self, run: Run[O, S]) -> Iterable[Any]:
        return range(run.settings.frames // run.settings.sizes.dit.frames_per_block)

    def block_frames(self, settings: S) -> int:
        return settings.sizes.vae.temporal_stride * settings.sizes.dit.frames_per_block

    def play(self, run: Run[O, S], arm: Arm, xs: Iterator[Any]) -> Iterator[Played]:
        size, given = [], self.given_latents(run)
        stored = run.saved.read(arm.name)[:, : run.settings.frames - given]

        def look(_done, _total, state):
            size[:] = [cache_bytes(state.cache)]

        source = decode.Source(
            arm=arm.name,
            latents=self.latents(run, arm, stored, look),
            given=given,
            stored=stored.shape[1],
            size=lambda: size[0],
            decode_last=run.options.decode_last,
        )
        return decode.play(source, xs, vae=run.vae, saved=run.saved)

    def describe_cache(self, options: O, settings: S, arm: Arm) -> dict[str, Any]:
        lay = arm.state.layout
        return {
            "sink_frames": lay.sink_blocks,
            "span_frames": lay.span_blocks if lay.max_spans else 0,
            "spans": lay.max_spans,
            "window_frames": lay.window_blocks,
            "attention": attention_told(arm.name, options, arm.state),
            "tokens_of_a_frame": lay.block_tokens,
        }
