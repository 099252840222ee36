"""What a user asked for, checked against the sizes of the networks before anything is loaded."""

import dataclasses
import logging

import jax

from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from models.self_forcing.history import History, make_cache
from models.self_forcing.parts import Parts, Sizes
from models.self_forcing.schedule import plan_blocks
from qvg_jax import presets
from qvg_jax.cache import KVCache
from qvg_jax.compare import BASELINE, Request
from qvg_jax.recipes import parse_recipe

FRAMES, HEIGHT, WIDTH = 21, 480, 832
LARGEST_SEED = 2**31 - 1

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A request without choices left.

    Attributes:
        sizes: of the networks.
        sampler: the few-step schedule.
        histories: what each arm remembers, by the name of the arm; bf16 first.
        frames: latent frames of the whole video.
        height, width: of the video, in pixels.
    """

    sizes: Sizes
    sampler: SamplerConfig
    histories: dict[str, History]
    frames: int
    height: int
    width: int

    @property
    def latent(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        side = self.sizes.vae.spatial_stride
        return self.height // side, self.width // side

    def cache(self, arm: str, frames: int | None = None) -> KVCache:
        """An arm's cache, shapes only; for another number of frames if given."""

        def make():
            return make_cache(
                self.sizes.dit,
                self.histories[arm],
                frames=self.frames if frames is None else frames,
                latent_height=self.latent[0],
                latent_width=self.latent[1],
            )

        return jax.eval_shape(make)


def settle(request: Request, sizes: Sizes, *, first_frame_alone: bool = False) -> Settings:
    """Checks a request and fills in what it leaves open.

    Args:
        request: what is wanted.
        sizes: of the networks.
        first_frame_alone: whether the video begins with an image.

    Raises:
        ValueError: a value that is not accepted, named with what would be.
    """
    frames = FRAMES + first_frame_alone if request.frames is None else request.frames
    plan_blocks(sizes.dit, frames, first_frame_alone=first_frame_alone)
    height = HEIGHT if request.height is None else request.height
    width = WIDTH if request.width is None else request.width
    side = sizes.vae.spatial_stride
    patches = dict(zip(("height", "width"), sizes.dit.patch, strict=True))
    for (name, patch), value in zip(patches.items(), (height, width), strict=True):
        if value < 1 or value % (side * patch):
            raise ValueError(
                f"{name}={value} is not accepted: give a multiple of {side * patch}, for a latent "
                f"is {side} pixels and a token {patch} latents"
            )
    if not 0 <= request.seed <= LARGEST_SEED:
        raise ValueError(f"seed={request.seed} is not accepted: give 0 to {LARGEST_SEED}")
    names = sorted(dict.fromkeys(request.codecs), key=lambda name: name != BASELINE)  # stable
    settings = Settings(
        sizes=sizes,
        sampler=_sampler(request.steps),
        histories={name: _history(name, request) for name in names},
        frames=frames,
        height=height,
        width=width,
    )
    for name in names:
        history, lay = settings.histories[name], settings.cache(name).layout
        if history.compressed and not lay.max_spans:
            log.warning(
                f"{name}: {frames} latent frames are too few to compress any: a span is "
                f"{history.span_frames} frames, and the newest block waits outside"
            )
    return settings


def chosen_sizes(request: Request, parts: Parts | None, released: Sizes) -> Sizes:
    """The released sizes, changed by a folder's config.json or by `--layers`.

    Raises:
        ValueError: a config.json of another kind, or `--layers` beside weights.
    """
    dit = released.dit
    if parts and parts.config:
        wanted = {"num_layers", "dim", "num_heads", "ffn_dim", "in_dim", "out_dim", "freq_dim"}
        if lacking := sorted((wanted | {"text_len", "eps"}) - parts.config.keys()):
            raise ValueError(f"config.json in {request.weights} lacks {', '.join(lacking)}")
        dit = SelfForcingConfig.from_wan(parts.config, dtype=dit.dtype)
    if request.layers is not None:
        if parts:
            raise ValueError("--layers is for random weights; leave it out")
        dit = dataclasses.replace(dit, layers=request.layers)
    return dataclasses.replace(released, dit=dit)


def _sampler(steps: int | None) -> SamplerConfig:
    if steps is None:
        return SamplerConfig()
    top = SamplerConfig().train_steps
    return SamplerConfig(steps=tuple(top - i * top // steps for i in range(steps)))


def _history(recipe: str, request: Request) -> History:
    name, settings = parse_recipe(recipe)
    key_codec, value_codec = presets.pair(name, **settings)
    bounds = dict(window_frames=request.window, sink_frames=request.sink or 0)
    if recipe == BASELINE:
        return History(**bounds)
    return History(key_codec=key_codec, value_codec=value_codec, **bounds)
