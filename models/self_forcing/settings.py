"""What a user asked for, checked against the sizes of the networks before anything is loaded."""

import dataclasses
import logging

from models.runs.block_settings import BlockSettings
from models.runs.checkpoint_folder import Parts, Sizes, named_config, wanted_keys
from models.runs.devices import check_blocks, check_sharing, plan_of
from models.runs.early_checks import codec_pair
from models.runs.head_lists import history_of
from models.runs.request_checks import arm_names, check_seed, check_size, with_layers
from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from models.self_forcing.entry import FRAMES, NAME, Options
from models.self_forcing.history import History, make_cache
from models.self_forcing.releases import RELEASES, Release
from models.self_forcing.schedule import plan_blocks
from models.umt5.config import UMT5Config
from models.wan_vae.config import WanVAEConfig
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.cache.plan import Plan
from qvg_jax.errors import UserError, told_to_user

PLANS = ("spans", "heads", "ring")
LOCAL_FRAMES = 4  # newest latent frames that a local head reads where no list says it

log = logging.getLogger(__name__)


def released_sizes() -> Sizes:
    """Self-Forcing's 1.3B transformer, Wan2.1's VAE, umT5-XXL; all bfloat16."""
    return Sizes(
        dit=SelfForcingConfig.wan_1_3b(), vae=WanVAEConfig.wan_2_1(), text=UMT5Config.xxl()
    )


def sizes_of(release: Release, sizes: Sizes) -> Sizes:
    """The sizes of a release; `sizes` are those of Self-Forcing, of which it has most."""
    dit = SelfForcingConfig.wan_14b(dtype=sizes.dit.dtype) if release.size == "14B" else sizes.dit
    blocks = dataclasses.replace(dit, frames_per_block=release.frames_per_block)
    return dataclasses.replace(sizes, dit=blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BlockSettings):
    """The options of a user without choices left; see `BlockSettings`.

    Attributes:
        frames: latent frames of the whole video.
    """

    make_cache = staticmethod(make_cache)
    frames: int

    def block_tokens(self, *, first_frame_alone: bool = False) -> set[int]:
        """The numbers of tokens that the blocks of the video have."""
        rows, columns = self.sizes.dit.grid(*self.latent)
        blocks = plan_blocks(self.sizes.dit, self.frames, first_frame_alone=first_frame_alone)
        return {block.frames * rows * columns for block in blocks}


@told_to_user()
def settle(
    options: Options,
    sizes: Sizes,
    *,
    first_frame_alone: bool = False,
    release: Release = RELEASES[NAME],
) -> Settings:
    """Checks the options of a user and fills in what they leave open.

    Args:
        options: what is wanted.
        sizes: of the networks.
        first_frame_alone: whether the video begins with an image.
        release: whose steps and memory are the defaults.

    Raises:
        UserError: a value that is not accepted, named with what would be.
    """
    frames = FRAMES + first_frame_alone if options.frames is None else options.frames
    sizes = _with_horizon(options, sizes)
    plan_blocks(sizes.dit, frames, first_frame_alone=first_frame_alone)
    height = options.height
    width = options.width
    check_size(height, width, side=sizes.vae.spatial_stride, patch=sizes.dit.patch)
    check_seed(options.seed)
    names = arm_names(options)
    plan = plan_of(options, PLANS)
    heads = history_of(
        options.heads,
        layers=sizes.dit.layers,
        count=sizes.dit.heads,
        local=options.local,
        usual=LOCAL_FRAMES,
    )
    if heads is not None:  # no run takes frames back, which a window of their own could not do
        heads = dataclasses.replace(heads, own_window=True)
    _check_heads(options, heads, plan)
    check_sharing(options.share_weights, plan)
    settings = Settings(
        sizes=sizes,
        sampler=_sampler(options.steps, release),
        histories={
            name: dataclasses.replace(_history(name, options, release, heads, sizes), plan=plan)
            for name in names
        },
        frames=frames,
        height=height,
        width=width,
    )
    for name in names:
        history, cache = settings.histories[name], settings.cache(name)
        check_blocks(cache, plan, settings.block_tokens(first_frame_alone=first_frame_alone))
        lay = cache.layout
        if history.compressed and not lay.max_spans:
            log.warning(
                f"{name}: {frames} latent frames are too few to compress any: a span is "
                f"{history.span_frames} frames, and the newest block waits outside"
            )
    return settings


