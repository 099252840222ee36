"""LingBot-World as a configuration: schedules, memories, cameras, and a tiny walk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.lingbot.camera import CameraMaps, camera_map, latent_poses, steps_of
from models.lingbot.condition import image_condition
from models.lingbot.config import LingBotConfig, history, sampler
from models.lingbot.modeling import LingBotDiT, Residual
from models.lingbot.pipeline import SteeredWalk, generate, stream
from models.lingbot.recalling import Recaller, world_to_camera
from models.self_forcing.history import History, make_cache
from models.self_forcing.sampler import Ladder
from models.worldplay.cameras import parse_actions, walk
from models.worldplay.retrieval import ball_points, similarity
from qvg_jax.codecs.base import identity

TINY = LingBotConfig(
    layers=2,
    width=24,
    heads=2,
    ffn_width=32,
    time_width=8,
    text_width=6,
    text_slots=5,
    rope_frames=16,
    frames_per_block=2,
    dtype=jnp.float32,
)
K = np.array([[500.0, 0, 416], [0, 500.0, 240], [0, 0, 1]])
PATH = walk(parse_actions("w-3,right-4"))


@pytest.mark.parametrize(
    ("version", "shift", "timesteps"),
    [
        (1, 10, [999, 978, 947, 825]),
        (2, 10, [999, 967, 908, 768]),
        (1, 5, [999, 957, 899, 702]),
        (2, 5, [999, 937, 833, 624]),
    ],
)
def test_timesteps_are_the_released_ones(version, shift, timesteps):
    ladder = Ladder(sampler(version, shift=shift))
    np.testing.assert_array_equal(ladder.steps, timesteps)
    assert (np.abs(ladder.step_sigmas[:-1] * 1000 - ladder.steps - 0.5) <= 0.5 + 1e-3).all()
    assert ladder.step_sigmas[-1] == 0


def test_released_sizes_and_the_memories_of_the_launches():
    config = LingBotConfig.world_14b(1)
    model = nnx.eval_shape(lambda: LingBotDiT(config, rngs=nnx.Rngs(0)))
    assert model.patch.kernel.shape == (36 * 4, 5120) and model.head.project.kernel.shape[1] == 64
    assert model.camera_in.kernel.shape == (1536, 5120)
    cameras = sum(x.size for x in jax.tree.leaves(model.blocks.camera))
    cameras += sum(x.size for m in (model.blocks.camera_scale, model.blocks.camera_shift)
                   for x in jax.tree.leaves(m))  # fmt: skip
    assert round(cameras / 40 / 1e6) == 105
    with pytest.raises(ValueError, match="version=3"):
        LingBotConfig.world_14b(3)

    def layout(version, compressed=True):
        size = dict(frames=240, latent_height=90, latent_width=160)
        config, kept = LingBotConfig.world_14b(version), history(version, compressed=compressed)
        return jax.eval_shape(lambda: make_cache(config, kept, **size)).layout

    one, two, plain = layout(1), layout(2), layout(2, compressed=False)
    assert (one.span_blocks, one.max_spans, one.sink_blocks, one.overflow) == (24, 9, 0, "error")
    assert one.span_bits < 4 < two.span_bits < 5
    assert (two.span_blocks, two.keep_recent, two.sink_blocks) == (4, 4, 6)
    # Spans and what waits to be one fill the 68 frames but for a ragged end; so does a window.
    assert two.overflow == plain.overflow == "drop"
    assert two.sink_blocks + 4 * two.max_spans + two.window_blocks + 4 in range(64, 72)
    assert plain.sink_blocks + plain.window_blocks + 4 == 68


def test_camera_maps_hold_origin_and_direction_of_every_ray():
    maps = camera_map(PATH, K, 480, 832)
    assert maps.shape == (8, 384, 60, 104) and maps.dtype == np.float32
    pixels = maps.reshape(8, 6, 8, 8, 60, 104).transpose(0, 4, 2, 5, 3, 1).reshape(8, 480, 832, 6)
    start, ray = pixels[..., :3], pixels[..., 3:]
    np.testing.assert_allclose(np.linalg.norm(ray, axis=-1), 1, atol=1e-6)
    assert not start[0].any() and not start[5].any()  # the first frame, and turns on the spot
    np.testing.assert_allclose(start[1, 0, 0], [0, 0, 1], atol=1e-6)  # the longest step is 1
    middle = ray[1, 239:241, 415:417].mean((0, 1))
    np.testing.assert_allclose(middle, [0, 0, 1], atol=1e-3)
    assert ray[1, 240, 831, 0] > 0.6 and ray[1, 479, 416, 1] > 0.4  # right, and down
    turned = ray[5, 239:241, 415:417].mean((0, 1))
    np.testing.assert_allclose(turned[0], np.sin(np.radians(3)), atol=1e-3)
    moved = walk([[1.0, 2.0, 0.5, 0.2]])[-1] @ PATH
    np.testing.assert_allclose(camera_map(moved, K, 480, 832), maps, atol=1e-5)
    small = camera_map(PATH, K, 240, 416).reshape(8, 6, 8, 8, 30, 52)
    corner = small[1, 3:, 0, 0, 0, 0]  # the same corner, in pixels twice as large
    np.testing.assert_allclose(corner, ray[1, 0:2, 0:2].mean((0, 1)), atol=2e-3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: camera_map(PATH, K, 484, 832), "multiples of 8"),
        (lambda: steps_of(PATH[0]), "accepted: \\(frames, 4, 4\\)"),
        (lambda: steps_of(np.nan * PATH), "not finite"),
        (lambda: run(camera_BFCYX=np.zeros((1, 8, 384, 4, 6))), "camera_BFCYX has shape"),
        (lambda: run(frames=7), "nearest are 6 and 8"),
    ],
)
def test_bad_input_says_what_is_wrong(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@functools.cache
def model():
    """Random weights from NumPy: the initialisers of a network take seconds to compile."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LingBotDiT(TINY, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(draw, state))


