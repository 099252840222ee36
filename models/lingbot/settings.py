"""What a user asked for, checked against the sizes of the networks before anything is loaded."""

import dataclasses
import logging

import numpy as np
from jaxtyping import Float

from models.lingbot.camera import CameraMaps, latent_poses, read_poses, steps_of
from models.lingbot.config import LingBotConfig, history, sampler
from models.lingbot.entry import Options
from models.runs.block_settings import BlockSettings
from models.runs.checkpoint_folder import Sizes
from models.runs.early_checks import codec_pair
from models.runs.request_checks import arm_names, check_seed, check_size, with_layers
from models.self_forcing.config import SamplerConfig
from models.self_forcing.history import History, make_cache
from models.self_forcing.schedule import plan_blocks
from models.umt5.config import UMT5Config
from models.wan_vae.config import WanVAEConfig
from models.worldplay.cameras import FOCAL, IMAGE, parse_actions, walk
from qvg_jax.errors import UserError, told_to_user

VERSION = 2
FRAMES = 244  # of the published walk, 973 video frames
_FOCAL = FOCAL * 832 / IMAGE[0]
INTRINSICS_33 = np.array([[_FOCAL, 0, 416], [0, _FOCAL, 240], [0, 0, 1]])  # WorldPlay's view

log = logging.getLogger(__name__)


def released_sizes() -> Sizes:
    """The 14B transformer of version 2, Wan2.1's VAE, umT5-XXL; all bfloat16."""
    return Sizes(
        dit=LingBotConfig.world_14b(VERSION), vae=WanVAEConfig.wan_2_1(), text=UMT5Config.xxl()
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BlockSettings):
    """The options of a user without choices left; see `BlockSettings`.

    Attributes:
        motion_F44: the motion of the camera into each latent frame. Its scale is that of the whole
            walk, so that a longer video of the same walk begins with the same frames.
    """

    make_cache = staticmethod(make_cache)
    motion_F44: Float[np.ndarray, "F 4 4"]

    @property
    def frames(self) -> int:
        """Latent frames of the video."""
        return len(self.motion_F44)

    @property
    def camera(self) -> CameraMaps:
        """The camera maps of the walk."""
        fold = self.sizes.dit.fold
        return CameraMaps(self.motion_F44, INTRINSICS_33, self.height, self.width, fold)


@told_to_user()
def settle(options: Options, released: Sizes) -> Settings:
    """Checks the options of a user and fills in what they leave open.

    Args:
        options: what is wanted; without actions straight ahead, as far as `frames`.
        released: sizes of the networks, the layers before `--layers`.

    Raises:
        UserError: a value that is not accepted, named with what would be.
    """
    sizes = dataclasses.replace(released, dit=with_layers(released.dit, options))
    height, width = options.height, options.width
    check_size(height, width, side=sizes.vae.spatial_stride, patch=sizes.dit.patch)
    check_seed(options.seed)
    settings = Settings(
        sizes=sizes,
        sampler=_sampler(options.steps),
        histories={name: _history(name) for name in arm_names(options)},
        motion_F44=_motion(options, sizes.dit),
        height=height,
        width=width,
    )
    for name, kept in settings.histories.items():
        if kept.compressed and not settings.cache(name).layout.max_spans:
            log.warning(
                f"{name}: {settings.frames} latent frames are too few to compress any: the first "
                f"{kept.sink_frames} and the newest {kept.keep_recent} are not, and the newest block "
                "waits outside"
            )
    return settings


def _motion(options: Options, config: LingBotConfig) -> Float[np.ndarray, "F 4 4"]:
    """Motions of the frames that are wanted, whole blocks."""
    n = config.frames_per_block
    if options.poses is None:
        ahead = f"w-{options.frames or FRAMES}"
        poses = walk(parse_actions(ahead if options.actions is None else options.actions))
    else:
        poses = latent_poses(read_poses(options.poses), n)
    motion = steps_of(poses)
    frames = max(len(motion) // n * n, n) if options.frames is None else options.frames
    plan_blocks(config, frames)
    if frames > len(motion):
        raise UserError(
            f"frames={frames} is more than the {len(motion)} cameras of the walk, one of them at the "
            "start; walk on, or ask for fewer"
        )
    if (options.actions is not None or options.poses is not None) and (
        left := len(motion) - frames
    ):
        said = log.info if options.frames is None else log.warning
        said(f"{frames} latent frames; the last {left} cameras of the walk are not used")
    return motion[:frames]


def _sampler(steps: int | None) -> SamplerConfig:
    """As released, or with other steps spread evenly over the ladder."""
    released = sampler(VERSION)
    if steps is None:
        return released
    top = released.train_steps
    return dataclasses.replace(released, steps=tuple(top - i * top // steps for i in range(steps)))


def _history(recipe: str) -> History:
    """The launch's sink, window and spans, with a codec of the user's."""
    key_codec, value_codec = codec_pair(recipe)
    kept = history(VERSION, compressed=key_codec is not None)
    return dataclasses.replace(kept, key_codec=key_codec, value_codec=value_codec)
