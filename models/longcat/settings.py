"""What a user asked for, checked against the sizes of the networks before anything is loaded."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp

from models.longcat.condition import build_condition
from models.longcat.config import LongCatConfig
from models.longcat.entry import Options
from models.longcat.params import skeleton
from models.longcat.schedule import Schedule, continuation, distilled, standard
from models.longcat.segments import Segments
from models.runs.checkpoint_folder import Parts, Sizes, named_config
from models.runs.early_checks import codec_pair
from models.runs.request_checks import arm_names, check_seed, check_size, with_layers
from models.umt5.config import UMT5Config
from models.wan_vae.config import WanVAEConfig
from qvg_jax.app.memory_plan import shape_bytes
from qvg_jax.cache.health import CacheBytes, Regions
from qvg_jax.cache.operations import KVCache
from qvg_jax.codecs.base import Codec
from qvg_jax.errors import UserError, told_to_user

TEXT_SLOTS = 512  # rows of a prompt, padding included, which this model does not cut off
GUIDANCE = 4.0

log = logging.getLogger(__name__)


def released_sizes() -> Sizes:
    """LongCat-Video's 13.6B transformer, Wan2.1's VAE, umT5-XXL; all bfloat16."""
    return Sizes(
        dit=LongCatConfig.longcat_video(), vae=WanVAEConfig.wan_2_1(), text=UMT5Config.xxl()
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a user without choices left.

    Attributes:
        sizes: of the networks.
        codecs: of K and V of each arm, by its name; bf16 first.
        segments: how clips overlap.
        continued: whether the video begins with given frames, and not with a clip of its own.
        count: segments after its beginning.
        first, next: noise levels of the first clip and of all others.
        guidance: strength of guidance; 1 is none.
        height, width: of the video, in pixels.
    """

    sizes: Sizes
    codecs: dict[str, tuple[Codec | None, Codec | None]]
    segments: Segments
    continued: bool
    count: int
    first: Schedule
    next: Schedule
    guidance: float
    height: int
    width: int

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, bf16 first."""
        return tuple(self.codecs)

    @property
    def frames(self) -> int:
        """Latent frames of the whole video, as if it were encoded in one piece."""
        return _beginning(self.segments, self.continued) + self.count * _added(self.segments)

    @property
    def clip(self) -> tuple[int, int, int, int, int]:
        """(B, F, Z, Y, X) of a clip's latents."""
        side, channels = self.sizes.vae.spatial_stride, self.sizes.dit.latent_channels
        rows, columns = self.height // side, self.width // side
        return 1, self.segments.latent_frames, channels, rows, columns

    def cache(self, arm: str) -> KVCache:
        """An arm's condition cache, shapes only."""
        B, _, *frame = self.clip
        given = jax.ShapeDtypeStruct((B, self.segments.given_latents, *frame), jnp.float32)
        key_codec, value_codec = self.codecs[arm]
        build = functools.partial(build_condition, key_codec=key_codec, value_codec=value_codec)
        return jax.eval_shape(build, skeleton(self.sizes.dit), given)


@told_to_user()
def settle(options: Options, sizes: Sizes) -> Settings:
    """Checks the options of a user and fills in what they leave open.

    Args:
        options: what is wanted; without `frames`, the beginning and one segment.
        sizes: of the networks.

    Raises:
        UserError: a value that is not accepted, named with what would be.
    """
    vae, dit = sizes.vae, sizes.dit
    lengths = dict(temporal_stride=vae.temporal_stride)
    if options.cond_frames is not None:
        lengths |= dict(num_cond_frames=options.cond_frames)
    segments, continued = Segments(**lengths), bool(options.video)
    begin, more = _beginning(segments, continued), _added(segments)
    frames = begin + more if options.frames is None else options.frames
    count, rest = divmod(frames - begin, more)
    if rest or count < continued:
        k = max(count, int(continued))
        nearest = f"{begin + k * more} and {begin + (k + 1) * more}"
        raise UserError(
            f"frames={frames} is not accepted: {begin} latent frames begin the video and each "
            f"segment adds {more}; the nearest are {nearest}"
        )
    height = options.height
    width = options.width
    check_size(height, width, side=vae.spatial_stride, patch=dit.patch)
    check_seed(options.seed)
    given = {} if options.steps is None else {"steps": options.steps}
    if options.lora:
        first = after = distilled(**given)
    else:
        first, after = standard(**given), continuation(**given)
    settings = Settings(
        sizes=sizes,
        codecs={name: codec_pair(name) for name in arm_names(options)},
        segments=segments,
        continued=continued,
        count=count,
        first=first,
        next=after,
        guidance=1.0 if options.lora else GUIDANCE,
        height=height,
        width=width,
    )
    for name in settings.codecs:
        settings.cache(name)  # a codec that refuses the span says so now
    if not count:
        log.warning(f"{frames} latent frames are one clip: nothing is remembered or compressed")
    return settings


@told_to_user()
def chosen_sizes(options: Options, parts: Parts | None, released: Sizes) -> Sizes:
    """The released sizes, changed by the transformer's config.json or by `--layers`.

    Raises:
        UserError: a config.json of another kind, or `--layers` beside weights.
    """
    dit = released.dit
    if parts and parts.config:
        with named_config(options.weights):
            dit = LongCatConfig.from_json(parts.config, dtype=dit.dtype)
            if dit.tiles is not None:
                raise UserError(
                    "enable_bsa=True is not accepted for videos from segments, which read a compressed cache: "
                    "block-sparse attention belongs to the refinement at 720p; accepted: false"
                )
    return dataclasses.replace(released, dit=with_layers(dit, options))


def condition_bytes(cache: KVCache) -> CacheBytes:
    """`qvg_jax.cache_bytes` of a condition cache, from its shapes: it is always full."""
    lay = cache.layout
    scalars = [x for x in jax.tree.leaves(cache) if not x.shape]
    pos, state = shape_bytes([cache.span_pos, scalars]), shape_bytes((cache.state_k, cache.state_v))
    spans = shape_bytes((cache.span_k, cache.span_v))
    regions = Regions(sink=0, spans=spans, window=0, warm_start=state, positions=pos)
    dense = shape_bytes((cache.dense_k, cache.dense_v))
    return CacheBytes(
        allocated=regions._replace(window=dense, positions=pos + shape_bytes(cache.dense_pos)),
        in_use=regions,
        bf16=4 * lay.layers * lay.batch * lay.heads * lay.head_dim * lay.span_tokens,
        tokens=lay.span_tokens,
    )


def _beginning(segments: Segments, continued: bool) -> int:
    return segments.given_latents if continued else segments.latent_frames


def _added(segments: Segments) -> int:
    return segments.latent_frames - segments.given_latents
