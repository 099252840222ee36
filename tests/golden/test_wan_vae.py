"""Wan VAE against the golden vectors: float32 to 1e-4 absolute, bfloat16 to 5 % relative L2."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from models.common import CheckpointError
from models.wan_vae import WanVAE, WanVAEConfig, load_wan_vae, to_uint8
from tests.support.golden import close

SUBJECT = "self_forcing"
BF16_RELATIVE_L2 = 0.05


@pytest.fixture(scope="module")
def io(vectors):
    return vectors("vae_tiny_io")


@pytest.fixture(scope="module")
def fields(folder):
    return folder.config["vae"]


@pytest.fixture(scope="module")
def vae(folder, fields):
    config = WanVAEConfig.from_json(fields, dtype=jnp.float32)
    return load_wan_vae(folder.path / "vae_tiny.safetensors", config)


def channels_last(x_BCTHW):
    return np.moveaxis(x_BCTHW, 1, -1)


def frames_first(x_BCTHW):
    return np.moveaxis(x_BCTHW, 1, 2)


decode = jax.jit(lambda vae, latent: vae.decode(latent))
decode_raw_stream = jax.jit(lambda vae, latent, past: vae.decode_raw_stream(latent, past))
encode = jax.jit(lambda vae, video: vae.encode(video))
encode_stream = jax.jit(lambda vae, video, past: vae.encode_stream(video, past))


def test_latent_statistics(vae, io):
    np.testing.assert_allclose(vae.config.mean, io["mean"], rtol=1e-6)
    np.testing.assert_allclose(vae.config.std, io["std"], rtol=1e-6)


def test_decoder_stages_on_the_first_frame(vae, io):
    @jax.jit
    def stages(vae, latent_BFCHW):
        x = vae.denormalize(jnp.moveaxis(latent_BFCHW, 2, -1))
        out = {"decode_denorm": x, "decode_conv2": (x := vae.conv_latent(x))}
        decoder = vae.decoder
        layers = {"conv1": decoder.conv_in}
        layers |= {f"middle{i}": layer for i, layer in enumerate(decoder.middle)}
        layers |= {f"up{i}": layer for i, layer in enumerate(decoder.upsamples)}
        x = x[:, :1]
        for name, layer in layers.items():
            x, _ = layer(x, None)
            out[f"dec1_{name}"] = x
        return out

    ours = stages(vae, io["latent"])
    golden = {k for k in io if k.startswith("dec1_")} | {"decode_denorm", "decode_conv2"}
    assert ours.keys() == golden
    for name, x in ours.items():
        close(x, channels_last(io[name]))


def test_whole_video_and_stream(vae, io):
    past, raw, start = None, [], 0
    shapes = set()
    for i, frames in enumerate(io["stream_split"]):
        latent = io["latent"][:, start : start + frames]
        video, past = decode_raw_stream(vae, latent, past)
        close(video, frames_first(io[f"stream_part{i}"]))
        shapes.add(tuple(x.shape for x in jax.tree.leaves(past)))
        raw.append(video)
        start += frames
    assert len(shapes) == 1, "the past must keep its shapes"
    close(np.concatenate(raw, 1), frames_first(io["decode_raw"]))
    close(decode(vae, io["latent"]), io["decode_pixel"])

    slots = [np.moveaxis(np.asarray(x), -1, 1) for x in jax.tree.leaves(past)]
    assert len(slots) == io["stream_slots_used"]
    np.testing.assert_array_equal([x.shape for x in slots], io["stream_cache_shapes"])
    close(np.array([x.mean() for x in slots]), io["stream_cache_mean"])
    close(np.array([x.std(ddof=1) for x in slots]), io["stream_cache_std"])


def test_frame_by_frame_decoding_compiles_two_steps(vae, io):
    step = jax.jit(lambda vae, latent, past: vae.decode_raw_stream(latent, past))
    latent = np.concatenate([io["latent"], io["latent"][:, ::-1]])  # batches are independent
    past, raw = None, []
    for i in range(latent.shape[1]):
        video, past = step(vae, latent[:, i : i + 1], past)
        raw.append(video[:1])
        if i == 0:
            close(video[:1], frames_first(io["first_frame_decode"]))
    assert step._cache_size() == 2
    close(np.concatenate(raw, 1), frames_first(io["decode_raw"]))


def test_encode(vae, io):
    video = frames_first(io["video"])
    close(encode(vae, video), io["encode_latent"])
    ragged = encode(vae, video[:, : io["encode_ragged_nframes"]])
    close(ragged, io["encode_ragged"])


def test_encode_stream_in_steps(vae, io):
    video = frames_first(io["video"])
    n = vae.config.temporal_stride
    latent, past = encode_stream(vae, video[:, :1], None)
    close(latent, io["encode_image"])
    out = [latent]
    for i in range(1, video.shape[1], n):
        latent, past = encode_stream(vae, video[:, i : i + n], past)
        out.append(latent)
    close(np.concatenate(out, 1), io["encode_latent"])


def test_bfloat16(folder, fields, io):
    config = WanVAEConfig.from_json(fields, dtype=jnp.bfloat16)
    vae = load_wan_vae(folder.path / "vae_tiny.safetensors", config)
    mean, inverse_std = vae.statistics()
    np.testing.assert_array_equal(mean.astype(jnp.float32).ravel(), io["mean_bf16"])
    np.testing.assert_array_equal(inverse_std.astype(jnp.float32).ravel(), io["scale_inv_bf16"])
    golden = io["decode_pixel_bf16"]
    ours = decode(vae, io["latent"][:, : config.latent_frames(golden.shape[1])])
    assert ours.dtype == jnp.float32
    assert np.linalg.norm(ours - golden) < BF16_RELATIVE_L2 * np.linalg.norm(golden)


def test_diffusers_names_load_the_same(folder, vae, tmp_path):
    blocks = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2"}
    blocks |= {"residual.6": "conv2", "shortcut": "conv_shortcut"}
    level = vae.config.res_blocks + 2

    def diffusers_name(name):
        part, *rest = name.split(".")
        if part == "conv1":
            return ".".join(["quant_conv", *rest])
        if part == "conv2":
            return ".".join(["post_quant_conv", *rest])
        if rest[0] == "conv1":
            return ".".join([part, "conv_in", rest[1]])
        if rest[0] == "head":
            return ".".join([part, {"0": "norm_out", "2": "conv_out"}[rest[1]], rest[2]])
        tail = ".".join(rest[2:])
        for old, new in blocks.items():
            tail = tail.replace(old + ".", new + ".")
        i = int(rest[1])
        if rest[0] == "middle":
            where = ["resnets.0", "attentions.0", "resnets.1"][i]
            return f"{part}.mid_block.{where}.{tail}"
        if rest[0] == "downsamples":
            return f"{part}.down_blocks.{i}.{tail}"
        where = f"resnets.{i % level}" if i % level < level - 1 else "upsamplers.0"
        return f"{part}.up_blocks.{i // level}.{where}.{tail}"

    tensors = load_file(folder.path / "vae_tiny.safetensors")
    renamed = {diffusers_name(k): v for k, v in tensors.items()}
    assert "decoder.up_blocks.0.upsamplers.0.resample.1.weight" in renamed
    assert not any("residual" in k or "middle" in k for k in renamed)
    save_file(renamed, tmp_path / "vae.safetensors")
    other = load_wan_vae(tmp_path / "vae.safetensors", vae.config)
    jax.tree.map(np.testing.assert_array_equal, other, vae)


def test_wrong_checkpoint_lists_keys(folder, vae, tmp_path):
    tensors = load_file(folder.path / "vae_tiny.safetensors")
    kernel = tensors.pop("decoder.conv1.weight")
    tensors["decoder.conv0.weight"] = kernel
    tensors["conv2.bias"] = np.zeros(1, np.float32)
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError) as e:
        load_wan_vae(tmp_path / "vae.safetensors", vae.config)
    for text in ("3 problems", "unused: decoder.conv0.weight", "missing: decoder.conv_in.conv"):
        assert text in str(e.value)
    assert "misshapen: conv2.bias" in str(e.value)


def test_released_structure():
    config = WanVAEConfig.wan_2_1()
    vae = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    sizes = [x.size for x in jax.tree.leaves(vae)]
    assert (len(sizes), sum(sizes)) == (194, 126_892_531)
    assert (config.spatial_stride, config.temporal_stride) == (8, 4)
    assert config.video_frames(21) == 81
    assert [config.latent_frames(t) for t in (1, 4, 5, 81, 84)] == [1, 1, 2, 21, 21]
    channels = [p.conv.kernel.shape[-1] for p in vae.decoder.upsamples if hasattr(p, "conv")]
    assert channels == [192, 192, 96]


def test_bad_arguments_name_what_is_accepted():
    config = WanVAEConfig.wan_2_1()
    vae = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"accepted: \[B, F >= 1, 16, H, W\]"):
        vae.decode(jnp.zeros((1, 0, 16, 2, 2)))
    with pytest.raises(ValueError, match=r"accepted: \[B, F >= 1, 16, H, W\]"):
        vae.decode(jnp.zeros((1, 16, 3, 2, 2)))
    with pytest.raises(ValueError, match=r"accepted: \[B, 1 \+ 4 k, 3, Y, X\]"):
        vae.encode_stream(jnp.zeros((1, 4, 3, 16, 16)))
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(jnp.zeros((1, 5, 3, 16, 20)))
    with pytest.raises(ValueError, match=r"video.shape=\(1, 0, 3, 16, 16\)"):
        vae.encode(jnp.zeros((1, 0, 3, 16, 16)))
    with pytest.raises(ValueError, match="attn_scales"):
        WanVAEConfig.from_json({"attn_scales": [1]})
    with pytest.raises(ValueError, match="std has 16 values"):
        dataclasses.replace(config, std=(1.0,) * 16, mean=(0.0,) * 8, latent_channels=8)


def test_to_uint8():
    video = jnp.array([-2.0, -1.0, 0.0, 1.0, 3.0, 1 / 255]).reshape(1, 1, 3, 1, 2)
    out = to_uint8(video)
    assert out.shape == (1, 1, 1, 2, 3) and out.dtype == jnp.uint8
    np.testing.assert_array_equal(out[0, 0, 0].T.ravel(), [0, 0, 128, 255, 255, 128])
