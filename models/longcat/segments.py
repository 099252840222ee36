"""Long videos: clip after clip, each going on from the last frames of the one before.

The way from clip to clip leads through pixels: the last frames of the finished video, as bytes, are
encoded as a clip of their own, whose latents are the given frames of the next clip. No latent and
no cache is carried over.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from models.longcat.pipeline import LongCat, Prompt
from models.longcat.schedule import Schedule
from qvg_jax.cache.health import NonFiniteError, raise_if_not_finite

type SegmentProgress = Callable[[int, int], None]  # progress(segments_done, segments)


@runtime_checkable
class VideoVAE(Protocol):
    """What is asked of a VAE, a pytree: `models.wan_vae.WanVAE`, or another with its manners."""

    config: Any  # spatial_stride, temporal_stride, latent_channels

    def encode(self, video: Float[Array, "B T 3 Y X"]) -> Float[Array, "B F C H W"]:
        """Normalised latents of video in [-1, 1]."""

    def decode(self, latent: Float[Array, "B F C H W"]) -> Float[Array, "B T 3 Y X"]:
        """Video of normalised latents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
    """How clips overlap.

    Attributes:
        frames: video frames of a clip, given ones included.
        num_cond_frames: frames at the end of the video that the next clip goes on from: 13 in
            LongCat's demo, 73 in Quant VideoGen's runs.
        temporal_stride: video frames per latent frame after the first.

    Raises:
        ValueError: numbers of frames that are not whole latent frames, or nothing new per clip.

    Source: LongCat-Video (arXiv 2510.22200); Quant VideoGen (arXiv 2602.02958), released scripts.
    """

    frames: int = 93
    num_cond_frames: int = 73
    temporal_stride: int = 4

    def __post_init__(self):
        for name in ("frames", "num_cond_frames"):
            value = getattr(self, name)
            if value < 1 or (value - 1) % self.temporal_stride:
                raise ValueError(
                    f"{name}={value} is not accepted: a clip has 1 + {self.temporal_stride} k "
                    "frames"
                )
        if self.num_cond_frames >= self.frames:
            raise ValueError(
                f"num_cond_frames={self.num_cond_frames} must be less than frames={self.frames}"
            )

    @property
    def latent_frames(self) -> int:
        """Latent frames of a clip."""
        return 1 + (self.frames - 1) // self.temporal_stride

    @property
    def given_latents(self) -> int:
        """Latent frames of the given part."""
        return 1 + (self.num_cond_frames - 1) // self.temporal_stride

    @property
    def new_frames(self) -> int:
        """Video frames that each clip adds."""
        return self.frames - self.num_cond_frames

    def video_frames(self, segments: int) -> int:
        """Length of a video after a first clip and this many more."""
        return self.frames + segments * self.new_frames


class _Keys(NamedTuple):
    """The two streams of randomness of one segment; what one draws never moves the other."""

    noise: PRNGKeyArray
    codec: PRNGKeyArray


def segment_keys(key: PRNGKeyArray, segment: int) -> _Keys:
    """Keys of a segment; 0 is the first clip.

    The codec's k-means has a stream of its own, so runs with and without compression see the same
    noise in every segment (in the released code only in the first).
    """
    return _Keys(*jax.random.split(jax.random.fold_in(key, segment)))


def segment_noise(
    key: PRNGKeyArray, segment: int, shape: tuple[int, int, int, int, int]
) -> Float[Array, "B F Z Y X"]:
    """Float32 noise of all latent frames of a segment's clip, given ones included."""
    return jax.random.normal(segment_keys(key, segment).noise, shape, jnp.float32)


def to_bytes(video: Float[Array, "B T 3 Y X"]) -> UInt8[Array, "B T Y X 3"]:
    """Channels-last bytes of video in [-1, 1], cut off and not rounded, as released."""
    video = jnp.floor((jnp.clip(jnp.moveaxis(video, 2, -1), -1, 1) + 1) / 2 * 255)
    return video.astype(jnp.uint8)