def _with_horizon(options: Options, sizes: Sizes) -> Sizes:
    """The sizes with the horizon that a user asked for, and a word on what it does to a long video."""
    dit, frames = sizes.dit, options.frames or 0
    if not options.endless:
        if options.horizon is not None:
            raise UserError(
                f"horizon={options.horizon} needs --endless: nothing counts back without"
            )
        if frames > dit.rope_frames:
            raise UserError(
                f"frames={frames} is more than rope_frames={dit.rope_frames}, the rows of the model's "
                "RoPE table; accepted: at most that, or --endless, which counts positions back from "
                "each block"
            )
        return sizes
    horizon = dit.last_horizon if options.horizon is None else options.horizon
    if frames > horizon:
        flat = (
            "" if options.window else "; the memory grows with them, and a --window keeps it flat"
        )
        log.warning(
            f"{frames} latent frames: positions count back from each block, and history older than "
            f"{horizon} latent frames is read as {horizon} old{flat}"
        )
    return dataclasses.replace(sizes, dit=dataclasses.replace(dit, horizon=horizon))


@told_to_user()
def chosen_sizes(options: Options, parts: Parts | None, released: Sizes) -> Sizes:
    """The released sizes, changed by a folder's config.json or by `--layers`.

    Raises:
        UserError: a config.json of another kind, or `--layers` beside weights.
    """
    dit = released.dit
    if parts and parts.config:
        size = ("num_layers", "dim", "num_heads", "ffn_dim", "in_dim", "out_dim", "freq_dim")
        wanted_keys(parts.config, *size, "text_len", "eps", folder=options.weights)
        with named_config(options.weights):
            dit = SelfForcingConfig.from_wan(
                parts.config, frames_per_block=dit.frames_per_block, dtype=dit.dtype
            )
    return dataclasses.replace(released, dit=with_layers(dit, options))


def _sampler(steps: int | None, release: Release) -> SamplerConfig:
    if steps is None:
        return SamplerConfig(**dict(release.sampler))
    top = SamplerConfig().train_steps
    if not 1 <= steps <= top:
        raise UserError(f"steps={steps} is not accepted: give 1 to {top}")
    return SamplerConfig(steps=tuple(top - i * top // steps for i in range(steps)))


def _check_heads(options: Options, heads: HeadHistory | None, plan: Plan | None) -> None:
    """Raises UserError if there are no local heads, and options about them; or devices that cannot have them."""
    if heads is None and options.local is not None:
        raise UserError(f"local={options.local} with --heads all: no head is local; leave it out")
    if heads is not None and plan is not None and plan.axis != "spans":
        raise UserError(
            f"--heads and --plan {plan.axis} do not go together, as layers differ in the heads that they "
            "store; accepted: --plan spans, or --heads all"
        )


def _history(
    recipe: str, options: Options, release: Release, heads: HeadHistory | None, sizes: Sizes
) -> History:
    key_codec, value_codec = codec_pair(recipe)
    own = dict(
        window_frames=release.window_frames,
        sink_frames=release.sink_frames,
        span_frames=release.span_frames,
        sink_average=release.sink_average,
    )
    asked = dict(
        window_frames=options.window,
        sink_frames=options.sink,
        span_frames=options.span,
        keep_recent=options.recent,
    )
    if heads is not None and key_codec is not None:
        own |= dict(sink_frames=release.sink_frames or sizes.dit.frames_per_block, heads=heads)
    bounds = {
        name: value for given in (own, asked) for name, value in given.items() if value is not None
    }
    return History(key_codec=key_codec, value_codec=value_codec, **bounds)
