"""The Wan2.2 VAE against vectors of the released implementation, tiny and with made-up weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from models.common import CheckpointError
from models.wan_vae import WanVAE, WanVAEConfig, load_wan_vae
from models.wan_vae.levels import average_down, duplicate_up, patchify, unpatchify
from tests.support.wan_vae_22 import case, case_config, save_weights, weight

RELATIVE = 1e-5  # largest difference to the largest value; measured: 1e-6
BF16_RELATIVE_L2 = 0.05


@pytest.fixture(scope="module")
def io():
    return case("wan_vae_22")


@pytest.fixture(scope="module")
def config(io):
    return case_config(io["stored"])


@pytest.fixture(scope="module")
def weights(io, tmp_path_factory):
    return save_weights(io["stored"], tmp_path_factory.mktemp("wan_vae_22") / "vae.safetensors")


@pytest.fixture(scope="module")
def vae(weights, config):
    return load_wan_vae(weights, config)


@pytest.fixture(autouse=True)
def true_float32():
    with jax.default_matmul_precision("highest"):
        yield


def close(ours, original):
    assert ours.shape == original.shape
    atol = RELATIVE * np.abs(original).max()
    np.testing.assert_allclose(np.asarray(ours), original, atol=atol, rtol=0)


decode_raw = jax.jit(lambda vae, latent: vae.decode_raw_stream(latent)[0])
encode = jax.jit(lambda vae, video: vae.encode(video))


def test_whole_video_decodes_as_the_original(weights, config, io):
    # The stream below runs its fine layers frame by frame, this one does not.
    vae = load_wan_vae(weights, dataclasses.replace(config, by_frame=False))
    close(decode_raw(vae, io["latent"]), io["decode_raw"])


def test_latent_by_latent_is_the_whole_and_compiles_two_steps(vae, io):
    step = jax.jit(lambda vae, latent, past: vae.decode_raw_stream(latent, past))
    past, raw, shapes = None, [], set()
    for i in range(io["latent"].shape[1]):
        video, past = step(vae, io["latent"][:, i : i + 1], past)
        raw.append(video)
        shapes.add(tuple(x.shape for x in jax.tree.leaves(past)))
    assert step._cache_size() == 2
    assert len(shapes) == 1, "the past must keep its shapes"
    close(np.concatenate(raw, 1), io["decode_raw"])

    slots = [np.asarray(x) for x in jax.tree.leaves(past)]
    np.testing.assert_array_equal([x.shape for x in slots], io["past_shapes"])
    close(np.array([x.mean() for x in slots]), io["past_mean"])
    close(np.array([x.std() for x in slots]), io["past_std"])


def test_encode_drops_a_ragged_tail_as_the_original(vae, io):
    close(encode(vae, io["video"][:, :-1]), io["encode_ragged"])


def test_frame_rate_halved_at_other_levels(tmp_path):
    # Where a level changes both frames and channels, the frames of a box have different channels:
    # only there does it show which of them the first frame of a video keeps.
    io = case("wan_vae_22_other_order")
    config = case_config(io["stored"])
    assert config.temporal == (True, False, True)
    vae = load_wan_vae(save_weights(io["stored"], tmp_path / "vae.safetensors"), config)
    close(decode_raw(vae, io["latent"]), io["decode_raw"])
    close(encode(vae, io["video"]), io["encode"])


def test_encode_an_image_then_four_frames_at_a_time(vae, io):
    step = jax.jit(lambda vae, video, past: vae.encode_stream(video, past))
    video = io["video"]
    latent, past = step(vae, video[:, :1], None)
    out = [latent]
    for i in range(1, video.shape[1], 4):
        latent, past = step(vae, video[:, i : i + 4], past)
        out.append(latent)
    assert step._cache_size() == 2
    close(np.concatenate(out, 1), io["encode"])


def test_bfloat16(weights, config, io):
    config = dataclasses.replace(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    vae = load_wan_vae(weights, config)
    ours = jax.jit(lambda vae, latent: vae.decode(latent))(vae, io["latent"][:, :2])
    assert ours.dtype == jnp.float32
    original = np.clip(io["decode_raw"][:, : ours.shape[1]], -1, 1)
    assert np.linalg.norm(ours - original) < BF16_RELATIVE_L2 * np.linalg.norm(original)


def test_boxes_of_a_level_keep_the_order_of_channel_frame_row_column():
    x = jnp.arange(2 * 4 * 2 * 3, dtype=jnp.float32).reshape(1, 2, 4, 2, 3)
    down = average_down(x, 12, 2, 2)
    assert down.shape == (1, 1, 2, 1, 12)
    # Channel 0 has 8 numbers in the box, averaged two by two along the columns.
    np.testing.assert_array_equal(down[0, 0, 0, 0, :4], x[0, :, :2, :, 0].mean(-1).ravel())
    first = average_down(x[:, :1], 12, 2, 2)  # zeros stand for the frame before the first
    np.testing.assert_array_equal(first[0, 0, 0, 0, :4], [0, 0, *x[0, 0, :2, :, 0].mean(-1)])

    up = duplicate_up(down, 3, 2, 2)
    assert up.shape == x.shape
    np.testing.assert_array_equal(up, x.mean(3, keepdims=True) + jnp.zeros_like(x))
    np.testing.assert_array_equal(unpatchify(patchify(x, 2), 2), x)
    np.testing.assert_array_equal(
        patchify(x, 2)[0, 0, 0, 0, :4],
        x[0, 0, :2, :, 0].T.ravel(),  # column, then row
    )


def test_diffusers_names_load_the_same(vae, io, tmp_path):
    tensors = io["stored"]["tensors"]
    renamed = {theirs: weight(name, shape) for name, theirs, shape in tensors}
    assert "decoder.up_blocks.0.upsampler.time_conv.weight" in renamed
    save_file(renamed, tmp_path / "vae.safetensors")
    other = load_wan_vae(tmp_path / "vae.safetensors", vae.config)
    jax.tree.map(np.testing.assert_array_equal, other, vae)


def test_wrong_checkpoint_lists_keys(io, config, tmp_path):
    tensors = {name: weight(name, shape) for name, _, shape in io["stored"]["tensors"]}
    level = "decoder.upsamples.1.upsamples"
    tensors[f"{level}.4.time_conv.bias"] = tensors.pop(f"{level}.3.time_conv.bias")
    tensors["encoder.downsamples.0.downsamples.2.resample.1.bias"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError) as e:
        load_wan_vae(tmp_path / "vae.safetensors", config)
    for text in (
        "3 problems",
        f"unused: {level}.4.time_conv.bias",
        f"missing: {level}.3.time_conv.bias",
        "misshapen: encoder.downsamples.0.downsamples.2.resample.1.bias",
    ):
        assert text in str(e.value)


def test_released_structure():
    config = WanVAEConfig.wan_2_2()
    vae = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    sizes = [x.size for x in jax.tree.leaves(vae)]
    assert (len(sizes), sum(sizes)) == (196, 704_688_668)
    assert (config.spatial_stride, config.temporal_stride) == (16, 4)
    assert vae.encoder.conv_in.conv.kernel.shape == (3, 3, 3 * 12, 160)
    assert vae.decoder.head.conv.conv.kernel.shape == (3, 3, 3 * 256, 12)
    shape = (1, 3, 48, 44, 80)
    video = jax.eval_shape(
        lambda vae, z: vae.decode(z), vae, jax.ShapeDtypeStruct(shape, "float32")
    )
    assert video.shape == (1, 9, 3, 704, 1280)
    assert jax.eval_shape(lambda vae, x: vae.encode(x), vae, video).shape == shape


def test_bad_arguments_name_what_is_accepted():
    config = WanVAEConfig.wan_2_2()
    vae = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"accepted: \[B, F >= 1, 48, H, W\]"):
        vae.decode(jnp.zeros((1, 1, 16, 2, 2)))
    with pytest.raises(ValueError, match="multiples of 16"):
        vae.encode(jnp.zeros((1, 1, 3, 16, 24)))
    uneven = dataclasses.replace(config, multipliers=(3, 1, 1, 1))
    with pytest.raises(ValueError, match="needs 160 x 4 to be a multiple of 480"):
        nnx.eval_shape(lambda: WanVAE(uneven, rngs=nnx.Rngs(0)))
