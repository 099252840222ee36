"""The job of every model that makes latents from a prompt: check, encode the prompt, load, run the arms.

A model is a `LatentModel`: how its options become settings, how its transformer is loaded, and how one
arm is played. `prepare` does the rest in the order that wastes the least of a user's time: everything
that can be wrong is checked before a tensor is read, and the text encoder is gone before the
transformer is loaded.
"""

import abc
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from models.common.attention import with_attention
from models.runs.checkpoint_folder import Parts, find_parts
from models.runs.devices import join_processes, plan_of
from models.runs.latent_options import LatentOptions
from models.runs.prompts import embed_prompts, stand_in_embedding
from models.runs.reading import attention_of
from models.runs.request_checks import RANDOM, check_needed, plain_config
from models.runs.saved_latents import SavedLatents
from models.umt5.params import WEIGHTS as TEXT_WEIGHTS
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from qvg_jax.app.early_checks import has_report
from qvg_jax.app.fetch import ask, fetch_address, fetched
from qvg_jax.app.hub import PREFIX, Download
from qvg_jax.app.job import Arm, Block, Job, Played

__all__ = ["LatentModel", "Run", "finished", "prepare"]

STAND_IN = "stand-in: noise drawn from each word"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run[O: LatentOptions, S]:
    """A run whose networks are loaded.

    Attributes:
        options: what the user asked for.
        settings: the same without choices left; the model's own class.
        parts: files of the weights; None for random weights.
        saved: latents on disk.
        dit, vae: the networks.
        prompt: what the model's `encode_prompt` gave.
        given: what the model's `encode_given` gave.
    """

    options: O
    settings: S
    parts: Parts | None
    saved: SavedLatents
    dit: Any
    vae: Any
    prompt: Any
    given: Any

    @property
    def seed_key(self) -> jax.Array:
        """The key that the seed stands for."""
        return jax.random.key(self.options.seed)

    def reader(self, arm: str) -> Any:
        """The transformer with an arm's way of reading the cache."""
        return with_attention(self.dit, *attention_of(arm, self.options))


class LatentModel[O: LatentOptions, S](abc.ABC):
    """What one model adds to the job of all latent models.

    Its settings have `sizes` (the networks), `frames` (latent frames of the whole video), `height`,
    `width`, `arms` (names, bf16 first), and `cache(arm)` (an arm's cache, shapes only).

    Attributes:
        name: as the command knows it.
        fps: frames a second of its videos.
        needs: files on a hub that the release is made of, see `ModelEntry`.
        dit_names: patterns of the transformer's name in a folder of weights, the best first.
        config_folder: folder inside of the weights that has the transformer's config.json.
        plans: by which its caches can be spread over devices, the best first.
    """

    name: str
    fps: int
    needs: tuple[Download, ...]
    dit_names: tuple[str, ...]
    config_folder: str = "."
    plans: tuple[str, ...] = ()

    @abc.abstractmethod
    def settle(self, options: O, parts: Parts | None) -> S:
        """Checks the options against the sizes of the networks and fills in what they leave open."""

    @abc.abstractmethod
    def identity(self, options: O, settings: S) -> dict[str, Any]:
        """What an arm's latents depend on beside what all models have in common, as JSON types."""

    @abc.abstractmethod
    def latent_block(self, settings: S) -> tuple[tuple[int, ...], Any]:
        """The shape (B, F, Z, Y, X) and dtype of a block of latents on disk."""

    @abc.abstractmethod
    def check_dit(self, files: tuple[Any, ...], settings: S) -> None:
        """Raises CheckpointError unless the files hold the transformer; reads headers only."""

    @abc.abstractmethod
    def load_dit(self, files: tuple[Any, ...], options: O, settings: S) -> Any:
        """The transformer with released weights."""

    @abc.abstractmethod
    def random_dit(self, options: O, settings: S) -> Any:
        """The transformer with random weights."""

    @abc.abstractmethod
    def play(self, run: Run[O, S], arm: Arm, xs: Iterator[Any]) -> Iterator[Played]:
        """Yields the frames of one arm, block by block; nothing is made before the first is wanted."""

    @abc.abstractmethod
    def blocks(self, run: Run[O, S]) -> Iterable[Any]:
        """One value for each block of the video."""

    @abc.abstractmethod
    def block_frames(self, settings: S) -> int:
        """Frames of the largest block."""

    @abc.abstractmethod
    def describe_cache(self, options: O, settings: S, arm: Arm) -> dict[str, Any]:
        """What the report says of an arm's cache."""

    @abc.abstractmethod
    def report(self, run: Run[O, S]) -> dict[str, Any]:
        """What the report says of the run beside what all models have in common."""

    def read_given(self, options: O, settings: S) -> Any:
        """Pictures of the user, read before time is spent on weights; None if there are none."""
        return None

    def encode_given(self, options: O, settings: S, given: Any, vae: Any) -> Any:
        """What `read_given` read, as the model uses it."""
        return given

    def given_frames(self, run: Run[O, S]) -> int:
        """Frames at the start of the video that the user gave."""
        return 0

    def encode_prompt(self, options: O, settings: S, parts: Parts | None) -> Any:
        """The embedding [1, rows, width] of the prompt, and what of it was cut off told in the log."""
        sizes = settings.sizes  # type: ignore[attr-defined]
        dit = sizes.dit
        if parts:
            text = embed_prompts([options.prompt or ""], parts, sizes.text, slots=dit.text_slots)
        else:
            size = dict(slots=dit.text_slots, width=dit.text_width, dtype=dit.dtype)
            text = stand_in_embedding(options.prompt or "", **size)
        for warning in text.said:
            log.warning(warning)
        return text.text_BUE