def request(frames=8, image=1.0, path=PATH, **changes):
    rng = np.random.default_rng(1)
    latents = np.zeros((1, frames, 16, 4, 4), np.float32)
    latents[:, 0] = image * rng.normal(size=latents.shape[2:])
    fields = dict(
        text_BUE=rng.normal(size=(1, 3, 6)).astype(np.float32),
        condition_BFZYX=image_condition(latents),
        camera_BFCYX=camera_map(path[:frames], K, 32, 32)[None],
        noise=jax.random.key(0),
    )
    return SteeredWalk(**(fields | changes))


def run(frames=8, kept=None, image=1.0, path=PATH, **changes):
    asked = request(frames, image, path, **changes)
    return generate(model(), sampler(2), kept or History(), asked, chunk=1)


def test_a_walk_depends_on_image_and_camera_and_not_on_how_memory_is_stored():
    video = run()
    assert video.shape == (1, 8, 16, 4, 4) and np.isfinite(video).all()
    assert np.abs(run(image=2.0) - video).max() > 1e-3
    other = run(path=walk(parse_actions("s-2,up-5")))
    assert np.abs(other[:, 2:] - video[:, 2:]).max() > 1e-3
    spans = History.qvg(identity(jnp.float32), span_frames=2, keep_recent=2, sink_frames=2)
    np.testing.assert_allclose(run(kept=spans), video, atol=1e-4)


