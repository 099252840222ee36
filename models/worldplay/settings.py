"""What a user asked for, checked against the sizes of the networks before anything is loaded."""

import dataclasses
import logging

from models.runs.block_settings import BlockSettings
from models.runs.checkpoint_folder import Sizes
from models.runs.devices import check_blocks, check_sharing, plan_of
from models.runs.early_checks import codec_pair
from models.runs.request_checks import arm_names, check_seed, check_size, with_layers
from models.umt5.config import UMT5Config
from models.wan_vae.config import WanVAEConfig
from models.worldplay.cameras import CameraPath
from models.worldplay.config import SamplerConfig, WorldPlayConfig
from models.worldplay.early_checks import without_storage
from models.worldplay.entry import Options
from models.worldplay.history import History, make_cache
from models.worldplay.schedule import count_blocks
from qvg_jax.errors import UserError, told_to_user

ACTIONS = "w-8,s-8,a-8,d-8,up-8,down-8"  # of the published runs
PLANS = ("spans", "heads", "ring")
SHIFT = 8  # which gives the released timesteps at four steps

log = logging.getLogger(__name__)


def released_sizes() -> Sizes:
    """WorldPlay's 5B transformer, Wan2.2's VAE, umT5-XXL; all bfloat16."""
    return Sizes(dit=WorldPlayConfig.wan_5b(), vae=WanVAEConfig.wan_2_2(), text=UMT5Config.xxl())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BlockSettings):
    """The options of a user without choices left; see `BlockSettings`.

    Attributes:
        path: cameras and actions, one for each latent frame.
    """

    make_cache = staticmethod(make_cache)
    path: CameraPath

    @property
    def frames(self) -> int:
        """Latent frames of the video."""
        return len(self.path)


@told_to_user()
def settle(options: Options, released: Sizes) -> Settings:
    """Checks the options of a user and fills in what they leave open.

    Args:
        options: what is wanted; without actions the published walk, or as far ahead as `frames`.
        released: sizes of the networks, the layers before `--layers`.

    Raises:
        UserError: a value that is not accepted, named with what would be.
    """
    sizes = dataclasses.replace(released, dit=with_layers(released.dit, options))
    height = options.height
    width = options.width
    check_size(height, width, side=sizes.vae.spatial_stride, patch=sizes.dit.patch)
    check_seed(options.seed)
    plan = plan_of(options, PLANS)
    check_sharing(options.share_weights, plan)
    if options.recall is not None and plan is not None:
        raise UserError(
            f"recall={options.recall} and --devices {plan.devices}: spans are recalled on one device; "
            "accepted: one of the two"
        )
    settings = Settings(
        sizes=sizes,
        sampler=_sampler(options.steps),
        histories={
            name: dataclasses.replace(_history(name, options.recall), plan=plan)
            for name in arm_names(options)
        },
        path=_path(options, sizes.dit),
        height=height,
        width=width,
    )
    for name, history in settings.histories.items():
        cache = settings.cache(name)
        check_blocks(cache, plan, {cache.layout.block_tokens})
        if history.compressed and not cache.layout.max_spans:
            log.warning(
                f"{name}: {settings.frames} latent frames are too few to compress any: a span is "
                f"{history.span_blocks} blocks, and the newest block is never remembered"
            )
    return settings


def _path(options: Options, config: WorldPlayConfig) -> CameraPath:
    """Cameras of the frames that are wanted: whole blocks, within the RoPE table."""
    ahead = ACTIONS if options.frames is None else f"w-{options.frames}"
    path = CameraPath.from_string(ahead if options.actions is None else options.actions)
    n, room = config.frames_per_block, config.rope_frames
    frames = max(len(path) // n * n, n) if options.frames is None else options.frames
    count_blocks(config, frames)
    if frames > room and options.recall is None:
        raise UserError(
            f"frames={frames} leaves the RoPE table of {room} frames: positions beyond it were "
            f"never defined; accepted: at most {room // n * n}, or --recall with the spans that a block reads"
        )
    if frames > len(path):
        raise UserError(
            f"frames={frames} is more than the {len(path)} cameras of the walk: the actions have "
            f"{len(path) - 1} steps, and the first frame needs none; walk on, or ask for fewer"
        )
    if options.actions is not None and (left := len(path) - frames):
        said = log.info if options.frames is None else log.warning
        said(f"{frames} latent frames; the last {left} cameras of the walk are not used")
    return CameraPath(path.c2w_F44[:frames], path.intrinsics_F33[:frames], path.actions_F[:frames])


def _sampler(steps: int | None) -> SamplerConfig:
    """As released, or with other steps along the same curve."""
    if steps is None:
        return SamplerConfig()
    levels = [1 - i / steps for i in range(steps)]
    return SamplerConfig(steps=tuple(1000 * SHIFT * s / (1 + (SHIFT - 1) * s) for s in levels))


def _history(recipe: str, sight: int | None) -> History:
    """A codec and, as one of its settings, `storage=packed` or `storage=single`; and spans in sight."""
    kept, storage = without_storage(recipe)
    key_codec, value_codec = codec_pair(kept)
    if sight is not None and storage == "packed":
        raise UserError(
            f"recall={sight} needs one k and v of each token, and {recipe} keeps packed ones, which are "
            f"rotated already; accepted: {recipe.replace(':storage=packed', '')}:storage=single"
        )
    return History(key_codec=key_codec, value_codec=value_codec, storage=storage, sight=sight)