def prepare[O: LatentOptions, S](model: LatentModel[O, S], options: O) -> Job:
    """The job of a model and a user's options; nothing has been generated yet.

    Caches are made when the first block is.

    Raises:
        UserError: a value that is not accepted, named with what would be.
    """
    options, parts, settings, given, identity = _checked(model, options)
    sizes = settings.sizes
    shape, dtype = model.latent_block(settings)
    which = dict(resume=options.resume, restart=options.restart)
    saved = SavedLatents(options.out, identity, shape, dtype, **which)
    log.info("encoding the prompt" if parts else "random weights, and a stand-in for the prompt")
    prompt = model.encode_prompt(options, settings, parts)
    log.info("loading the transformer and the VAE")
    dit = (
        model.load_dit(parts.dit, options, settings)
        if parts
        else model.random_dit(options, settings)
    )
    vae = VAE_WEIGHTS.load(parts.vae, sizes.vae) if parts else VAE_WEIGHTS.random(sizes.vae)
    run = Run(
        options=options,
        settings=settings,
        parts=parts,
        saved=saved,
        dit=dit,
        vae=vae,
        prompt=prompt,
        given=model.encode_given(options, settings, given, vae),
    )
    arms = _arms(settings)
    tour = model.given_frames(run)
    frames = sizes.vae.video_frames(settings.frames) - tour
    common = {
        "prompt_embedding": "umT5" if parts else STAND_IN,
        "latent_frames": settings.frames,
        "tour_frames": tour,
        "frames": frames,
        **_caches(model, options, settings),
    }
    return Job(
        model=model.name,
        play=lambda arm, xs: model.play(run, arm, xs),
        arms=arms,
        blocks=(Block(x) for x in model.blocks(run)),
        cache=lambda cache: cache,
        tour=tour,
        frames=frames,
        block_frames=model.block_frames(settings),
        height=settings.height,
        width=settings.width,
        fps=model.fps,
        truth=False,
        finished=saved.finish,
        config=identity | common | model.report(run),
    )


def finished[O: LatentOptions, S](model: LatentModel[O, S], options: O) -> bool:
    """Whether `options.out` has the files of this very run, told without loading a network.

    Raises:
        UserError: as `prepare`.
    """
    options, _, settings, _, identity = _checked(model, options)
    # The latents tell whether the request is the same; the report, whether all of the video was made of them.
    saved = SavedLatents(options.out, identity, *model.latent_block(settings), resume=True)
    expected = _caches(model, options, settings) | {
        "latent_frames": settings.frames,
        "fps": model.fps if options.fps is None else options.fps,
    }
    return not saved.missing and has_report(options.out, model.name, settings.arms, expected)


class _Checked(NamedTuple):
    """A request whose every option was checked, and what was found on the way."""

    options: Any
    parts: Parts | None
    settings: Any
    given: Any
    identity: dict[str, Any]


def _checked(model: LatentModel, options: Any) -> _Checked:
    """Checks all options and the headers of all files; reads no tensor."""
    join_processes(options)
    plan_of(options, model.plans)
    options = dataclasses.replace(options, weights=_weights(model, options.weights))
    check_needed(model.name, options)
    random = options.weights == RANDOM
    parts = None if random else find_parts(
        options.weights or "", model.dit_names, config=model.config_folder
    )  # fmt: skip
    settings: Any = model.settle(options, parts)
    if parts:  # all files now: the last one is read when minutes have been spent on the others
        model.check_dit(parts.dit, settings)
        VAE_WEIGHTS.check(parts.vae, settings.sizes.vae)
        TEXT_WEIGHTS.check(parts.text, settings.sizes.text)
    given = model.read_given(options, settings)
    return _Checked(options, parts, settings, given, _identity(model, options, settings, parts))


def _arms(settings: Any) -> tuple[Arm, ...]:
    return tuple(Arm(name=name, state=settings.cache(name)) for name in settings.arms)


def _caches(model: LatentModel, options: Any, settings: Any) -> dict[str, Any]:
    """What the report says of the caches of all arms."""
    told = {arm.name: model.describe_cache(options, settings, arm) for arm in _arms(settings)}
    return {"caches": told}


def _weights(model: LatentModel, asked: str | None) -> str | None:
    """The folder of weights that a user means: a path, an address on a hub, or the fetched release."""
    if asked is None:
        folder = fetched(model.name)
        return None if folder is None else str(folder)
    if asked.startswith(PREFIX):
        return str(fetch_address(asked, model.needs, accept=ask))
    return asked


def _identity(
    model: LatentModel, options: LatentOptions, settings: Any, parts: Parts | None
) -> dict[str, Any]:
    """All that an arm's latents depend on; not the length, so that a video can be made longer."""
    return {
        "weights": parts.identity() if parts else RANDOM,
        "model": plain_config(settings.sizes.dit),
        "prompt": options.prompt,
        "seed": options.seed,
        "attention": options.attention,
        "precision": options.precision,
        "height": settings.height,
        "width": settings.width,
        **model.identity(options, settings),
    }
