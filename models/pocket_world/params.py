"""Weights of pocket world as safetensors: float16, our own dotted names, the config in the header."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from safetensors.numpy import save_file

from models.common.checkpoint import CheckpointError, Rule, load
from models.pocket_world.config import PocketWorldConfig
from models.pocket_world.modeling import PocketWorld
from qvg_jax.errors import UserError
from qvg_jax.files import replacing
from qvg_jax.reading.schema import checked, parse_json
from qvg_jax.reading.tensors import opened

RULES = (Rule(r"(.+)", r"\1"),)
DEFAULT_WEIGHTS = pathlib.Path(__file__).with_name("pocket_world.safetensors")


def save_weights(
    path: str | os.PathLike, cfg: PocketWorldConfig, params, card: dict | None = None
) -> None:
    """Writes parameters as float16; the file appears whole or not at all.

    Args:
        params: nested dict of arrays, as `nnx.to_pure_dict` returns.
        card: facts about the training run, kept in the header.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    arrays = {name: np.ascontiguousarray(np.asarray(x, np.float16)) for name, x in flat.items()}
    header = {"config": json.dumps(dataclasses.asdict(cfg)), "card": json.dumps(card or {})}
    with replacing(path) as partial:
        save_file(arrays, partial, header)


def read_header(path: str | os.PathLike) -> tuple[PocketWorldConfig, dict]:
    """The configuration and the training facts in a weights file.

    Raises:
        CheckpointError: no such file, or not one that `save_weights` wrote.
    """
    try:
        with opened(path) as f:
            header = f.metadata() or {}
    except UserError as e:
        raise CheckpointError(f"weights {str(path)!r}: {e}") from e
    if lacking := {"config", "card"} - header.keys():
        raise CheckpointError(
            f"weights {str(path)!r}: not a pocket world file; its header has no "
            f"{' and no '.join(sorted(lacking))}"
        )
    try:
        stored = parse_json(header["config"], dict[str, Any], "config")
        cfg = checked(stored, PocketWorldConfig, "config")
        return cfg, parse_json(header["card"], dict[str, Any], "card")
    except UserError as e:
        raise CheckpointError(f"weights {str(path)!r}: not a pocket world file ({e})") from e


def load_weights(path: str | os.PathLike = DEFAULT_WEIGHTS, *, dtype=jnp.float32) -> PocketWorld:
    """The model with the weights of a file; parameters in float32, matrix products in `dtype`."""
    cfg, _ = read_header(path)
    skeleton = nnx.eval_shape(lambda: PocketWorld(cfg, dtype=dtype, rngs=nnx.Rngs(0)))
    return load(skeleton, path, RULES)
