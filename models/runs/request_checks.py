"""Checks of options that mean the same to several models, and what their values stand for."""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from models.runs.latent_options import LatentOptions
from qvg_jax.app.job import BASELINE
from qvg_jax.backends import capability, no_hopper, no_triton
from qvg_jax.errors import UserError

RANDOM = "random"  # in place of a folder of weights
LARGEST_SEED = 2**31 - 1


def check_needed(model: str, options: LatentOptions) -> None:
    """Raises UserError if weights or prompt are missing, or options exclude each other."""
    if not options.weights:
        raise UserError(
            f"weights is missing: model {model} needs --weights FOLDER, or `qvg fetch {model}` before"
        )
    if not options.prompt:
        raise UserError(f"prompt is missing: model {model} needs --prompt")
    if options.image and getattr(options, "video", None):
        raise UserError("--image and --video: give one of them")
    if options.precision == "fp8" and options.attention not in (None, "mosaic", "mosaic_fp8"):
        raise UserError(
            f"--precision fp8 and --attention {options.attention} do not go together; accepted: mosaic"
        )
    if options.precision == "bf16" and options.attention == "mosaic_fp8":
        raise UserError("--precision bf16 and --attention mosaic_fp8 exclude each other")
    if options.layers is not None and options.weights != RANDOM:
        raise UserError("--layers is for random weights; leave it out")
    check_attention(options)


def check_attention(options: LatentOptions) -> None:
    """Raises UserError if this device has none of what the options name to read the cache.

    `attend` says so too, but only when all weights are loaded.
    """
    named = options.attention or ("mosaic" if options.precision == "fp8" else None)
    why = None
    if named in ("mosaic", "mosaic_fp8"):
        why = no_hopper()
    elif named == "triton":
        why = no_triton()
    elif named == "cudnn" and (capability() or (0,)) < (8, 0):
        platform = jax.devices()[0].platform
        why = (
            f"the default device is {platform}; it must be a GPU of compute capability 8.0 or more"
        )
    if why is not None:
        raise UserError(f"attention={named!r} cannot run here: {why}; accepted: xla, or none named")


def check_size(height: int, width: int, *, side: int, patch: tuple[int, int]) -> None:
    """Raises UserError if a frame is not a whole number of tokens.

    Args:
        height, width: in pixels.
        side: pixels of a latent.
        patch: (rows, columns) of latents of a token.
    """
    for name, value, n in zip(("height", "width"), (height, width), patch, strict=True):
        if value < 1 or value % (side * n):
            raise UserError(
                f"{name}={value} is not accepted: give a multiple of {side * n}, for a latent "
                f"is {side} pixels and a token {n} latents"
            )


def check_seed(seed: int) -> None:
    """Raises UserError if no key can be made of a seed."""
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed={seed} is not accepted: give 0 to {LARGEST_SEED}")


def arm_names(options: LatentOptions) -> list[str]:
    """The recipes asked for, each once, the baseline first."""
    return sorted(dict.fromkeys(options.codecs), key=lambda name: name != BASELINE)  # stable


def with_layers[C](config: C, options: LatentOptions) -> C:
    """A transformer's configuration with as many layers as `--layers` says."""
    if options.layers is None:
        return config
    return dataclasses.replace(config, layers=options.layers)  # type: ignore[type-var]


def plain_config(config: Any) -> dict[str, Any]:
    """A transformer's configuration as JSON types."""
    return dataclasses.asdict(config) | {"dtype": np.dtype(config.dtype).name}


def file_digest(path: str) -> str:
    """SHA-256 of a file.

    Raises:
        UserError: it is not readable.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from error
