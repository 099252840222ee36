"""Layers of the Wan VAEs: each maps features and its past to features and its new past.

A *past* is what a layer that sees earlier frames keeps of them; `past=None` starts a video with one
frame. From then on pasts have fixed shapes. Features are channels-last, `[B, T, H, W, C]`:
B batch, T frames, H rows, W columns, C channels.

A convolution over three frames is written as one over images with three times the channels, the
frames side by side, earliest first; one over time only is then a matrix product. CPU and GPU both
have fast channels-last paths for these; a 3-D convolution of the finest level took 2.4 times as
long on a CPU.

Source: Wan2.1 technical report (arXiv 2503.20314), section 4.1; released parameters.
"""

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.wan_vae.config import WanVAEConfig

Past = tuple  # nested tuples of arrays, () for a layer without memory
Features = Float[Array, "B _T _H _W _C"]


class Norm(nnx.Module):
    """`x / max(|x|, 1e-12) * sqrt(C) * gamma`, |x| over channels, in float32 inside."""

    def __init__(self, channels: int, config: WanVAEConfig):
        self.gamma = nnx.Param(jnp.ones((channels,), config.param_dtype))

    def __call__(self, x_BTHWC: Features) -> Features:
        x = x_BTHWC.astype(jnp.float32)
        gain = x.shape[-1] ** 0.5 * self.gamma[...].astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))
        return (x / jnp.maximum(length, 1e-12) * gain.reshape(1, 1, 1, 1, -1)).astype(x_BTHWC.dtype)


class CausalConv(nnx.Module):
    """3 x 3 x 3 convolution that sees the frame and its two predecessors; zeros before the first.

    Past: the last two input frames.
    """

    def __init__(self, channels_in: int, channels_out: int, config: WanVAEConfig, rngs: nnx.Rngs):
        self.conv = _conv(3 * channels_in, channels_out, config, rngs)

    def __call__(self, x_BTHWC: Features, past: Past | None) -> tuple[Features, Past]:
        before = _zeros_like_frames(x_BTHWC, 2) if past is None else past[0]
        x = jnp.concatenate([before, x_BTHWC], 1)
        return self.conv(_windows(x)), (x[:, -2:],)


class Residual(nnx.Module):
    """Norm, SiLU, conv, norm, SiLU, conv, plus the input (projected if the width changes)."""

    def __init__(self, channels_in: int, channels_out: int, config: WanVAEConfig, rngs: nnx.Rngs):
        self.norm1 = Norm(channels_in, config)
        self.conv1 = CausalConv(channels_in, channels_out, config, rngs)
        self.norm2 = Norm(channels_out, config)
        self.conv2 = CausalConv(channels_out, channels_out, config, rngs)
        same = channels_in == channels_out
        self.shortcut = None if same else pointwise(channels_in, channels_out, config, rngs)

    def __call__(self, x_BTHWC: Features, past: Past | None) -> tuple[Features, Past]:
        past1, past2 = past or (None, None)
        y, past1 = self.conv1(jax.nn.silu(self.norm1(x_BTHWC)), past1)
        y, past2 = self.conv2(jax.nn.silu(self.norm2(y)), past2)
        skip = x_BTHWC if self.shortcut is None else self.shortcut(x_BTHWC)
        return skip + y, (past1, past2)


class Attention(nnx.Module):
    """Single-head attention of all pixels of one frame, plus the input. No past."""

    def __init__(self, channels: int, config: WanVAEConfig, rngs: nnx.Rngs):
        self.norm = Norm(channels, config)
        self.to_qkv = pointwise(channels, 3 * channels, config, rngs)
        self.proj = pointwise(channels, channels, config, rngs)

    def __call__(self, x_BTHWC: Features, past: Past | None) -> tuple[Features, Past]:
        b, t, h, w, c = x_BTHWC.shape
        qkv = self.to_qkv(self.norm(x_BTHWC)).reshape(b * t, h * w, 3 * c)
        q, k, v = jnp.split(qkv, 3, -1)
        logits = jnp.einsum("nqc,nkc->nqk", q, k, preferred_element_type=jnp.float32)
        weight = jax.nn.softmax(logits * c**-0.5, -1).astype(v.dtype)
        y = jnp.einsum("nqk,nkc->nqc", weight, v)
        return x_BTHWC + self.proj(y.reshape(b, t, h, w, c)), ()


