"""A LongCat of a few thousand parameters, and a folder of checkpoints laid out like its release."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from models.longcat.config import LongCatConfig
from models.runs.checkpoint_folder import Sizes
from tests.support import tiny_self_forcing as shared
from tests.support.checkpoint_shapes import longcat_shapes

HEIGHT, WIDTH = 16, 32
CODEC = "qvg:num_centroids=4:group=16"


def sizes(dtype=jnp.float32) -> Sizes:
    """All three networks; real structure, hardly any width."""
    dit = LongCatConfig(
        layers=2, width=32, heads=2, mlp_ratio=1, time_width=8, condition_width=16, text_width=12,
        dtype=dtype,
    )  # fmt: skip
    return dataclasses.replace(shared.sizes(dtype), dit=dit)


def weights_folder(folder: Path) -> Path:
    """Two shards of the transformer with their index, VAE, text encoder, tokenizer."""
    c, draw = sizes(), np.random.default_rng(0)

    def arrays(shapes):
        return {n: (draw.normal(size=s) / 4).astype(np.float32) for n, s in shapes.items()}

    for name in ("dit", "vae", "text_encoder", "tokenizer"):
        (folder / name).mkdir(parents=True)
    weights = arrays(longcat_shapes(c.dit))
    names, index = sorted(weights), {}
    for i in (0, 1):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({n: weights[n] for n in names[i::2]}, folder / "dit" / shard)
        index |= {n: shard for n in names[i::2]}
    text = json.dumps({"weight_map": index})
    (folder / "dit" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    config = dict(
        depth=2, hidden_size=32, num_heads=2, mlp_ratio=1, adaln_tembed_dim=16, caption_channels=12,
        frequency_embedding_size=8, text_tokens_zero_pad=True, patch_size=[1, 2, 2],
    )  # fmt: skip
    (folder / "dit" / "config.json").write_text(json.dumps(config))
    save_file(arrays(shared.vae_shapes(c.vae)), folder / "vae" / "model.safetensors")
    save_file(arrays(shared.text_shapes(c.text)), folder / "text_encoder" / "model.safetensors")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


def lora(rank: int = 128, config: LongCatConfig | None = None) -> dict[str, np.ndarray]:
    """A LoRA of one matrix of every layer."""
    c, draw, found = config or sizes().dit, np.random.default_rng(1), {}
    for i in range(c.layers):
        at = "lora___lorahyphen___" + f"blocks.{i}.attn.proj".replace(".", "___lorahyphen___")
        found[at + ".lora_down.weight"] = draw.normal(size=(rank, c.width)).astype(np.float32) / 32
        found[at + ".lora_up.weight"] = draw.normal(size=(c.width, rank)).astype(np.float32) / 32
        found[at + ".alpha_scale"] = np.full((), 0.5, np.float32)
    return found
