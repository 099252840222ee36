"""What a user asked for, as far as it means the same to several models."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from qvg_jax.app.job import BASELINE, Request
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import Codec

RANDOM = "random"  # in place of a folder of weights
LARGEST_SEED = 2**31 - 1


def check_needed(model: str, request: Request) -> None:
    """Raises ValueError if weights or prompt are missing, or there are an image and a video."""
    for name in ("weights", "prompt"):
        if not getattr(request, name):
            raise ValueError(f"{name} is missing: model {model} needs --{name}")
    if request.image and request.video:
        raise ValueError("--image and --video: give one of them")


def check_size(height: int, width: int, *, side: int, patch: tuple[int, int]) -> None:
    """Raises ValueError if a frame is not a whole number of tokens.

    Args:
        height, width: in pixels.
        side: pixels of a latent.
        patch: (rows, columns) of latents of a token.
    """
    for name, value, n in zip(("height", "width"), (height, width), patch, strict=True):
        if value < 1 or value % (side * n):
            raise ValueError(
                f"{name}={value} is not accepted: give a multiple of {side * n}, for a latent "
                f"is {side} pixels and a token {n} latents"
            )


def check_seed(seed: int) -> None:
    """Raises ValueError if no key can be made of a seed."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed={seed} is not accepted: give 0 to {LARGEST_SEED}")


def arm_names(request: Request) -> list[str]:
    """The codecs asked for, each once, the baseline first."""
    return sorted(dict.fromkeys(request.codecs), key=lambda name: name != BASELINE)  # stable


def attention_of(arm: str, request: Request) -> str | None:
    """How an arm reads its cache: as asked, but the baseline never with less than its precision."""
    return None if arm == BASELINE else request.attention


def codec_pair(recipe: str) -> tuple[Codec | None, Codec | None]:
    """Codecs of K and V; None for the baseline, which keeps the model's dtype."""
    if recipe == BASELINE:
        return None, None
    return presets.parse_pair(recipe)


def with_layers[C](config: C, request: Request) -> C:
    """A transformer's configuration with as many layers as `--layers` says.

    Raises:
        ValueError: `--layers` beside weights.
    """
    if request.layers is None:
        return config
    if request.weights not in (None, RANDOM):
        raise ValueError("--layers is for random weights; leave it out")
    return dataclasses.replace(config, layers=request.layers)


def plain_config(config: Any) -> dict[str, Any]:
    """A transformer's configuration as JSON types."""
    return dataclasses.asdict(config) | {"dtype": np.dtype(config.dtype).name}


def file_digest(path: str) -> str:
    """SHA-256 of a file.

    Raises:
        ValueError: it is not readable.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror})") from error
