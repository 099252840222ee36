"""Pocket world: the renderer, paths, the network's bookkeeping, training, weights and evaluation."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.common.checkpoint import CheckpointError
from models.pocket_world import (
    camera,
    data,
    evaluate,
    modeling,
    objective,
    params,
    pipeline,
    sampling,
    train,
    trial,
    world,
)
from models.pocket_world.config import PocketWorldConfig
from models.pocket_world.overlap import Overlap
from qvg_jax.loop import rollout

render = jax.jit(world.render)
STILL = jnp.zeros((1, 3))


def frame(seed, x=0.0, y=0.0, altitude=0.0, time=0):
    pose = jnp.array([[x, y, altitude]], jnp.float32)
    return np.asarray(render(jnp.int32(seed), pose, jnp.array([time], jnp.int32)))[0]


def test_a_place_looks_the_same_whenever_the_camera_returns():
    np.testing.assert_array_equal(frame(3, 40, -72), frame(3, 40, -72, time=world.CLOCK))
    assert np.abs(frame(3, 40, -72) - frame(4, 40, -72)).mean() > 0.1


def test_moving_the_camera_shifts_the_image():
    here, east = frame(3), frame(3, x=camera.SPEED)
    shift = int(camera.SPEED)
    np.testing.assert_allclose(here[:, shift:], east[:, :-shift], atol=2e-3)


def test_rising_shows_more_and_things_move():
    high = frame(3, altitude=2)  # two world units a pixel
    small = frame(3).reshape(32, 2, 48, 2, 3).mean((1, 3))
    assert np.corrcoef(high[16:48, 24:72].ravel(), small.ravel())[0, 1] > 0.9
    assert any(np.abs(frame(s) - frame(s, time=8)).max() > 0.3 for s in range(4))


def test_actions_are_parsed_and_followed():
    actions = camera.parse_actions("w-2, d-1,up-3,s-1")
    assert [camera.ACTIONS[a] for a in actions] == ["w", "w", "d", "up", "up", "up", "s"]
    path = np.asarray(camera.follow(jnp.zeros(3), jnp.asarray(actions)))
    step = camera.SPEED
    np.testing.assert_array_equal(path[-1], [step, -step, world.MAX_ALTITUDE])


@pytest.mark.parametrize("text", ["", "w", "w-0", "w-1.5", "w--3", "fly-3", "w-2,,d-1", "w-2;d-1"])
def test_bad_actions_name_themselves(text):
    with pytest.raises(ValueError, match="accepted"):
        camera.parse_actions(text)


def test_walks_stay_inside_and_on_the_lattice():
    walk = np.asarray(camera.wander(jax.random.key(1), jnp.zeros(3), 600, 64.0))
    assert np.abs(walk[:, :2]).max() <= 64 + camera.SPEED
    assert set(np.unique(walk[:, 2])) <= {0.0, 1.0, 2.0}
    np.testing.assert_array_equal(walk[:, :2] % camera.SPEED, 0)
    assert len({tuple(p) for p in walk}) < 400  # it meets places again


def test_tokens_of_the_same_place_have_the_same_position():
    patch = 16
    poses = jnp.array([[0.0, 0, 0], [16.0, 0, 0], [0.0, 0, 2]])
    position = np.asarray(camera.token_positions(poses, jnp.arange(3), patch)).reshape(3, 4, 6, 4)
    np.testing.assert_array_equal(position[0, :, 1:, 1:], position[1, :, :-1, 1:])
    np.testing.assert_allclose(np.diff(position[2, 0, :, 2]), 2.0)
    np.testing.assert_array_equal(position[:, 0, 0, 0], [0, 1, 2])


def test_a_jump_is_told_as_a_cut():
    poses = jnp.array([[8.0, 0, 0], [800.0, 0, 0]])
    before = jnp.array([[0.0, 0, 0], [8.0, 0, 0]])
    features = np.asarray(camera.frame_features(poses, before, jnp.array([0, 8])))
    np.testing.assert_allclose(features[0, :4], [1, 0, 0, 0])
    np.testing.assert_allclose(features[1, :4], [0, 0, 0, 1])
    np.testing.assert_allclose(features[1, 4:6], [1, 0], atol=1e-6)


def test_patches_round_trip():
    frames = jax.random.normal(jax.random.key(0), (2, 3, world.HEIGHT, world.WIDTH, 3))
    tokens = modeling.to_tokens(frames, 16)
    assert tokens.shape == (2, 3 * 24, 768)
    np.testing.assert_array_equal(modeling.to_frames(tokens, 16), frames)
    np.testing.assert_array_equal(tokens[0, 1].reshape(16, 16, 3), frames[0, 0, :16, 16:32])


def test_noisy_blocks_see_earlier_clean_blocks_and_themselves():
    shape = data.SequenceShape(near=1, distractors=0, recent=1, run=1)  # 5 clean, 2 noisy
    mask = np.asarray(objective.sequence_mask(shape.blocks, shape.memory, 1))[0, 0]
    np.testing.assert_array_equal(mask[:5, :5], np.tri(5, dtype=bool))
    assert not mask[:5, 5:].any()
    np.testing.assert_array_equal(mask[5], [1, 1, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(mask[6], [1, 1, 1, 1, 0, 0, 1])


def test_own_frames_take_the_place_of_the_newest_blocks():
    cfg, shape = (
        train.TrainConfig.smoke(),
        data.SequenceShape(near=1, distractors=0, recent=1, run=1),
    )
    model = modeling.PocketWorld(cfg.model, rngs=nnx.Rngs(0))
    batch = jax.jit(lambda key: train.sample_batch(key, cfg, shape, 8))(jax.random.key(0))
    own_context = nnx.jit(objective.own_context, static_argnames="blocks")
    tokens, own = own_context(model, jax.random.key(1), batch, blocks=shape.blocks)
    assert bool(own[:, -1].all()) and not bool(own[:, 0].all())
    assert bool((own[:, 1:] >= own[:, :-1]).all())  # from one block on, to the end
    same = jnp.all(tokens == modeling.to_tokens(batch[0], cfg.model.patch), axis=-1)
    same = same.reshape(*own.shape, -1)
    np.testing.assert_array_equal(same.all(-1), ~own)
    assert not bool((same & own[..., None]).any())


@pytest.mark.slow
def test_training_continues_from_weights(trained, tmp_path):
    cfg = train.TrainConfig.smoke()
    _, state = train.init_state(cfg, jnp.float32, trained[3])
    weights = nnx.to_pure_dict(nnx.state(params.load_weights(trained[3])))
    jax.tree.map(np.testing.assert_array_equal, state["params"], weights)
    wider = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, width=64))
    with pytest.raises(ValueError, match="width=64"):
        train.init_state(wider, jnp.float32, trained[3])


def test_a_patch_that_does_not_divide_the_frame_is_refused():
    with pytest.raises(ValueError, match="patch=10"):
        PocketWorldConfig(patch=10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A smoke run that is interrupted after two steps, and then resumed."""
    out = tmp_path_factory.mktemp("train")
    cfg = dataclasses.replace(
        train.TrainConfig.smoke(), stages=(train.TrainConfig.smoke().stages[1],)
    )
    rows = []
    train.train(cfg, out, steps=6, pause_after=0.0, dtype=jnp.float32, log=rows.append)
    assert not rows  # no time at all: nothing but a checkpoint of step 0
    programs = train.train_chunk._cache_size()
    _, state = train.train(cfg, out, steps=4, dtype=jnp.float32, log=rows.append)
    _, state = train.train(cfg, out, steps=6, dtype=jnp.float32, log=rows.append)
    assert train.train_chunk._cache_size() == programs + 1  # from a checkpoint on, too
    weights = out / "weights.safetensors"
    params.save_weights(weights, cfg.model, state["ema"], dict(steps=6))
    return out, state, rows, weights


