"""The causal video VAEs of Wan2.1 and Wan2.2, as a stream.

The first latent frame stands for one video frame, each later one for `temporal_stride` (4) frames.
Every layer is causal in time and hands on the last frames it read, its *past* (see `layers`), so
the network runs on one latent frame at a time: one compiled step for the first frame and one for
all later ones, in constant memory for any length.

Legend: B batch, F latent frames, T video or feature frames, H rows, W columns (Y, X for pixels
where both occur), C channels. Public arrays are `[B, F, C, H, W]`, features channels-last.

Source: Wan technical report (arXiv 2503.20314), section 4.1; Wan2.2's released code
(`wan/modules/vae2_2.py`); released parameters.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from models.wan_vae.config import WanVAEConfig
from models.wan_vae.layers import (
    Attention,
    CausalConv,
    Downsample,
    Features,
    Head,
    Past,
    Residual,
    Upsample,
    pointwise,
    run,
    run_by_frame,
)
from models.wan_vae.levels import DownLevel, UpLevel, patchify, unpatchify


class Encoder(nnx.Module):
    """Video frames to mean and log-variance of the raw latents, fine to coarse."""

    def __init__(self, config: WanVAEConfig, rngs: nnx.Rngs):
        self.by_frame = config.by_frame
        widths = [config.width * m for m in (1, *config.multipliers)]
        self.conv_in = CausalConv(config.pixel_channels, widths[0], config, rngs)
        self.downsamples = nnx.List()
        for i, (c, c_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers = _residuals(config.res_blocks, c, c_out, config, rngs)
            halves = i < len(config.temporal)
            if halves:
                layers.append(Downsample(c_out, config.temporal[i], config, rngs))
            if config.shortcuts:
                layers = [DownLevel(layers, c, c_out, halves and config.temporal[i], halves)]
            self.downsamples.extend(layers)
        self.middle = _middle(widths[-1], config, rngs)
        self.head = Head(widths[-1], 2 * config.latent_channels, config, rngs)

    def __call__(self, x_BTHWC: Features, past: Past | None) -> tuple[Features, Past]:
        layers = [self.conv_in, *self.downsamples, *self.middle, self.head]
        return (run_by_frame if self.by_frame else run)(layers, x_BTHWC, past)


class Decoder(nnx.Module):
    """Raw latents to video frames, coarse to fine."""

    def __init__(self, config: WanVAEConfig, rngs: nnx.Rngs):
        self.by_frame = config.by_frame
        finest = config.decoder_width or config.width
        widths = [finest * m for m in (config.multipliers[-1], *config.multipliers[::-1])]
        self.conv_in = CausalConv(config.latent_channels, widths[0], config, rngs)
        self.middle = _middle(widths[0], config, rngs)
        self.upsamples = nnx.List()
        for i, (c, c_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            if i and not config.shortcuts:
                c = c // 2  # by the Upsample before
            layers = _residuals(config.res_blocks + 1, c, c_out, config, rngs)
            doubles = i < len(config.temporal)
            if doubles:
                temporal, up = config.temporal[::-1][i], c_out if config.shortcuts else c_out // 2
                layers.append(Upsample(c_out, up, temporal, config, rngs))
            if config.shortcuts:
                layers = [UpLevel(layers, c, c_out, temporal) if doubles else UpLevel(layers)]
            self.upsamples.extend(layers)
        self.head = Head(widths[-1], config.pixel_channels, config, rngs)

    def __call__(self, x_BTHWC: Features, past: Past | None) -> tuple[Features, Past]:
        layers = [self.conv_in, *self.middle, *self.upsamples, self.head]
        return (run_by_frame if self.by_frame else run)(layers, x_BTHWC, past)


class WanVAE(nnx.Module):
    """Encoder and decoder between video in [-1, 1] and normalised latents.

    `encode` and `decode` take whole videos. `encode_stream` and `decode_stream` take them in
    pieces, with the past that the previous piece returned; the pieces' results, put together, are
    those of the whole. All four jit, and hold the features of one latent frame at a time.
    """

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config, rngs)
        self.conv_mean_logvar = pointwise(2 * z, 2 * z, config, rngs)
        self.conv_latent = pointwise(z, z, config, rngs)
        self.decoder = Decoder(config, rngs)

    def denormalize(self, latent: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        """Raw latents `latent / (1 / std) + mean`.

        1 / std is rounded to the compute dtype before the division: in bfloat16 the released model
        was run so.
        """
        mean, inverse_std = self.statistics()
        return latent.astype(self.config.dtype) / inverse_std + mean

    def statistics(self) -> tuple[Array, Array]:
        """Mean and 1 / std of the raw latents, `[1, 1, 1, 1, C]`, rounded to the compute dtype."""
        std, mean = (jnp.asarray(x, self.config.dtype) for x in (self.config.std, self.config.mean))
        return mean.reshape(1, 1, 1, 1, -1), (1 / std).reshape(1, 1, 1, 1, -1)

    def decode_stream(
        self, latent: Float[Array, "B F C H W"], past: Past | None = None
    ) -> tuple[Float[Array, "B T 3 Y X"], Past]:
        """Decodes the next latent frames of a video.

        Args:
            latent: normalised latents, F >= 1 frames.
            past: what the previous call returned; None at the start of a video.

        Returns:
            float32 video in [-1, 1] and the new past. T = `temporal_stride` * F, or at the start
            1 + `temporal_stride` * (F - 1); Y, X = `spatial_stride` * H, W.

        Raises:
            ValueError: no frames, or a wrong number of channels.
        """
        video, past = self.decode_raw_stream(latent, past)
        return jnp.clip(video, -1, 1), past

    def decode_raw_stream(
        self, latent: Float[Array, "B F C H W"], past: Past | None = None
    ) -> tuple[Float[Array, "B T 3 Y X"], Past]:
        """`decode_stream` before the clip to [-1, 1]."""
        if latent.shape[1] < 1 or latent.shape[2] != self.config.latent_channels:
            raise ValueError(
                f"{latent.shape=}; accepted: [B, F >= 1, {self.config.latent_channels}, H, W]"
            )

        def step(past, latent_BCHW):
            x_BFHWC = self.denormalize(jnp.moveaxis(latent_BCHW, 1, -1)[:, None])
            y_BTHWC, past = self.decoder(self.conv_latent(x_BFHWC), past)
            y_BTHWC = unpatchify(y_BTHWC, self.config.patch)
            return past, jnp.moveaxis(y_BTHWC, -1, 2).astype(jnp.float32)

        start = past is None
        latent_FBCHW = jnp.moveaxis(latent, 1, 0)
        return _steps(step, past, latent_FBCHW[0] if start else None, latent_FBCHW[start:])

    def decode(self, latent: Float[Array, "B F C H W"]) -> Float[Array, "B T 3 Y X"]:
        """Decodes a whole video; see `decode_stream`."""
        return self.decode_stream(latent)[0]

    def encode_stream(
        self, video: Float[Array, "B T 3 Y X"], past: Past | None = None
    ) -> tuple[Float[Array, "B F C H W"], Past]:
        """Encodes the next frames of a video to the mean of their latents; nothing is sampled.

        Args:
            video: frames in [-1, 1]. T is a multiple of `temporal_stride`, at the start of a video
                plus 1.
            past: what the previous call returned; None at the start of a video.

        Returns:
            float32 normalised latents and the new past. F = T / `temporal_stride`, at the start
            1 + (T - 1) / `temporal_stride`.

        Raises:
            ValueError: T, Y or X is not divisible as required, or there are not 3 channels.
        """
        _, t, c, h, w = video.shape
        stride, side = self.config.temporal_stride, self.config.spatial_stride
        start = int(past is None)
        if t < 1 or (t - start) % stride or c != 3 or h % side or w % side or not h * w:
            raise ValueError(
                f"{video.shape=}; accepted: [B, {start} + {stride} k, 3, Y, X], Y and X multiples "
                f"of {side}"
            )
        mean, inverse_std = self.statistics()

        def step(past, video_BTCHW):
            x_BTHWC = jnp.moveaxis(video_BTCHW, 2, -1).astype(self.config.dtype)
            y_BFHWC, past = self.encoder(patchify(x_BTHWC, self.config.patch), past)
            mu, _ = jnp.split(self.conv_mean_logvar(y_BFHWC), 2, -1)
            latent = (mu - mean) * inverse_std
            return past, jnp.moveaxis(latent, -1, 2).astype(jnp.float32)

        rest_BNTCHW = video[:, start:].reshape(len(video), (t - start) // stride, stride, c, h, w)
        first = video[:, :1] if start else None
        return _steps(step, past, first, jnp.moveaxis(rest_BNTCHW, 1, 0))

    def encode(self, video: Float[Array, "B T 3 Y X"]) -> Float[Array, "B F C H W"]:
        """Encodes a whole video; see `encode_stream`.

        F = 1 + (T - 1) // `temporal_stride`: as in the released model, trailing frames that do not
        fill a latent frame are dropped.
        """
        frames = self.config.video_frames(self.config.latent_frames(video.shape[1]))
        return self.encode_stream(video[:, :frames])[0]


def to_uint8(video: Float[Array, "B T 3 Y X"]) -> UInt8[Array, "B T Y X 3"]:
    """Channels-last bytes of video in [-1, 1], rounded to nearest."""
    video = jnp.round((jnp.clip(jnp.moveaxis(video, 2, -1), -1, 1) + 1) * 127.5)
    return video.astype(jnp.uint8)


def _steps(step, past, first, rest):
    """Runs `first` (None to go on from `past`), then scans `rest`; joins the results in time."""
    parts = []
    if first is not None:
        past, y_BT = step(None, first)
        parts.append(y_BT)
    if len(rest):
        past, y_NBT = jax.lax.scan(step, past, rest)
        n, b, t, *frame = y_NBT.shape
        parts.append(jnp.moveaxis(y_NBT, 0, 1).reshape(b, n * t, *frame))
    return jnp.concatenate(parts, 1), past


def _residuals(count, channels_in, channels_out, config, rngs):
    c = [channels_in, *[channels_out] * count]
    return [Residual(c[j], c[j + 1], config, rngs) for j in range(count)]


def _middle(channels, config, rngs):
    return nnx.List(
        [
            Residual(channels, channels, config, rngs),
            Attention(channels, config, rngs),
            Residual(channels, channels, config, rngs),
        ]
    )
