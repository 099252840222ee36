"""What a user asked for, checked against the sizes of the networks before anything is loaded."""

import dataclasses
import logging

import jax

from models.runs.checkpoint_folder import Parts, Sizes, wanted_keys
from models.runs.request_checks import arm_names, check_seed, check_size, codec_pair, with_layers
from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from models.self_forcing.history import History, make_cache
from models.self_forcing.schedule import plan_blocks
from models.umt5.config import UMT5Config
from models.wan_vae.config import WanVAEConfig
from qvg_jax.app.job import Request
from qvg_jax.cache.operations import KVCache

FRAMES, HEIGHT, WIDTH = 21, 480, 832

log = logging.getLogger(__name__)


def released_sizes() -> Sizes:
    """Self-Forcing's 1.3B transformer, Wan2.1's VAE, umT5-XXL; all bfloat16."""
    return Sizes(
        dit=SelfForcingConfig.wan_1_3b(), vae=WanVAEConfig.wan_2_1(), text=UMT5Config.xxl()
    )


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
    check_size(height, width, side=sizes.vae.spatial_stride, patch=sizes.dit.patch)
    check_seed(request.seed)
    names = arm_names(request)
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
        size = ("num_layers", "dim", "num_heads", "ffn_dim", "in_dim", "out_dim", "freq_dim")
        wanted_keys(parts.config, *size, "text_len", "eps", folder=request.weights)
        dit = SelfForcingConfig.from_wan(parts.config, dtype=dit.dtype)
    return dataclasses.replace(released, dit=with_layers(dit, request))


def _sampler(steps: int | None) -> SamplerConfig:
    if steps is None:
        return SamplerConfig()
    top = SamplerConfig().train_steps
    return SamplerConfig(steps=tuple(top - i * top // steps for i in range(steps)))


def _history(recipe: str, request: Request) -> History:
    key_codec, value_codec = codec_pair(recipe)
    asked = dict(
        window_frames=request.window,
        sink_frames=request.sink,
        span_frames=request.span,
        keep_recent=request.recent,
    )
    bounds = {name: value for name, value in asked.items() if value is not None}
    return History(key_codec=key_codec, value_codec=value_codec, **bounds)
