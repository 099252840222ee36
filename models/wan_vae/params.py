"""Stored names of the Wan VAEs, original and diffusers, and where their tensors go."""

import re

import numpy as np

from models.common import Rule, conv_kernel, patch_kernel, vector
from models.common.weights import Weights
from models.wan_vae.config import WanVAEConfig
from models.wan_vae.modeling import WanVAE


def video_kernel(x: np.ndarray) -> np.ndarray:
    """`[out, in, T, *window]` to `[*window, T * in, out]`: frames side by side in the channels."""
    out, channels, frames, *window = x.shape
    return np.moveaxis(x, (2, 1, 0), (-3, -2, -1)).reshape(*window, frames * channels, out)


def time_kernel(x: np.ndarray) -> np.ndarray:
    """`[out, in, T, 1, 1]` to `[T * in, out]`."""
    return video_kernel(x).squeeze((0, 1))


_PARTS = (
    (r"(encoder|decoder)\.conv1", r"\1.conv_in.conv", video_kernel),
    (r"(encoder|decoder)\.head\.2", r"\1.head.conv.conv", video_kernel),
    (r"conv1", "conv_mean_logvar", patch_kernel),
    (r"conv2", "conv_latent", patch_kernel),
    (r"(.+)\.residual\.2", r"\1.conv1.conv", video_kernel),
    (r"(.+)\.residual\.6", r"\1.conv2.conv", video_kernel),
    (r"(.+)\.shortcut", r"\1.shortcut", patch_kernel),
    (r"(.+)\.to_qkv", r"\1.to_qkv", patch_kernel),
    (r"(.+)\.proj", r"\1.proj", patch_kernel),
    (r"(.+)\.resample\.1", r"\1.conv", conv_kernel),
    (r"(.+)\.time_conv", r"\1.time_conv", time_kernel),
)

RULES = (
    *(Rule(rf"{name}\.weight", f"{path}.kernel", layout) for name, path, layout in _PARTS),
    *(Rule(rf"{name}\.bias", f"{path}.bias") for name, path, _ in _PARTS),
    Rule(r"(encoder|decoder)\.head\.0\.gamma", r"\1.head.norm.gamma", vector),
    Rule(r"(.+)\.residual\.0\.gamma", r"\1.norm1.gamma", vector),
    Rule(r"(.+)\.residual\.3\.gamma", r"\1.norm2.gamma", vector),
    Rule(r"(.+)\.norm\.gamma", r"\1.norm.gamma", vector),
)


_DIFFUSERS_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def original_name(name: str, config: WanVAEConfig) -> str:
    """The original name of a tensor in diffusers' naming; an original name stays as it is.

    Args:
        name: stored name.
        config: says how layers are numbered: in one list for all levels, or with `shortcuts` in one
            for each; by residual blocks per encoder level (decoder levels have one more).
    """
    name = re.sub(
        r"(resnets\.\d+|down_blocks\.\d+)\.(norm1|norm2|conv1|conv2|conv_shortcut)\.",
        lambda m: f"{m[1]}.{_DIFFUSERS_BLOCK[m[2]]}.",
        name,
    )
    name = re.sub(r"^post_quant_conv\.", "conv2.", re.sub(r"^quant_conv\.", "conv1.", name))
    name = name.replace(".conv_in.", ".conv1.")
    name = name.replace(".norm_out.", ".head.0.").replace(".conv_out.", ".head.2.")
    name = name.replace(".mid_block.attentions.0.", ".middle.1.")
    name = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda m: f".middle.{2 * int(m[1])}.", name)
    if config.shortcuts:
        for way, last in (("down", config.res_blocks), ("up", config.res_blocks + 1)):
            name = name.replace(f".{way}sampler.", f".resnets.{last}.")
            to = rf".{way}samples.\1.{way}samples."
            name = re.sub(rf"\.{way}_blocks\.(\d+)\.resnets\.", to, name)
        return name
    name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
    level = config.res_blocks + 2
    return re.sub(
        r"^decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.",
        lambda m: f"decoder.upsamples.{level * int(m[1]) + int(m[2] or level - 1)}.",
        name,
    )


WEIGHTS = Weights(WanVAE, RULES, rename=original_name)
load_wan_vae = WEIGHTS.load