class Downsample(nnx.Module):
    """Halves rows and columns; with `temporal`, then frames: windows (0, 1, 2), (2, 3, 4), ...

    The first frame of a video is not convolved in time. Past: the last frame, already halved.
    """

    def __init__(self, channels: int, temporal: bool, config: WanVAEConfig, rngs: nnx.Rngs):
        self.temporal = temporal
        self.conv = _conv(channels, channels, config, rngs, stride=2, padding=(0, 1))
        self.time_conv = pointwise(3 * channels, channels, config, rngs) if temporal else None

    def __call__(self, x_BTHWC: Features, past: Past | None) -> tuple[Features, Past]:
        x = self.conv(x_BTHWC)
        if self.time_conv is None:
            return x, ()
        if past is None:
            return x, (x,)
        return self.time_conv(_windows(jnp.concatenate([past[0], x], 1), 2)), (x[:, -1:],)


class Upsample(nnx.Module):
    """With `temporal`, doubles frames; then doubles rows and columns and convolves the image.

    The first frame of a video is neither doubled nor seen by the frames after it. Past: the last
    two frames before doubling, zeros in place of the first frame and of what was before.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        temporal: bool,
        config: WanVAEConfig,
        rngs: nnx.Rngs,
    ):
        c = channels_in
        self.temporal = temporal
        self.time_conv = pointwise(3 * c, 2 * c, config, rngs) if temporal else None
        self.conv = _conv(c, channels_out, config, rngs)

    def __call__(self, x_BTHWC: Features, past: Past | None) -> tuple[Features, Past]:
        x = x_BTHWC
        if self.time_conv is None:
            past = ()
        elif past is None:
            past = (_zeros_like_frames(x, 2),)
        else:
            x = jnp.concatenate([past[0], x], 1)
            past = (x[:, -2:],)
            b, t, h, w, c = x_BTHWC.shape
            x = self.time_conv(_windows(x)).reshape(b, t, h, w, 2, c)  # channels hold two frames
            x = jnp.moveaxis(x, 4, 2).reshape(b, 2 * t, h, w, c)
        return self.conv(jnp.repeat(jnp.repeat(x, 2, 2), 2, 3)), past


class Head(nnx.Module):
    """Norm, SiLU, conv."""

    def __init__(self, channels_in: int, channels_out: int, config: WanVAEConfig, rngs: nnx.Rngs):
        self.norm = Norm(channels_in, config)
        self.conv = CausalConv(channels_in, channels_out, config, rngs)

    def __call__(self, x_BTHWC: Features, past: Past | None) -> tuple[Features, Past]:
        return self.conv(jax.nn.silu(self.norm(x_BTHWC)), past)


def run(
    layers: Iterable[nnx.Module], x_BTHWC: Features, past: Past | None
) -> tuple[Features, Past]:
    """One layer after the other; the past is the tuple of theirs."""
    layers = list(layers)
    pasts = []
    for layer, before in zip(layers, past or [None] * len(layers), strict=True):
        x_BTHWC, after = layer(x_BTHWC, before)
        pasts.append(after)
    return x_BTHWC, tuple(pasts)


def run_by_frame(
    layers: Iterable[nnx.Module], x_BTHWC: Features, past: Past | None
) -> tuple[Features, Past]:
    """`run` on one frame after the other, but for the layers that change the number of frames."""
    after = ()
    for temporal, group in itertools.groupby(layers, lambda x: getattr(x, "temporal", False)):
        group = list(group)
        before = past and past[len(after) : len(after) + len(group)]
        if temporal or x_BTHWC.shape[1] == 1:
            x_BTHWC, pasts = run(group, x_BTHWC, before)
        else:
            x_BTHWC, pasts = _scan_frames(group, x_BTHWC, before)
        after += pasts
    return x_BTHWC, after


def pointwise(
    channels_in: int, channels_out: int, config: WanVAEConfig, rngs: nnx.Rngs
) -> nnx.Linear:
    """A convolution of window 1: the same matrix for every pixel."""
    return nnx.Linear(
        channels_in, channels_out, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
    )


def _scan_frames(layers, x_BTHWC, past):
    def step(past, x_BHWC):
        y_BTHWC, past = run(layers, x_BHWC[:, None], past)
        return past, y_BTHWC[:, 0]

    past, y_TBHWC = jax.lax.scan(step, past, jnp.moveaxis(x_BTHWC, 1, 0))
    return jnp.moveaxis(y_TBHWC, 0, 1), past


def _conv(channels_in, channels_out, config, rngs, *, stride=1, padding=(1, 1)):
    return nnx.Conv(
        channels_in,
        channels_out,
        (3, 3),
        strides=stride,
        padding=[padding, padding],
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _windows(x_BTHWC, stride=1):
    """Windows of three frames, each side by side in the channels: `[B, T', H, W, 3 C]`."""
    t = x_BTHWC.shape[1]
    return jnp.concatenate([x_BTHWC[:, i : t - 2 + i : stride] for i in range(3)], -1)


def _zeros_like_frames(x_BTHWC, frames):
    b, _, h, w, c = x_BTHWC.shape
    return jnp.zeros((b, frames, h, w, c), x_BTHWC.dtype)
