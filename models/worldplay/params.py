"""Checkpoint names of the transformer: diffusers' Wan names and what WorldPlay added to them."""

from collections.abc import Iterable
from pathlib import Path

import jax
from flax import nnx

from models.common.checkpoint import Rule, linear_kernel, load
from models.self_forcing.params import DIFFUSERS_RULES, bare_name
from models.worldplay.config import WorldPlayConfig
from models.worldplay.modeling import WorldPlayDiT


def _linear(pattern: str, path: str, layer: int | None = None) -> tuple[Rule, Rule]:
    return (
        Rule(pattern + r"\.weight", path + ".kernel", linear_kernel, layer),
        Rule(pattern + r"\.bias", path + ".bias", layer=layer),
    )


# The first matching rule counts: `time_proj` sits elsewhere here, for it follows a sum of two.
RULES = (
    *_linear(r"condition_embedder\.action_embedder\.linear_1", "action.up"),
    *_linear(r"condition_embedder\.action_embedder\.linear_2", "action.down"),
    *_linear(r"condition_embedder\.time_proj", "project"),
    *_linear(r"blocks\.(\d+)\.attn1\.to_out_prope\.0", "blocks.prope_out", 1),
    *DIFFUSERS_RULES,
)


def skeleton(config: WorldPlayConfig) -> WorldPlayDiT:
    """The transformer with shapes and dtypes but no arrays."""
    return nnx.eval_shape(lambda: WorldPlayDiT(config, rngs=nnx.Rngs(0)))


def load_dit(
    source: str | Path | Iterable[str | Path],
    config: WorldPlayConfig,
    *,
    device: jax.Device | jax.sharding.Sharding | None = None,
) -> WorldPlayDiT:
    """Loads the transformer from safetensors; `model.` and FSDP prefixes of names are ignored.

    Args:
        source: a file, a folder of shards, or several of either.
        config: sizes and dtype; the stored weights are cast to `config.dtype`.
        device: where the parameters go; default: JAX's default device.

    Raises:
        CheckpointError: with every missing, unused and misshapen name.
    """
    return load(skeleton(config), source, RULES, rename=bare_name, device=device)


def random_dit(config: WorldPlayConfig, seed: int = 0) -> WorldPlayDiT:
    """The transformer with random weights, made on the device in one program: for benchmarks."""

    @nnx.jit
    def make():
        return WorldPlayDiT(config, rngs=nnx.Rngs(seed))

    return make()
