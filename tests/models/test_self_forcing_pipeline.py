"""What the Self-Forcing pipeline promises beyond agreeing with the reference; no vectors needed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.wan_text import TextKV
from models.self_forcing.averaged_sink import before_the_window
from models.self_forcing.block import BlockNoise, State, draw_noise, generate_block
from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from models.self_forcing.history import History, append_frames, make_cache, recall
from models.self_forcing.params import random_dit, skeleton
from models.self_forcing.pipeline import Generation, SelfForcing
from models.self_forcing.schedule import compressions, network_calls, plan_blocks
from qvg_jax.cache.operations import KVCache, append, compress
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import identity
from qvg_jax.loop import run_chunk

CONFIG = SelfForcingConfig(
    layers=2,
    width=24,
    heads=2,
    ffn_width=32,
    latent_channels=4,
    out_channels=4,
    time_width=8,
    text_width=6,
    text_slots=5,
    dtype=jnp.float32,
)
SHORT = SamplerConfig(steps=(1000, 500))
PLAIN = identity(jnp.float32)
CAPACITY = 18


@functools.cache
def model():
    return random_dit(CONFIG, seed=0)


def request(frames, **changes):
    text_BUE = np.random.default_rng(0).normal(size=(1, 4, CONFIG.text_width)).astype(np.float32)
    fields = dict(text_BUE=text_BUE, frames=frames, latent_height=4, latent_width=4)
    fields |= dict(noise=jax.random.key(1), capacity=CAPACITY)  # one program for most tests
    return Generation(**(fields | changes))


def pipeline(history=None):
    return SelfForcing(model(), sampler=SHORT, history=history)


def test_stream_and_longer_videos_repeat_the_same_frames_without_recompiling():
    pipe, calls = pipeline(), []
    long = pipe.generate(request(12), chunk=1, progress=lambda *c: calls.append(c[:2]))
    assert long.shape == (1, 12, 4, 4, 4) and np.isfinite(long).all()
    assert calls == [(3, 12), (6, 12), (9, 12), (12, 12)]
    compiled = run_chunk._cache_size()
    short = pipe.generate(request(6), chunk=1)
    assert run_chunk._cache_size() == compiled
    np.testing.assert_array_equal(short, long[:, :6])
    parts = list(pipe.stream(request(6)))
    assert [p.shape[1] for p in parts] == [3, 3]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), short, rtol=0, atol=1e-5)


def test_the_first_block_may_take_other_steps():
    """As in Causal-Forcing++: after it, a video goes on as with the other schedule from the same block."""
    mixed = dataclasses.replace(SHORT, first_steps=(1000,))
    made = SelfForcing(model(), sampler=mixed).generate(request(6), chunk=1)
    assert np.abs(made[:, :3] - pipeline().generate(request(3), chunk=1)).max() > 1e-3
    after = pipeline().generate(request(6, initial_BFZYX=made[:, :3]), chunk=1)
    np.testing.assert_allclose(made, after, rtol=0, atol=1e-5)


def test_a_sink_averages_what_leaves_the_window():
    """As a list of frames does it; the sink lies before the window, whose last three frames are 12 to 14."""
    history = History(window_frames=9, sink_frames=3, sink_average=0.75)
    cache = make_cache(CONFIG, history, frames=18, latent_height=4, latent_width=4)
    size = cache.layout.block_tokens
    form = (CONFIG.layers, 1, 3 * size, CONFIG.heads, CONFIG.head_dim)
    step = jax.jit(functools.partial(append_frames, sink_average=history.sink_average))
    sink, window, left = [0.0, 1.0, 2.0], [], 0
    for first in range(0, 15, 3):
        frame_T = np.repeat(np.arange(first, first + 3), size)
        kv = jnp.broadcast_to(frame_T[None, None, :, None, None], form).astype(jnp.float32)
        pos = jnp.pad(frame_T.astype(np.float32)[None, :, None], ((0, 0), (0, 0), (0, 2)))
        cache = step(cache, kv, -kv, pos)
        for frame in range(max(first, 3), first + 3):
            if len(window) == 3:
                sink[left % 3] = 0.75 * sink[left % 3] + 0.25 * window.pop(0)
                left += 1
            window.append(frame)
    got = np.asarray(cache.dense_k)[0, 0, 0, : 3 * size : size, 0]
    np.testing.assert_allclose(got, sink, rtol=1e-6)
    np.testing.assert_allclose(
        cache.dense_v[..., : 3 * size, :], -cache.dense_k[..., : 3 * size, :]
    )
    moved = before_the_window(cache).dense_pos[0, ::size, 0]
    np.testing.assert_array_equal(np.sort(moved), np.arange(9, 15))
    np.testing.assert_array_equal(moved[:3], [9, 10, 11])
    for wrong in (dict(sink_frames=0), dict(window_frames=None), dict(sink_average=2.0)):
        with pytest.raises(ValueError, match="sink_average="):
            dataclasses.replace(history, **wrong)
    with pytest.raises(ValueError, match="sink_average=.* without codecs"):
        dataclasses.replace(history, key_codec=PLAIN, value_codec=PLAIN)


def test_another_key_and_another_prompt_make_another_video():
    pipe = pipeline()
    one = pipe.generate(request(3), chunk=1)
    other_noise = pipe.generate(request(3, noise=jax.random.key(2)), chunk=1)
    other_text = pipe.generate(request(3, text_BUE=-request(3).text_BUE), chunk=1)
    for other in (other_noise, other_text):
        assert np.abs(one - other).max() > 1e-2


def test_all_dtypes_draw_the_same_noise():
    full, half = (
        draw_noise(jax.random.key(0), dataclasses.replace(CONFIG, dtype=dtype), SHORT, (1, 3, 4, 4))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.start_BFZYX.dtype == jnp.bfloat16
    np.testing.assert_array_equal(full.start_BFZYX.astype(jnp.bfloat16), half.start_BFZYX)
    assert full.renoise_JBFZYX.shape == (1, 1, 3, 4, 4, 4)


def test_spans_that_only_store_change_nothing_and_bounded_ones_forget():
    whole = pipeline(History()).generate(request(15), chunk=1)
    stored = History.qvg(PLAIN, span_frames=3, sink_frames=1, keep_recent=2)
    np.testing.assert_allclose(
        pipeline(stored).generate(request(15), chunk=1), whole, rtol=0, atol=1e-5
    )

    bounded, sights = dataclasses.replace(stored, window_frames=11), []

    def look(done, total, state):
        sights.append(np.unique(recall(state.cache)[0]).tolist())

    latents = pipeline(bounded).generate(request(18), chunk=1, progress=look)
    assert all(0 in seen and len(seen) <= 11 for seen in sights)
    assert np.abs(latents[:, :9] - whole[:, :9]).max() < 1e-5
    assert np.abs(latents[:, 9:12] - whole[:, 9:12]).max() > 1e-4


def test_a_video_longer_than_the_table_of_positions_is_the_same_within_a_window():
    history = History.qvg(PLAIN, span_frames=3, window_frames=8)
    absolute = pipeline(history).generate(request(18), chunk=1)
    few_rows = dataclasses.replace(CONFIG, rope_frames=11, horizon=8)
    endless = SelfForcing(random_dit(few_rows, seed=0), sampler=SHORT, history=history)
    counted_back = endless.generate(request(18), chunk=1)
    np.testing.assert_array_equal(counted_back[:, :9], absolute[:, :9])  # up to the horizon
    np.testing.assert_allclose(counted_back, absolute, rtol=0, atol=1e-5)


def test_a_two_bit_history_stays_near_and_repeats_itself():
    codec = presets.qvg(num_centroids=4, group=12)
    pipe, states = pipeline(History.qvg(codec, span_frames=3)), []
    whole = pipeline(History()).generate(request(9), chunk=1)
    one = pipe.generate(
        request(9), chunk=1, progress=lambda *c: states.append(int(c[2].cache.num_spans))
    )
    assert states == [0, 1, 2]  # a span is compressed just before the next block runs
    np.testing.assert_array_equal(one[:, :3], whole[:, :3])
    distance = np.linalg.norm(one - whole) / np.linalg.norm(whole)
    assert 1e-4 < distance < 0.1
    np.testing.assert_array_equal(pipe.generate(request(9), chunk=1), one)


def test_a_sliding_window_sees_its_frames_and_the_sink():
    sights = []

    def look(done, total, state):
        sights.append(np.unique(recall(state.cache)[0]).tolist())

    history = History(window_frames=7, sink_frames=1)
    pipeline(history).generate(request(12), chunk=1, progress=look)
    assert sights == [[0, 1, 2], [0, 3, 4, 5], [0, 6, 7, 8], [0, 9, 10, 11]]


def test_given_frames_come_back_and_are_remembered():
    given = np.random.default_rng(3).normal(size=(1, 3, 4, 4, 4)).astype(np.float32)
    pipe = pipeline()
    one = pipe.generate(request(6, initial_BFZYX=given), chunk=1)
    np.testing.assert_array_equal(one[:, :3], given)
    other = pipe.generate(request(6, initial_BFZYX=-given), chunk=1)
    assert np.abs(one[:, 3:] - other[:, 3:]).max() > 1e-3


def test_plan_of_blocks_calls_and_compressions():
    blocks = plan_blocks(CONFIG, 180)
    assert [(b.first_frame, b.frames) for b in blocks[:2]] == [(0, 3), (3, 3)]
    assert len(blocks) == 60 and not any(b.given for b in blocks)
    events = compressions(blocks, span_frames=24)
    assert [e.stored // 3 for e in events] == [8, 16, 24, 32, 40, 48, 56]
    assert (events[-1].first, events[-1].end) == (144, 168)
    image = plan_blocks(CONFIG, 7, initial_frames=1)
    assert [(b.frames, b.given) for b in image] == [(1, True), (3, False), (3, False)]
    calls = network_calls(image, SamplerConfig(context_timestep=7.0))
    assert [c.timestep for c in calls[:6]] == [0.0, 1000.0, 937.5, 833.3333129882812, 625.0, 7.0]
    few = SamplerConfig(steps=(1000, 500), first_steps=(1000, 750, 500))
    assert [len(network_calls(b, few)) for b in (blocks[:1], blocks[1:2], image[:2])] == [4, 3, 4]
    with pytest.raises(ValueError, match="first_steps=.* must fall from noisy to clean"):
        SamplerConfig(first_steps=(500, 750))
    kept = compressions(blocks[:12], span_frames=6, keep_recent=6, sink_frames=3)
    assert [(e.first, e.end, e.stored) for e in kept[:2]] == [(3, 9, 15), (9, 15, 21)]


def test_released_size_traces_with_a_cache_of_the_published_size():
    config = SelfForcingConfig.wan_1_3b()
    fields = dict(frames=180, latent_height=60, latent_width=104)
    cache = jax.eval_shape(lambda: make_cache(config, History.qvg(identity()), **fields))
    assert cache.layout.span_shape == (1, 12, 37_440, 128)
    spans = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.span_k, cache.span_v)))
    assert spans / 30 / 2**20 == 1535.625  # MiB of bf16 a layer for the 168 frames of 7 spans
    text = jax.ShapeDtypeStruct((30, 1, 512, 12, 128), jnp.bfloat16)
    latents = jax.ShapeDtypeStruct((1, 3, 16, 60, 104), jnp.bfloat16)
    noise = BlockNoise(latents, jax.ShapeDtypeStruct((3, *latents.shape), jnp.bfloat16))
    state = State(cache=cache, text_kv=TextKV(text, text))
    step = functools.partial(generate_block, sampler=SamplerConfig())
    after, out = jax.eval_shape(step, skeleton(config), state, noise)
    assert (out.shape, out.dtype) == (latents.shape, latents.dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(frames=7), "nearest are 6 and 9"),
        (dict(frames=1026, capacity=None), "rope_frames=1024"),
        (dict(frames=6, capacity=3), "capacity=3"),
        (dict(latent_width=5), "multiple of the patch 2 x 2"),
        (dict(text_BUE=np.zeros((1, 6, 6), np.float32)), "at most 5"),
        (dict(initial_BFZYX=np.zeros((1, 2, 4, 4, 4), np.float32)), "initial_frames=2"),
        (dict(initial_BFZYX=np.zeros((1, 3, 4, 4, 6), np.float32)), r"\(1, 3, 4, 4, 6\)"),
        (dict(noise=[]), "noise is for 0 blocks; accepted: 2"),
    ],
)
def test_bad_requests_say_what_is_wrong(changes, said):
    with pytest.raises(ValueError, match=said):
        pipeline().generate(request(**(dict(frames=6) | changes)))


@pytest.mark.parametrize(
    ("history", "said"),
    [
        (lambda: History(window_frames=4, sink_frames=1), "at least 5"),
        (lambda: History.qvg(PLAIN, window_frames=24, span_frames=12), "at least 26"),
        (lambda: History(key_codec=PLAIN), "both"),
        (lambda: History(sink_frames=-1), "sink_frames=-1"),
    ],
)
def test_bad_histories_say_what_is_wrong(history, said):
    with pytest.raises(ValueError, match=said):
        make_cache(CONFIG, history(), frames=60, latent_height=4, latent_width=4)


def test_bad_samplers_are_refused():
    for steps in ((), (500, 750), (1001,), (500, 0)):
        with pytest.raises(ValueError, match="steps"):
            SamplerConfig(steps=steps)


def test_recall_reads_float8_scales_back():
    codec = presets.get("qvg-4bit", num_centroids=4, group=16)
    cache = KVCache.create(
        layers=2, heads=1, head_dim=16, block_tokens=4, sink_blocks=0, span_blocks=2, max_spans=2,
        keep_recent=1, pos_dims=3, key_codec=codec, value_codec=codec, dtype=jnp.float32,
    )  # fmt: skip
    k, v = jax.random.normal(jax.random.key(0), (2, 5, 2, 1, 4, 1, 16))
    for frame in range(5):
        place = jnp.full((1, 4, 3), float(frame))
        cache = compress(append(cache, k[frame], v[frame], place))
    assert int(cache.num_spans) == 2
    frames, k_back, v_back = recall(cache)
    np.testing.assert_array_equal(frames, np.repeat(np.arange(5.0), 4))
    for back, x in ((k_back, k), (v_back, v)):
        exact = np.concatenate(list(np.asarray(x)), axis=2)
        assert np.linalg.norm(back - exact) < 0.2 * np.linalg.norm(exact)
