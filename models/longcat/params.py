"""Checkpoint names of the transformer, as released."""

from collections.abc import Iterable
from pathlib import Path

import jax
from flax import nnx

from models.common.checkpoint import Rule, linear_kernel, load, patch_kernel
from models.common.shards import checkpoint_shards
from models.longcat.config import LongCatConfig
from models.longcat.modeling import LongCatDiT


def _linear(pattern: str, path: str, layer: int | None = None) -> tuple[Rule, Rule]:
    return (
        Rule(pattern + r"\.weight", path + ".kernel", linear_kernel, layer),
        Rule(pattern + r"\.bias", path + ".bias", layer=layer),
    )


_AT = r"blocks\.(\d+)\."

RULES = (
    Rule(r"x_embedder\.proj\.weight", "patch.kernel", patch_kernel),
    Rule(r"x_embedder\.proj\.bias", "patch.bias"),
    *_linear(r"t_embedder\.mlp\.0", "time.up"),
    *_linear(r"t_embedder\.mlp\.2", "time.down"),
    *_linear(r"y_embedder\.y_proj\.0", "text.up"),
    *_linear(r"y_embedder\.y_proj\.2", "text.down"),
    *_linear(_AT + r"adaLN_modulation\.1", "blocks.modulation", 1),
    *_linear(_AT + r"attn\.qkv", "blocks.self_attn.qkv", 1),
    Rule(_AT + r"attn\.([qk])_norm\.weight", r"blocks.self_attn.\2_norm.weight", layer=1),
    *_linear(_AT + r"attn\.proj", "blocks.self_attn.out", 1),
    Rule(_AT + r"pre_crs_attn_norm\.weight", "blocks.cross_norm.scale", layer=1),
    Rule(_AT + r"pre_crs_attn_norm\.bias", "blocks.cross_norm.bias", layer=1),
    *_linear(_AT + r"cross_attn\.q_linear", "blocks.cross_attn.q", 1),
    *_linear(_AT + r"cross_attn\.kv_linear", "blocks.cross_attn.kv", 1),
    Rule(_AT + r"cross_attn\.([qk])_norm\.weight", r"blocks.cross_attn.\2_norm.weight", layer=1),
    *_linear(_AT + r"cross_attn\.proj", "blocks.cross_attn.out", 1),
    Rule(_AT + r"ffn\.w1\.weight", "blocks.ffn.gate.kernel", linear_kernel, 1),
    Rule(_AT + r"ffn\.w2\.weight", "blocks.ffn.down.kernel", linear_kernel, 1),
    Rule(_AT + r"ffn\.w3\.weight", "blocks.ffn.up.kernel", linear_kernel, 1),
    *_linear(r"final_layer\.adaLN_modulation\.1", "head.modulation"),
    *_linear(r"final_layer\.linear", "head.project"),
)


def skeleton(config: LongCatConfig) -> LongCatDiT:
    """The transformer with shapes and dtypes but no arrays."""
    return nnx.eval_shape(lambda: LongCatDiT(config, rngs=nnx.Rngs(0)))


def load_dit(
    source: str | Path | Iterable[str | Path],
    config: LongCatConfig,
    *,
    device: jax.Device | jax.sharding.Sharding | None = None,
) -> LongCatDiT:
    """Loads the transformer from the released safetensors.

    Args:
        source: a file, a folder of shards, or several of either.
        config: sizes and dtype; the stored weights are cast to `config.dtype`.
        device: where the parameters go; default: JAX's default device.

    Raises:
        CheckpointError: with every missing shard, or every missing, unused and misshapen name.
    """
    return load(skeleton(config), checkpoint_shards(source), RULES, device=device)


def random_dit(config: LongCatConfig, seed: int = 0) -> LongCatDiT:
    """The transformer with random weights, made on the device in one program: for benchmarks."""

    @nnx.jit
    def make():
        return LongCatDiT(config, rngs=nnx.Rngs(seed))

    return make()