@pytest.mark.slow
def test_training_resumes_where_it_stopped(trained):
    out, state, rows, _ = trained
    assert int(state["step"]) == 6
    assert [row["step"] for row in rows] == [2, 4, 6]
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert logged == rows
    assert all(np.isfinite(row["loss"]) for row in rows)
    moved = jax.tree.map(lambda p, e: float(jnp.abs(p - e).max()), state["params"], state["ema"])
    assert max(jax.tree.leaves(moved)) > 0


def test_training_needs_one_length(tmp_path):
    with pytest.raises(ValueError, match="exactly one"):
        train.train(train.TrainConfig.smoke(), tmp_path, steps=1, minutes=1.0)


@pytest.mark.slow
def test_weights_round_trip_and_bad_files_are_named(trained, tmp_path):
    _, state, _, weights = trained
    cfg, card = params.read_header(weights)
    assert cfg == PocketWorldConfig.smoke()
    assert card == {"steps": 6}
    model = params.load_weights(weights)
    np.testing.assert_allclose(
        model.patch_in.kernel[...], state["ema"]["patch_in"]["kernel"], rtol=1e-3, atol=1e-6
    )
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(weights.read_bytes()[:-100])
    for bad in (torn, tmp_path / "missing.safetensors"):
        with pytest.raises(CheckpointError, match=bad.name):
            params.load_weights(bad)