def from_bytes(frames: UInt8[Array | np.ndarray, "B T Y X 3"]) -> Float[Array, "B T 3 Y X"]:
    """Video in [-1, 1], float32."""
    return jnp.moveaxis(jnp.asarray(frames, jnp.float32) / 127.5 - 1, -1, 2)


@jax.jit
def decode(vae: VideoVAE, latents_BFZYX: Float[Array, "B F Z Y X"]) -> UInt8[Array, "B T Y X 3"]:
    """The frames of a clip."""
    return to_bytes(vae.decode(latents_BFZYX))


@jax.jit
def encode(vae: VideoVAE, frames_BTYX3: UInt8[Array, "B T Y X 3"]) -> Float[Array, "B F Z Y X"]:
    """The latents of frames, taken as a clip of their own."""
    return vae.encode(from_bytes(frames_BTYX3))


def to_frames(
    vae: VideoVAE, latents_BFZYX: Float[Array | np.ndarray, "B F Z Y X"]
) -> UInt8[np.ndarray, "B T Y X 3"]:
    """`decode`, over the host: latents may lie on several devices, and the VAE on one.

    Raises:
        NonFiniteError: latents or frames have NaN or Inf; as bytes they would be a black picture.
    """
    latents_BFZYX = np.asarray(latents_BFZYX)
    raise_if_not_finite("latents of a clip", latents_BFZYX)
    frames, bad = _decode_counted(vae, latents_BFZYX)
    if int(bad):
        raise NonFiniteError(
            f"frames of a clip have {int(bad)} NaN or Inf values, and its latents are finite: look at "
            "the decoder"
        )
    return np.asarray(frames)


@jax.jit
def _decode_counted(vae, latents_BFZYX):
    video = vae.decode(latents_BFZYX)
    return to_bytes(video), (~jnp.isfinite(video)).sum(dtype=jnp.int32)


def next_clip(
    pipeline: LongCat,
    vae: VideoVAE,
    prompt: Prompt,
    tail_BTYX3: UInt8[np.ndarray, "B T Y X 3"],
    *,
    key: PRNGKeyArray,
    segment: int,
    segments: Segments,
    cached: bool = True,
    **options: Any,
) -> Float[np.ndarray, "B F Z Y X"]:
    """The latents of one segment's clip, given ones first.

    Args:
        pipeline, vae, prompt: the models; what to show.
        tail_BTYX3: the `num_cond_frames` frames to go on from.
        key: of the whole video.
        segment: its number; 0 is the first clip.
        segments: lengths.
        cached, **options: as for `LongCat.continue_video`.
    """
    given_BGZYX = np.asarray(encode(vae, jnp.asarray(tail_BTYX3)))
    shape = (len(given_BGZYX), segments.latent_frames, *given_BGZYX.shape[2:])
    # All frames are drawn, and those of the given ones are thrown away: as released.
    noise_BFZYX = segment_noise(key, segment, shape)[:, given_BGZYX.shape[1] :]
    options |= dict(cached=cached, key=segment_keys(key, segment).codec if cached else None)
    return np.asarray(pipeline.continue_video(prompt, given_BGZYX, noise_BFZYX, **options))


