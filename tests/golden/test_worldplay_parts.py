"""WorldPlay's cameras, actions, retrieval, positions and sampler against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.wan_rope import host_table, wan_rope
from models.worldplay.cameras import CameraPath, action_ids, walk
from models.worldplay.config import SamplerConfig
from models.worldplay.encoding import positions
from models.worldplay.latents import normalise
from models.worldplay.layers import sinusoid
from models.worldplay.prope import Camera, camera_matrices, per_token, transform, transposed
from models.worldplay.retrieval import select_frames, similarity
from models.worldplay.sampler import euler_step, step_sizes

SUBJECT = "worldplay"


def within(actual, expected, atol):
    actual = np.asarray(actual)
    if actual.dtype == jnp.bfloat16:
        actual = actual.astype(np.float32)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_pose_strings_become_cameras_and_actions(vectors):
    v = vectors("trajectory_io")
    cases = [i for i in range(len(v)) if f"s{i}_string" in v]
    assert cases
    for i in cases:
        path = CameraPath.from_string(str(v[f"s{i}_string"]), durations="truncate")
        within(path.c2w_F44, v[f"s{i}_c2w"], 1e-12)
        within(path.w2c_F44, v[f"s{i}_w2c"], 1e-12)
        within(path.intrinsics_F33, v[f"s{i}_K"], 1e-12)
        np.testing.assert_array_equal(path.actions_F, v[f"s{i}_action"])


def test_free_motions_become_cameras_and_actions(vectors):
    v = vectors("trajectory_io")
    assert list(v["m_keys"]) == ["forward", "right", "yaw", "pitch"]
    c2w_F44 = walk(v["m_motions"])
    within(c2w_F44, v["m_c2w"], 1e-12)
    within(np.linalg.inv(c2w_F44), v["m_w2c"], 1e-12)
    np.testing.assert_array_equal(action_ids(c2w_F44), v["m_action"])
    np.testing.assert_array_equal(action_ids(c2w_F44, third_person=True), v["m_action_tps"])


def test_retrieval_by_field_of_view_matches(vectors):
    v = vectors("memory_io")
    cases = [i for i in range(len(v)) if f"c{i}_args" in v]
    assert cases
    for i in cases:
        first, memory, recent, block = (int(n) for n in v[f"c{i}_args"])
        path = CameraPath.from_string(str(v[f"c{i}_pose"]))
        within(path.w2c_F44, v[f"c{i}_w2c"], 1e-6)
        expected = v[f"c{i}_similarity"]
        for q, h in np.ndindex(expected.shape):
            found = similarity(v["points"], path.w2c_F44[first + q], path.w2c_F44[h])
            assert abs(found - expected[q, h]) < 1e-6  # the same points, none at the edge
        sizes = dict(memory_frames=memory, recent_frames=recent, block_frames=block)
        chosen = select_frames(v["points"], path.w2c_F44, first, **sizes)
        np.testing.assert_array_equal(chosen, v[f"c{i}_selected"])


@pytest.mark.parametrize("rounding", ["", "_bf16"])
def test_camera_matrices_match_to_the_bit_in_bfloat16(vectors, rounding):
    v, dtype = vectors("prope_io"), jnp.bfloat16 if rounding else jnp.float32
    camera = jax.jit(lambda w, k: camera_matrices(w, k, dtype))(v["viewmats"], v["Ks"])
    atol = 0 if rounding else 2e-6
    within(camera.project, v["P" + rounding], atol)
    within(transposed(camera.project), v["P_T" + rounding], atol)
    within(camera.unproject, v["P_inv" + rounding], atol)


@pytest.mark.parametrize("kind", ["", "_noK"])
def test_camera_encoding_matches(vectors, kind):
    v = vectors("prope_io")
    k = None if kind else jnp.asarray(v["Ks"])
    camera = camera_matrices(jnp.asarray(v["viewmats"]), k)
    project, unproject = (per_token(m, v["q"].shape[2]) for m in camera)
    matrices = dict(q=transposed(project), k=unproject, v=unproject, o=project)
    for name, matrix in matrices.items():
        x = jnp.asarray(v["o_in" if name == "o" else name])
        within(transform(matrix, x), v[f"{name}_out{kind}"], 2e-6)


def test_rotary_tables_and_rotation_match(vectors):
    v = vectors("rope_io")
    head_dim, rows = v["table_cos_hd128"].shape[1], v["rows"]
    for name, table in zip(("cos", "sin"), host_table(head_dim, int(rows.max()) + 1), strict=True):
        table = np.repeat(table[rows], 2, axis=1).astype(np.float32)  # one value per pair
        within(table, v[f"table_{name}_hd128"], 2e-6)
        half = np.asarray(jnp.asarray(v[f"table_{name}_hd128"], jnp.bfloat16), np.float32)
        within(half, v[f"table_{name}_hd128_bf16"], 0)
        ours = np.asarray(jnp.asarray(table, jnp.bfloat16), np.float32)
        within(ours, v[f"table_{name}_hd128_bf16"], 2**-8)  # one step, where rounding was close

    frames, *grid = (int(n) for n in v["grid"])
    eye = jnp.broadcast_to(jnp.eye(4)[None, None], (1, frames, 4, 4))
    at_BTP = positions(jnp.arange(frames), tuple(grid), Camera(eye, eye))
    rope = wan_rope(head_dim)
    table = rope.table(at_BTP[..., :3])
    within(np.repeat(table.cos, 2, axis=-1)[:, None], v["grid_cos"], 2e-6)
    within(np.repeat(table.sin, 2, axis=-1)[:, None], v["grid_sin"], 2e-6)
    within(rope.rotate(jnp.asarray(v["x"]), table), v["x_rot"], 2e-6)


def test_sinusoids_of_timesteps_and_actions_match(vectors):
    v = vectors("embed_io")
    within(sinusoid(jnp.asarray(v["t"]), v["sinusoid256"].shape[1]), v["sinusoid256"], 1e-4)


def test_euler_steps_match_and_to_the_bit_in_bfloat16(vectors):
    v, sampler = vectors("sampler_io"), SamplerConfig()
    np.testing.assert_array_equal(sampler.timesteps, v["timesteps"])
    np.testing.assert_array_equal(sampler.sigmas, v["sigmas"])
    np.testing.assert_array_equal(step_sizes(sampler), v["dt"])
    step = jax.jit(euler_step)
    for kind, dtype, atol in (("f32", jnp.float32, 2e-6), ("bf16", jnp.bfloat16, 0)):
        wanted = [*v[f"{kind}_x"][1:], v[f"{kind}_final"]]
        for x, velocity, d, after in zip(
            v[f"{kind}_x"], v[f"{kind}_v"], v["dt"], wanted, strict=True
        ):
            moved = step(jnp.asarray(x, dtype), jnp.asarray(velocity, dtype), d)
            assert moved.dtype == dtype
            within(moved, after, atol)


def test_image_latent_is_normalised_by_channel(vectors):
    v = vectors("rollout_io")
    raw = jnp.swapaxes(jnp.asarray(v["image_latent_raw"]), 1, 2)
    ours = normalise(raw, v["latents_mean"], v["latents_std"])
    within(jnp.swapaxes(ours, 1, 2), v["first_image_condition"], 2e-6)
