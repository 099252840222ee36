"""Checkpoint names of the transformer, as released."""

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.common.checkpoint import Device, Rule, check, linear_kernel, load, patch_kernel
from models.common.shards import checkpoint_shards
from models.longcat.config import LongCatConfig
from models.longcat.modeling import LongCatDiT

type Layout = Callable[[np.ndarray], np.ndarray]


def _linear(
    pattern: str, path: str, layer: int | None = None, layout: Layout = linear_kernel
) -> tuple[Rule, Rule]:
    return (
        Rule(pattern + r"\.weight", path + ".kernel", layout, layer),
        Rule(pattern + r"\.bias", path + ".bias", layout, layer),
    )


def _side_by_side(parts: int) -> Callable[[np.ndarray], np.ndarray]:
    """[parts * out, in] to [in, parts, out], and [parts * out] to [parts, out]."""
    return lambda x: linear_kernel(x).reshape(*x.shape[1:], parts, -1)


_AT = r"blocks\.(\d+)\."

RULES = (
    Rule(r"x_embedder\.proj\.weight", "patch.kernel", patch_kernel),
    Rule(r"x_embedder\.proj\.bias", "patch.bias"),
    *_linear(r"t_embedder\.mlp\.0", "time.up"),
    *_linear(r"t_embedder\.mlp\.2", "time.down"),
    *_linear(r"y_embedder\.y_proj\.0", "text.up"),
    *_linear(r"y_embedder\.y_proj\.2", "text.down"),
    *_linear(_AT + r"adaLN_modulation\.1", "blocks.modulation", 1),
    *_linear(_AT + r"attn\.qkv", "blocks.self_attn.qkv", 1, _side_by_side(3)),
    Rule(_AT + r"attn\.([qk])_norm\.weight", r"blocks.self_attn.\2_norm.weight", layer=1),
    *_linear(_AT + r"attn\.proj", "blocks.self_attn.out", 1),
    Rule(_AT + r"pre_crs_attn_norm\.weight", "blocks.cross_norm.scale", layer=1),
    Rule(_AT + r"pre_crs_attn_norm\.bias", "blocks.cross_norm.bias", layer=1),
    *_linear(_AT + r"cross_attn\.q_linear", "blocks.cross_attn.q", 1),
    *_linear(_AT + r"cross_attn\.kv_linear", "blocks.cross_attn.kv", 1, _side_by_side(2)),
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
    device: Device = None,
) -> LongCatDiT:
    """Loads the transformer from the released safetensors.

    Args:
        source: a file, a folder of shards, or several of either.
        config: sizes and dtype; the stored weights are cast to `config.dtype`.
        device: where the parameters go, as for `models.common.load`; on several devices
            `sharding.placement(mesh)`.

    Raises:
        CheckpointError: with every missing shard, or every missing, unused and misshapen name.
    """
    return load(skeleton(config), checkpoint_shards(source), RULES, device=device)


def check_dit(source: str | Path | Iterable[str | Path], config: LongCatConfig) -> None:
    """Raises what `load_dit` would raise, from the headers of the files alone."""
    check(skeleton(config), checkpoint_shards(source), RULES)


def random_dit(
    config: LongCatConfig,
    seed: int = 0,
    *,
    device: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> LongCatDiT:
    """The transformer with random weights, made on the device: for benchmarks.

    Matrices are uniform with variance 1 / inputs, scales are 1 and biases 0. Stacked matrices are made layer by
    layer, so beside the weights there is never more than one layer of one matrix in float32.
    """
    graphdef, state = nnx.split(skeleton(config))
    places = device and nnx.from_flat_state(
        [(p, device(".".join(map(str, p)), v.shape)) for p, v in nnx.to_flat_state(state)]
    )

    def uniform(key, shape, dtype):
        bound = math.sqrt(3 / shape[0])
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)

    @functools.partial(jax.jit, out_shardings=places)
    def make():
        # XLA's own generator: threefry takes far longer to compile and to run for billions.
        key, filled = jax.random.key(seed, impl="rbg"), []
        for i, (path, v) in enumerate(nnx.to_flat_state(state)):
            keys, stacked = jax.random.fold_in(key, i), path[0] == "blocks"
            if path[-1] != "kernel":
                x = jnp.full(v.shape, float(path[-1] != "bias"), v.dtype)
            elif stacked:
                one = functools.partial(uniform, shape=v.shape[1:], dtype=v.dtype)
                x = jax.lax.map(one, jax.random.split(keys, v.shape[0]))
            else:
                x = uniform(keys, v.shape, v.dtype)
            filled.append((path, v.replace(x)))
        return nnx.from_flat_state(filled)

    return nnx.merge(graphdef, make())
