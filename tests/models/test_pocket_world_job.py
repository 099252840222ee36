"""The path of the main job on pocket world, and what of it has a ground truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.pocket_world import camera, job, route, world
from models.pocket_world.entry import Options
from qvg_jax.errors import UserError
from tests.support.tiny_world import as_in_its_own_process, random_weights


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with as_in_its_own_process(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """`--out` is a folder of the current one unless told otherwise."""
    monkeypatch.chdir(tmp_path)


def test_the_default_path_goes_back_and_forth_without_a_cut():
    tour, path = 8, route.path_of(3, 8, 30, None)
    there = list(range(tour))
    back = there[-2::-1]
    want = [*there, *(back + there[1:]) * 3]
    np.testing.assert_array_equal(path, path[want[: len(path)]])
    assert np.abs(np.diff(path, axis=0)[:, :2]).max() <= camera.SPEED


def test_an_endless_path_wanders_on_from_the_tour_without_a_cut():
    path = route.path_of(3, 8, 400, None, True)
    np.testing.assert_array_equal(path[:8], route.path_of(3, 8, 30, None)[:8])
    assert np.abs(np.diff(path, axis=0)[:, :2]).max() <= camera.SPEED
    assert np.abs(path[:, :2]).max() <= route.HALF_WIDTH + camera.SPEED


def test_a_bounded_memory_does_not_grow_with_the_frames(weights):
    sizes = [
        job.prepare(Options(weights=str(weights), tour=8, frames=f, endless=True, memory=64))
        for f in (16, 4000)
    ]
    shapes = [jax.tree.map(jnp.shape, [arm.state for arm in j.arms]) for j in sizes]
    assert shapes[0] == shapes[1]
    for wrong in (dict(memory=64), dict(recall=True)):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}=.* needs --endless"):
            job.prepare(Options(weights=str(weights), tour=8, **wrong))


def test_actions_repeat_from_the_end_of_the_tour():
    path = route.path_of(3, 8, 6, camera.parse_actions("d-1,s-1"))
    want = np.array([[8, 0, 0], [0, 8, 0]] * 3, np.float32)
    np.testing.assert_array_equal(np.diff(path[7:], axis=0), want)


def test_seen_is_the_share_of_the_view():
    far, half = [10_000.0, 0, 0], [world.WIDTH / 2, 0, 0]
    path = np.array([[0, 0, 0], [0, 0, 0], half, far, [0, 0, 2]], np.float32)
    seen = route.seen_in_tour(path, 1)
    np.testing.assert_allclose(seen, [1, 1, 0.5, 0, 0.25], atol=0.03)


def test_a_longer_video_runs_the_same_program(weights):
    sizes = [(12, 40), (48, 400)]
    jobs = [job.prepare(Options(weights=str(weights), tour=t, frames=f)) for t, f in sizes]
    shapes = [jax.tree.map(jnp.shape, [arm.state for arm in j.arms]) for j in jobs]
    assert shapes[0] == shapes[1]
    layouts = [j.arms[1].state.cache.layout for j in jobs]
    assert layouts[0] == layouts[1]


def test_blocks_have_the_truth_of_their_own_time(weights):
    run = job.prepare(Options(weights=str(weights), tour=8, frames=8, seed=4))
    blocks = list(run.blocks)
    assert [bool(b.x.given) for b in blocks] == [True, True, False, False]
    assert np.concatenate([b.x.time for b in blocks]).tolist() == list(range(16))
    poses = np.concatenate([b.x.pose[0] for b in blocks])
    render = jax.jit(world.render)
    for frame in (0, 9, 14):
        want = render(jnp.array(4), poses[frame : frame + 1], jnp.array([frame]))[0]
        got = blocks[frame // 4].truth_FHW3[frame % 4] / 127.5 - 1
        np.testing.assert_allclose(got, want, atol=0.5 / 127.5 + 1e-4)  # half a level of 255
    before = np.concatenate([b.x.before[0] for b in blocks])
    np.testing.assert_array_equal(before[1:], poses[:-1])


def test_what_of_the_options_is_not_used_is_said(weights, caplog):
    size = dict(weights=str(weights), tour=4, codec="rtn")
    job.prepare(Options(**size, actions="w-8", frames=8))
    assert not caplog.records
    with caplog.at_level("INFO"):
        job.prepare(Options(**size, actions="w-8", frames=4, compare=("bf16",)))
    cut, always = caplog.records
    assert cut.levelname == "WARNING" and "the last 4 of its 8 frames are not made" in cut.message
    assert "--compare bf16 changes nothing" in always.message


def test_all_arms_start_from_the_same_noise(weights):
    run = job.prepare(
        Options(weights=str(weights), codec="qvg", compare=("rtn", "qvg"), tour=4, frames=4)
    )
    assert [arm.name for arm in run.arms] == ["bf16", "qvg", "rtn"]
    keys = [jax.random.key_data(arm.state.key).tolist() for arm in run.arms]
    assert keys[0] == keys[1] == keys[2]
    other = job.prepare(Options(weights=str(weights), seed=1, tour=4, frames=4))
    assert jax.random.key_data(other.arms[0].state.key).tolist() != keys[0]