def first_clip(
    pipeline: LongCat,
    vae: VideoVAE,
    prompt: Prompt,
    *,
    key: PRNGKeyArray,
    height: int,
    width: int,
    videos: int = 1,
    segments: Segments | None = None,
    schedule: Schedule | None = None,
    guidance: float = 4.0,
) -> UInt8[np.ndarray, "B T Y X 3"]:
    """Segment 0: a clip from the prompt alone.

    Args:
        pipeline, vae: the models.
        prompt: what to show.
        key: of the whole video, the same as for `long_video`.
        height, width: size in pixels.
        videos: videos at once, B.
        segments: lengths; None is `Segments()`.
        schedule, guidance: as for `LongCat.text_to_video`.

    Raises:
        ValueError: a size that the VAE or the patch does not divide.
    """
    segments = Segments() if segments is None else segments
    side, channels = vae.config.spatial_stride, vae.config.latent_channels
    if height % side or width % side:
        raise ValueError(f"height x width {height} x {width} must be multiples of {side}")
    shape = (videos, segments.latent_frames, channels, height // side, width // side)
    noise = segment_noise(key, 0, shape)
    latents = pipeline.text_to_video(prompt, noise, schedule=schedule, guidance=guidance)
    return to_frames(vae, latents)


def long_video(
    pipeline: LongCat,
    vae: VideoVAE,
    prompts: Prompt | Sequence[Prompt],
    clip_BTYX3: UInt8[np.ndarray, "B T Y X 3"],
    *,
    key: PRNGKeyArray,
    count: int | None = None,
    segments: Segments | None = None,
    schedule: Schedule | None = None,
    guidance: float = 4.0,
    cached: bool = True,
    progress: SegmentProgress | None = None,
) -> Iterator[UInt8[np.ndarray, "B T Y X 3"]]:
    """Goes on from a clip, segment by segment; yields the new frames of each.

    Args:
        pipeline, vae: the models.
        prompts: one for all segments, or one for each.
        clip_BTYX3: frames to go on from, at least `num_cond_frames`: from `first_clip` or a file.
        key: of the whole video; noise and codecs draw from separate streams of it.
        count: segments; may be left out with one prompt for each.
        segments: lengths; None is `Segments()`, 73 given frames and 20 new ones.
        schedule, guidance, cached: as for `LongCat.continue_video`.
        progress: called as `progress(segments_done, segments)`.

    Yields:
        `segments.new_frames` frames for each segment, on the host.

    Raises:
        ValueError: before anything is computed: a clip of fewer frames than `num_cond_frames` or
            of a size that does not fit, a VAE of another stride, or prompts that do not match
            `count`.
    """
    segments = Segments() if segments is None else segments
    given = segments.num_cond_frames
    if clip_BTYX3.ndim != 5 or clip_BTYX3.shape[-1] != 3 or clip_BTYX3.dtype != np.uint8:
        raise ValueError(
            f"clip_BTYX3 is {clip_BTYX3.dtype} {clip_BTYX3.shape}; accepted: uint8 (B, T, Y, X, 3)"
        )
    if clip_BTYX3.shape[1] < given:
        raise ValueError(
            f"clip_BTYX3 has {clip_BTYX3.shape[1]} frames; a segment goes on from "
            f"num_cond_frames={given}"
        )
    stride, side = vae.config.temporal_stride, vae.config.spatial_stride
    if stride != segments.temporal_stride:
        raise ValueError(f"temporal_stride={segments.temporal_stride}; the VAE has {stride}")
    if any(n % side for n in clip_BTYX3.shape[2:4]):
        raise ValueError(f"height x width {clip_BTYX3.shape[2:4]} must be multiples of {side}")
    each = [prompts] * (count or 0) if isinstance(prompts, Prompt) else list(prompts)
    if not each or (count is not None and len(each) != count):
        raise ValueError(
            f"count={count} with {len(each)} prompts; accepted: one prompt and a count >= 1, or as "
            "many prompts as segments"
        )
    tail = np.asarray(clip_BTYX3[:, -given:])
    options = dict(schedule=schedule, guidance=guidance, cached=cached)
    return _segments(pipeline, vae, each, tail, key, segments, options, progress)


def _segments(pipeline, vae, prompts, tail_BTYX3, key, segments, options, progress):
    """The loop of `long_video`, apart from it so that bad arguments raise at the call."""
    for i, prompt in enumerate(prompts, start=1):  # segment 0 is the first clip
        where = dict(key=key, segment=i, segments=segments)
        frames_BTYX3 = to_frames(
            vae, next_clip(pipeline, vae, prompt, tail_BTYX3, **where, **options)
        )
        tail_BTYX3 = frames_BTYX3[:, -segments.num_cond_frames :]
        if progress is not None:
            progress(i, len(prompts))
        yield frames_BTYX3[:, segments.num_cond_frames :]