def test_the_shipped_weights_are_the_base_model():
    cfg, _ = params.read_header(params.DEFAULT_WEIGHTS)
    assert cfg == PocketWorldConfig.base()
    assert params.DEFAULT_WEIGHTS.stat().st_size < 24e6


def test_sampler_levels_and_limits():
    levels = sampling.Sampler(steps=3, shift=2.0).levels()
    np.testing.assert_allclose(levels, [1, 0.8, 0.5, 0])
    overlapping = sampling.Sampler(steps=4, shift=2.0, overlap=0.5)
    np.testing.assert_allclose(overlapping.levels(), [1, 0.8, 0.5, 0.25])
    assert sampling.Sampler(steps=1, overlap=0.5).levels() == (1, 0)
    with pytest.raises(ValueError, match="steps=0"):
        sampling.Sampler(steps=0)
    with pytest.raises(ValueError, match="sharpness=-1"):
        sampling.Sampler(sharpness=-1)
    with pytest.raises(ValueError, match="overlap=1"):
        sampling.Sampler(overlap=1)


def test_logits_grow_with_a_history_longer_than_those_of_training():
    assert sampling.Sampler().logit_scale(1000, 64) is None
    scale = [float(sampling.Sampler(sharpness=0.1).logit_scale(n, 64)) for n in (1, 40, 80, 160)]
    np.testing.assert_allclose(scale, [0.125, 0.125, 0.1375, 0.15], rtol=1e-6)


def test_block_inputs_must_be_whole_blocks():
    with pytest.raises(ValueError, match="block_frames=4"):
        pipeline.block_inputs(PocketWorldConfig.smoke(), jnp.array([1]), jnp.zeros((1, 10, 3)), 4)


def test_a_second_order_step_is_exact_where_the_prediction_is_linear_in_the_noise_level():
    """dx/ds = (x - c(s)) / s with c = a + b s has the solution x(s) = C s + a - b s log s."""
    a, b, c = jnp.array([0.3, -1.0]), jnp.array([0.5, 2.0]), jnp.array([1.0, 0.1])

    def exact(s):
        return c * s + a - b * s * jnp.log(s)

    for now, then in ((1.0, 0.7), (0.7, 0.05)):
        got = sampling.second_order_step(exact(now), a + b * now, b, now, then)
        np.testing.assert_allclose(got, exact(then), rtol=1e-5)
    euler = sampling.second_order_step(exact(0.7), a + b * 0.7, 0.0, 0.7, 0.35)
    np.testing.assert_allclose(euler, (exact(0.7) + a + b * 0.7) / 2, rtol=1e-5)
    np.testing.assert_allclose(sampling.second_order_step(exact(0.7), a, 0.0, 0.7, 0.0), a)


