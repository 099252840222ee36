"""A Self-Forcing of a few thousand parameters, and a folder of checkpoints of its size."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from models.runs.checkpoint_folder import Sizes
from models.self_forcing.config import SelfForcingConfig
from models.umt5 import Tokenizer, UMT5Config
from models.wan_vae import WanVAEConfig
from tests.support.checkpoint_shapes import wan_shapes

HEIGHT, WIDTH = 32, 48
CODEC = "qvg:num_centroids=4:group=16"


def sizes(dtype=jnp.float32) -> Sizes:
    """All three networks; real structure, hardly any width."""
    return Sizes(
        dit=SelfForcingConfig(
            layers=2, width=32, heads=2, ffn_width=40, time_width=8, text_width=12, text_slots=7,
            rope_frames=64, dtype=dtype,
        ),
        vae=dataclasses.replace(
            WanVAEConfig.wan_2_1(dtype=dtype), width=4, multipliers=(1, 1, 2, 2), res_blocks=1
        ),
        text=UMT5Config(
            vocabulary=40, width=12, heads=2, head_dim=4, ffn_width=16, layers=2, dtype=dtype
        ),
    )  # fmt: skip


def vae_shapes(c: WanVAEConfig) -> dict[str, tuple[int, ...]]:
    """Original names and shapes of the VAE, written out from the specification."""
    shapes: dict[str, tuple[int, ...]] = {}
    z = c.latent_channels

    def conv(name, n_in, n_out, *window):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in, *window), (n_out,)

    def residual(name, n_in, n_out):
        shapes[f"{name}.residual.0.gamma"] = (n_in, 1, 1, 1)
        conv(f"{name}.residual.2", n_in, n_out, 3, 3, 3)
        shapes[f"{name}.residual.3.gamma"] = (n_out, 1, 1, 1)
        conv(f"{name}.residual.6", n_out, n_out, 3, 3, 3)
        if n_in != n_out:
            conv(f"{name}.shortcut", n_in, n_out, 1, 1, 1)

    def middle(name, n):
        residual(f"{name}.middle.0", n, n)
        shapes[f"{name}.middle.1.norm.gamma"] = (n, 1, 1)
        conv(f"{name}.middle.1.to_qkv", n, 3 * n, 1, 1)
        conv(f"{name}.middle.1.proj", n, n, 1, 1)
        residual(f"{name}.middle.2", n, n)

    def head(name, n_in, n_out):
        shapes[f"{name}.head.0.gamma"] = (n_in, 1, 1, 1)
        conv(f"{name}.head.2", n_in, n_out, 3, 3, 3)

    levels = len(c.temporal)
    widths = [c.width * m for m in (1, *c.multipliers)]
    conv("encoder.conv1", 3, widths[0], 3, 3, 3)
    at = 0
    for i, (n_in, n) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        for j in range(c.res_blocks):
            residual(f"encoder.downsamples.{at}", n_in if j == 0 else n, n)
            at += 1
        if i < levels:
            conv(f"encoder.downsamples.{at}.resample.1", n, n, 3, 3)
            if c.temporal[i]:
                conv(f"encoder.downsamples.{at}.time_conv", n, n, 3, 1, 1)
            at += 1
    middle("encoder", widths[-1])
    head("encoder", widths[-1], 2 * z)
    conv("conv1", 2 * z, 2 * z, 1, 1, 1)
    conv("conv2", z, z, 1, 1, 1)
    widths = [c.width * m for m in (c.multipliers[-1], *c.multipliers[::-1])]
    conv("decoder.conv1", z, widths[0], 3, 3, 3)
    middle("decoder", widths[0])
    at = 0
    for i, (n_in, n) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        n_in = n_in if i == 0 else n_in // 2
        for j in range(c.res_blocks + 1):
            residual(f"decoder.upsamples.{at}", n_in if j == 0 else n, n)
            at += 1
        if i < levels:
            if c.temporal[::-1][i]:
                conv(f"decoder.upsamples.{at}.time_conv", n, 2 * n, 3, 1, 1)
            conv(f"decoder.upsamples.{at}.resample.1", n, n // 2, 3, 3)
            at += 1
    head("decoder", widths[-1], 3)
    return shapes


def text_shapes(c: UMT5Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Wan's umT5 file."""
    inner = c.heads * c.head_dim
    shapes = {"token_embedding.weight": (c.vocabulary, c.width), "norm.weight": (c.width,)}
    for i in range(c.layers):
        at = f"blocks.{i}"
        for name in ("norm1", "norm2"):
            shapes[f"{at}.{name}.weight"] = (c.width,)
        for name in "qkv":
            shapes[f"{at}.attn.{name}.weight"] = (inner, c.width)
        shapes[f"{at}.attn.o.weight"] = (c.width, inner)
        shapes[f"{at}.pos_embedding.embedding.weight"] = (c.buckets, c.heads)
        for name in ("gate.0", "fc1"):
            shapes[f"{at}.ffn.{name}.weight"] = (c.ffn_width, c.width)
        shapes[f"{at}.ffn.fc2.weight"] = (c.width, c.ffn_width)
    return shapes


FILES = {
    "dit": "self_forcing_dmd.safetensors",
    "vae": "Wan2.1_VAE.safetensors",
    "text": "models_t5_umt5-xxl-enc-bf16.safetensors",
}


def weights_folder(folder: Path) -> Path:
    """A folder laid out like the releases; random values."""
    c, draw = sizes(), np.random.default_rng(0)
    tables = dict(dit=wan_shapes(c.dit), vae=vae_shapes(c.vae), text=text_shapes(c.text))
    for part, shapes in tables.items():
        prefix = "model." if part == "dit" else ""
        arrays = {
            prefix + name: (draw.normal(size=shape) / 4).astype(np.float32)
            for name, shape in shapes.items()
        }
        save_file(arrays, folder / FILES[part])
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text("{}")
    config = dict(
        num_layers=2, dim=32, num_heads=2, ffn_dim=40, in_dim=16, out_dim=16, freq_dim=8,
        text_dim=12, text_len=7, eps=1e-6,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def letters(length: int = 7) -> Tokenizer:
    """A tokenizer that needs no library: a letter is a token."""
    return Tokenizer(
        to_ids=lambda text: [2 + ord(c) % 30 for c in text],
        to_text=lambda ids: f"{len(ids)} letters",
        length=length,
    )