def test_spans_that_left_the_window_come_back_by_field_of_view(monkeypatch):
    """A walk that turns away and comes back, with two spans in sight; also one that goes on."""
    motion = steps_of(walk(parse_actions("right-7,left-8")))
    spans = History.qvg(identity(jnp.float32), span_frames=2, sink_frames=2, window_frames=9)
    chosen, call = [], Recaller.__call__

    def watched(self, state, x):
        state = call(self, state, x)
        chosen.append((self.chosen, self.store.next))
        return state

    monkeypatch.setattr(Recaller, "__call__", watched)

    def video(recall, done=0):
        maps = CameraMaps(motion, K, 32, 32)
        asked = request(16, camera_BFCYX=maps, done_BFZYX=known[:, :done])
        return np.concatenate([*stream(model(), sampler(2), spans, asked, recall=recall)], 1)

    known = np.zeros((1, 16, 16, 4, 4), np.float32)
    plain, known = video(False), video(True)
    np.testing.assert_array_equal(known[:, :10], plain[:, :10])  # all spans are in sight until then
    assert np.abs(known[:, 10:] - plain[:, 10:]).max() > 1e-4
    points, w2c = ball_points(np.random.default_rng(0)), world_to_camera(motion)
    assert len(chosen) == 8 and chosen[-1][1] == 5
    for block, (ids, kept) in enumerate(chosen):
        queries = w2c[2 * block : 2 * block + 2]
        view = [
            np.mean([similarity(points, q, w2c[2 + 2 * i + h]) for q in queries for h in (0, 1)])
            for i in range(kept)
        ]
        assert len(ids) == min(kept, 2)
        np.testing.assert_allclose(sorted(view[i] for i in ids), sorted(view)[kept - len(ids) :])
    assert chosen[-1][0] != (3, 4)  # the newest, which stay without recall
    np.testing.assert_array_equal(video(True, done=10), known)
    with pytest.raises(ValueError, match="accepted: CameraMaps"):
        next(stream(model(), sampler(2), spans, request(), recall=True))


def test_the_camera_scales_and_shifts_a_layer():
    block, rng = model().layer(0), np.random.default_rng(2)
    x, c = (jnp.asarray(rng.normal(size=(1, 3, 24)), jnp.float32) for _ in range(2))
    assert isinstance(block.camera, Residual)

    def matrix(linear, y):
        return y @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])

    up = matrix(block.camera.up, np.asarray(c))
    g = np.asarray(c) + matrix(block.camera.down, up / (1 + np.exp(-up)))
    want = (1 + matrix(block.camera_scale, g)) * np.asarray(x) + matrix(block.camera_shift, g)
    np.testing.assert_allclose(block.steer(x, c), want, atol=1e-5)


def test_poses_of_latent_frames_are_spread_over_those_of_video_frames():
    poses = walk(parse_actions("w-9,right-2,w-1"))  # 13 video frames: latent frames at 0, 4, 8, 12
    got = latent_poses(poses, 2)
    np.testing.assert_allclose(got, poses[[0, 4, 8, 12]], atol=1e-12)
    np.testing.assert_allclose(latent_poses(poses, 3), poses[[0, 4, 8]], atol=1e-12)
    # 10 video frames: latent frames at 0, 4.5, 9; one turned by 0, one half way, one by 18 degrees.
    turning = walk(np.tile([0.0, 1.0, np.radians(2), 0.0], (9, 1)))
    middle = latent_poses(turning, 3)[1]
    angle = np.degrees(np.arctan2(middle[0, 2], middle[0, 0]))
    np.testing.assert_allclose(angle, 9, atol=1e-6)
    np.testing.assert_allclose(middle[:3, 3], turning[4:6, :3, 3].mean(0), atol=1e-12)
    np.testing.assert_array_equal(latent_poses(turning[:1], 1), turning[:1])
    with pytest.raises(ValueError, match="N at least 5"):
        latent_poses(turning[:4], 2)


def test_maps_of_some_frames_are_those_of_all():
    maps = CameraMaps(steps_of(PATH), K, 48, 80)
    whole = camera_map(PATH, K, 48, 80)
    assert maps.shape == (1, *whole.shape)
    np.testing.assert_array_equal(maps[:, 2:5][0], whole[2:5])
