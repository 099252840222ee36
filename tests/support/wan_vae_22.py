"""Made-up weights and inputs of a tiny Wan2.2 VAE, and what the released implementation returned.

`data/wan_vae_22.npz` (frame rate halved as in the released one) and `..._other_order.npz` hold a
configuration, the names and shapes of the tensors under both namings, and what the implementation
returned in float32. Weights and inputs are not stored but made by one rule:
numbers in [-1, 1) from the generator PCG64 seeded with the CRC-32 of a name, top 53 bits of each
output. A `gamma` is 1 + 0.3 of them, a `bias` 0.2, any other weight sqrt(3 / inputs); the video is
"video" as it is, the latent twice "latent".
"""

import dataclasses
import json
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from models.wan_vae import WanVAEConfig


def made_up(name, shape):
    """Numbers in [-1, 1) from a generator that the name seeds."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-52 - 1).reshape(shape)


def weight(name, shape):
    """The tensor of that name and shape."""
    x = made_up(name, shape)
    if name.endswith("gamma"):
        return (1 + 0.3 * x).astype(np.float32)
    scale = 0.2 if name.endswith("bias") else (3 / np.prod(shape[1:])) ** 0.5
    return (x * scale).astype(np.float32)


def case(name):
    """The arrays of a file in tests/data, its configuration as `stored`, and the made-up inputs."""
    with np.load(Path(__file__).parents[1] / "data" / f"{name}.npz") as file:
        out = {k: file[k] for k in file.files}
    stored = out["stored"] = json.loads(str(out.pop("config")))
    out["latent"] = 2 * made_up("latent", stored["latent_shape"]).astype(np.float32)
    out["video"] = made_up("video", stored["video_shape"]).astype(np.float32)
    return out


def case_config(stored):
    """The configuration of this project that the stored one describes."""
    fields = stored["fields"]
    assert fields["attn_scales"] == []
    return dataclasses.replace(
        WanVAEConfig.wan_2_2(dtype=jnp.float32),
        width=fields["dim"],
        decoder_width=fields["dec_dim"],
        multipliers=tuple(fields["dim_mult"]),
        latent_channels=fields["z_dim"],
        res_blocks=fields["num_res_blocks"],
        temporal=tuple(fields["temperal_downsample"]),
        mean=tuple(stored["mean"]),
        std=tuple(stored["std"]),
    )


def save_weights(stored, path):
    """Writes all tensors of the configuration to a file and returns its path."""
    save_file({name: weight(name, shape) for name, _, shape in stored["tensors"]}, path)
    return path