def test_overlapping_patches_lie_on_the_corners_of_the_others():
    grid, key = Overlap(16), jax.random.key(0)
    pose = jnp.array([[[8.0, 0, 0], [0, 16, 2]]])
    own = camera.token_positions(pose[0], jnp.arange(2), 16).reshape(2, 4, 6, 4)
    between = (own[:, :-1, :-1] + own[:, 1:, 1:]) / 2
    np.testing.assert_allclose(grid.positions(pose, jnp.arange(2))[0], between.reshape(-1, 4))

    tokens = jax.random.normal(key, (1, 2 * 24, 768))
    np.testing.assert_allclose(grid.blend(tokens, grid.cut(tokens)), tokens, atol=1e-6)
    weight = grid.weight()  # nothing at its own borders, nearly all in the middle of a patch
    assert weight[0, 0] < 0.01 and weight[:, 16].max() < 0.51 and weight[8, 8] > 0.98
    np.testing.assert_allclose(weight, weight[::-1, ::-1])
    frames = modeling.to_frames(grid.blend(jnp.zeros_like(tokens), jnp.ones((1, 30, 768))), 16)
    np.testing.assert_allclose(frames[0, 0, 8:-8, 8:-8, 0], weight, atol=1e-6)
    assert not frames[:, :, :8].any() and not frames[:, :, :, -8:].any()


@pytest.mark.slow
def test_overlapping_patches_hide_the_seams_of_invented_places():
    model = params.load_weights(params.DEFAULT_WEIGHTS)
    path = camera.follow(jnp.zeros(3), camera.parse_actions("stay-4,w-8"))[None]
    xs = pipeline.block_inputs(model.cfg, jnp.array([3]), path, 4)

    def run(**settings):
        cache = pipeline.make_cache(model.cfg, pipeline.world_codec("bf16"), 12)
        step = pipeline.make_step(model, sampling.Sampler(**settings))
        return rollout(step, pipeline.WorldState(cache, jax.random.key(0)), xs, chunk=3)[1][1:]

    plain, overlapping = run(), run(overlap=sampling.FREE_OVERLAP)
    assert evaluate.seams(overlapping, 16) < 0.8 * evaluate.seams(plain, 16)
    assert abs(overlapping.std() / plain.std() - 1) < 0.1


@pytest.mark.slow
def test_given_blocks_pass_through_and_runs_repeat(trained):
    model = params.load_weights(trained[3])
    path = camera.wander(jax.random.key(0), jnp.zeros(3), 24, 64.0)[None]
    xs = pipeline.block_inputs(model.cfg, jnp.array([5]), path, 16)
    step = pipeline.make_step(model, sampling.Sampler(steps=2))

    def run(cache):
        return rollout(step, pipeline.WorldState(cache, jax.random.key(3)), xs, chunk=3)

    make = lambda: pipeline.make_cache(  # noqa: E731
        model.cfg, pipeline.world_codec("qvg"), 24, span_blocks=2, keep_recent=1
    )
    state, frames = run(make())
    assert int(state.cache.num_spans) == 2
    np.testing.assert_allclose(frames[:4], xs.frames[:4], atol=1e-6)
    again = run(make())[1]
    np.testing.assert_array_equal(frames, again)
    window = run(pipeline.make_window(model.cfg, 8))[0]
    assert int(window.cache.dropped_blocks) == 4


@pytest.mark.slow
def test_evaluation_runs_and_tabulates(trained, tmp_path, capsys):
    small = "--worlds 1 --tour 16 --frames 8 --steps 1 --free 8 --free-tour 8 --free-steps 1"
    argv = ["--out", str(tmp_path), "--weights", str(trained[3]), *small.split()]
    evaluate.main([*argv, "--arms", "bf16,window,free:bf16"])
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert set(rows) == {"bf16", "window", "free_bf16"}
    assert np.isfinite(rows["bf16"]["psnr"])
    assert "replay" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trial_of_recipes_runs_and_tabulates(trained, tmp_path, capsys):
    small = "--worlds 2 --seeds 1 --tour 16 --frames 8 --steps 1 --span-blocks 2"
    argv = ["--out", str(tmp_path), "--weights", str(trained[3]), *small.split()]
    trial.main([*argv, "--codecs", "bf16,rtn:group=32", "--against", "rtn:group=32"])
    shown = capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.npz")} == {"bf16.npz", "rtn+group_32.npz"}
    with np.load(tmp_path / "rtn+group_32.npz") as arm:
        assert int(arm["spans"]) > 0
    assert shown.count("rtn:group=32") >= 2
