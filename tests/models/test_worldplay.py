"""What WorldPlay promises beyond agreeing with the reference; no vectors needed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.worldplay.cameras import CameraPath
from models.worldplay.config import SamplerConfig, WorldPlayConfig
from models.worldplay.encoding import encode_keys, encode_values, growth, model_encodings
from models.worldplay.history import History, make_cache, side_by_side
from models.worldplay.params import skeleton
from models.worldplay.pipeline import WorldPlay
from models.worldplay.request import Walk, block_inputs
from models.worldplay.retrieval import select_frames
from models.worldplay.schedule import network_calls
from qvg_jax.attention.api import attend
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import identity
from qvg_jax.loop import run_chunk

CONFIG = WorldPlayConfig(
    layers=2,
    width=24,
    heads=2,
    ffn_width=32,
    latent_channels=4,
    out_channels=4,
    time_width=8,
    text_width=6,
    text_slots=5,
    rope_frames=24,
    frames_per_block=2,
    dtype=jnp.float32,
)
SHORT = SamplerConfig(steps=(1000.0, 600.0))
PATH = CameraPath.from_string("w-3,right-3,s-3,left-2")
PLAIN = identity(jnp.float32)
TWO_BIT = presets.qvg(num_centroids=4, group=12)


@functools.cache
def model():
    """Random weights from NumPy: the initialisers of a network take seconds to compile."""
    graphdef, state = nnx.split(skeleton(CONFIG))
    rng = np.random.default_rng(0)

    def draw(path, x):
        norm = any("norm" in str(part) for part in path)
        spread = 0.1 if norm else x.shape[-2] ** -0.5 if len(x.shape) > 1 else 0.1
        return jnp.asarray(float(norm) + spread * rng.normal(size=x.shape), x.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


@functools.cache
def pipeline(history=None):
    return WorldPlay(model(), sampler=SHORT, history=history)


def request(frames=12, **changes):
    text_BUE = np.random.default_rng(0).normal(size=(1, 4, CONFIG.text_width)).astype(np.float32)
    fields = dict(text_BUE=text_BUE, path=PATH, frames=frames, latent_height=4, latent_width=4)
    fields |= dict(noise=jax.random.key(1), capacity=12)  # one program for most tests
    return Walk(**(fields | changes))


@functools.cache
def plain_video():
    return pipeline().generate(request(), chunk=1)


def pieces(path, n=CONFIG.frames_per_block):
    for i in range(0, len(path), n):
        parts = (path.c2w_F44, path.intrinsics_F33, path.actions_F)
        yield CameraPath(*(x[i : i + n] for x in parts))


def test_a_shorter_video_runs_the_same_program():
    whole = plain_video()
    assert whole.shape == (1, 12, 4, 4, 4) and np.isfinite(whole).all()
    compiled = run_chunk._cache_size()
    short = pipeline().generate(request(4), chunk=1)
    assert run_chunk._cache_size() == compiled
    np.testing.assert_array_equal(short, whole[:, :4])


def test_stream_walks_on_piece_by_piece():
    asked = []

    def hands():
        for piece in pieces(PATH):
            asked.append(len(piece))
            yield piece

    blocks = pipeline().stream(request(path=None), pieces=hands())
    first = next(blocks)
    assert asked == [2]  # a piece is asked for only when its block is due
    np.testing.assert_array_equal(first, plain_video()[:, :2])
    np.testing.assert_array_equal(next(blocks), plain_video()[:, 2:4])


def test_picture_camera_and_action_each_change_the_video():
    whole = plain_video()
    image = np.random.default_rng(1).normal(size=(1, 4, 4, 4)).astype(np.float32)
    with_image = pipeline().generate(request(image_BZYX=image), chunk=1)
    np.testing.assert_array_equal(with_image[:, 0], image)
    assert np.abs(with_image[:, 1:] - whole[:, 1:]).max() > 1e-3
    turned = CameraPath(PATH.c2w_F44, 2 * PATH.intrinsics_F33, PATH.actions_F)
    renamed = CameraPath(PATH.c2w_F44, PATH.intrinsics_F33, PATH.actions_F + 1)
    for other in (turned, renamed):
        assert np.abs(pipeline().generate(request(path=other), chunk=1) - whole).max() > 1e-3


def test_one_stored_k_and_v_give_what_two_encodings_give():
    """Also with spans, a tail that is never compressed, and a codec that only stores."""
    history = History.qvg(PLAIN, storage="single", span_blocks=2, keep_recent=1)
    spans = []
    latents = pipeline(history).generate(
        request(), chunk=1, progress=lambda *c: spans.append(int(c[2].cache.num_spans))
    )
    np.testing.assert_allclose(latents, plain_video(), rtol=0, atol=1e-4)
    assert spans == [0, 0, 0, 1, 1, 2]


def test_two_bit_memory_stays_near_and_repeats_itself():
    pipe = pipeline(History.qvg(TWO_BIT))
    one = pipe.generate(request(), chunk=1)
    # Blocks 0 and 1 read what was never compressed.
    np.testing.assert_allclose(one[:, :4], plain_video()[:, :4], rtol=0, atol=1e-5)
    distance = np.linalg.norm(one - plain_video()) / np.linalg.norm(plain_video())
    assert 1e-5 < distance < 0.1
    np.testing.assert_array_equal(pipe.generate(request(), chunk=1), one)


def test_a_video_goes_on_from_latents_of_an_earlier_run_bit_for_bit():
    pipe = pipeline(History.qvg(TWO_BIT))
    whole = pipe.generate(request(), chunk=1)
    again = pipe.generate(request(done_BFZYX=whole[:, :8]), chunk=1)
    np.testing.assert_array_equal(again, whole)
    marked = np.array(whole[:, :2] + 1)  # what is given is taken as it is
    np.testing.assert_array_equal(pipe.generate(request(2, done_BFZYX=marked)), marked)


def test_codecs_see_both_encodings_of_a_head_as_one_vector():
    seen = []

    def encode(x_BHTD, state, *, key=None):
        seen.append(x_BHTD)
        return PLAIN.encode(x_BHTD, state, key=key)

    codec = side_by_side(dataclasses.replace(PLAIN, encode=encode))
    x_BCTD = jax.random.normal(jax.random.key(0), (2, 6, 5, 4))
    packed, _ = codec.encode(x_BCTD, codec.init(x_BCTD.shape, x_BCTD.dtype))
    np.testing.assert_array_equal(codec.decode(packed, jnp.float32), x_BCTD)
    rope, prope = x_BCTD[:, 0::2], x_BCTD[:, 1::2]
    np.testing.assert_array_equal(seen[0], np.concatenate([rope, prope], -1))
    assert codec.nbytes(x_BCTD.shape) == x_BCTD.nbytes
    assert codec.bits_per_element(x_BCTD.shape) == 32


def test_recomputed_contexts_are_retrieved_and_bounded():
    path = CameraPath.from_string("right-6,left-6,w-2")
    history = History(semantics="recompute", memory_frames=6, recent_frames=4)
    blocks = list(block_inputs(CONFIG, history, request(None, path=path, capacity=None)))
    contexts = [x.context_S.tolist() for x in blocks]
    assert contexts[:3] == [[-1] * 6, [0, 1] + [-1] * 4, [0, 1, 2, 3, -1, -1]]
    assert contexts[6] == [0, 1, 8, 9, 10, 11]  # back to where the walk began
    for first, context in enumerate(contexts):
        assert max(context) < 2 * first or first == 0
    cache = make_cache(CONFIG, history, frames=14, latent_height=4, latent_width=4)
    assert cache.layout.window_blocks == 3 and not cache.layout.max_spans


LONG = CameraPath.from_string("w-30")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(path=LONG, frames=26, capacity=None), "sees 26 frames, more than the rope_frames=24"),
        (dict(path=LONG, frames=None, capacity=None), "sees 30 frames"),
        (dict(frames=14, capacity=None), "path has 12 frames and the video 14"),
        (dict(path=None), "path has 0 frames"),
        (dict(frames=5), "nearest: 4 and 6"),
        (dict(capacity=8), "frames=12 is more than capacity=8"),
        (dict(latent_width=5), "multiple of the patch 2 x 2"),
        (dict(text_BUE=np.zeros((1, 6, 6), np.float32)), "at most 5"),
        (dict(image_BZYX=np.zeros((1, 4, 4, 6), np.float32)), r"\(1, 4, 4, 6\)"),
        (dict(noise=np.zeros((1, 6, 4, 4, 4), np.float32)), "noise has 6 frames"),
        (dict(noise=np.zeros((1, 12, 4, 4, 6), np.float32)), "noise has shape"),
        (dict(done_BFZYX=np.zeros((1, 3, 4, 4, 4), np.float32)), "done_BFZYX has shape"),
        (dict(contexts=[[], [0]]), "a multiple of 2"),
        (dict(contexts=[[], [0, 1], [2, 3]]), "never forgets"),
        (dict(contexts=[[]]), "contexts are for 1 blocks"),
    ],
)
def test_bad_requests_say_what_is_wrong(changes, said):
    with pytest.raises(ValueError, match=said):
        pipeline().generate(request(**changes))


def test_a_walk_past_its_end_or_in_odd_pieces_is_refused():
    asked = request(4, path=None, capacity=12)
    blocks = pipeline().stream(asked, pieces=pieces(PATH))
    next(blocks), next(blocks)
    with pytest.raises(ValueError, match="after the last of 4 frames"):
        next(blocks)
    with pytest.raises(ValueError, match="piece of the path has 3 frames; accepted: 2"):
        next(pipeline().stream(asked, pieces=pieces(PATH, 3)))
    with pytest.raises(ValueError, match="frames=None with pieces"):
        pipeline().stream(request(None), pieces=[])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: History(semantics="forget"), "semantics='forget'"),
        (lambda: History(storage="none"), "storage='none'"),
        (lambda: History(key_codec=PLAIN), "both"),
        (lambda: History.qvg(PLAIN, semantics="recompute"), "need semantics='append'"),
        (lambda: History(span_blocks=0), "span_blocks=0"),
        (lambda: SamplerConfig(steps=(500.0, 600.0)), "must fall"),
        (lambda: dataclasses.replace(CONFIG, heads=4), "multiple of 4"),
        (lambda: dataclasses.replace(CONFIG, frames_per_block=30), "frames_per_block=30"),
        (lambda: select_frames(np.zeros((1, 3)), np.eye(4)[None], 0, recent_frames=6), "multiples"),
        (lambda: select_frames(np.zeros((1, 3)), np.eye(4)[None], 4), "outside the camera path"),
        (lambda: CameraPath(PATH.c2w_F44, PATH.intrinsics_F33[1:], PATH.actions_F), "intrinsics"),
        (lambda: CameraPath(np.nan * PATH.c2w_F44, PATH.intrinsics_F33, PATH.actions_F), "finite"),
        (lambda: CameraPath(PATH.c2w_F44, PATH.intrinsics_F33, PATH.actions_F + 80), "0..80"),
    ],
)
def test_bad_settings_say_what_is_wrong(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_single_storage_is_encoded_one_span_at_a_time():
    """Whatever the number of spans, the temporaries of attention are those of one."""
    B, T, C, D = 1, 8, 2 * CONFIG.heads, CONFIG.head_dim
    x = jax.ShapeDtypeStruct((B, T, C, D), jnp.float32)
    history = History.qvg(TWO_BIT, storage="single")
    read = jax.jit(functools.partial(attend, layer=1, rope=model_encodings(CONFIG)))
    temporaries = set()
    for frames in (12, 24):
        cache = jax.eval_shape(
            lambda frames=frames: make_cache(
                CONFIG, history, frames=frames, latent_height=4, latent_width=4
            )
        )
        memory = read.lower(x, cache, x, x).compile().memory_analysis()
        temporaries.add((cache.layout.max_spans > 0, memory.temp_size_in_bytes))
    assert len(temporaries) == 1 and cache.layout.heads == CONFIG.heads


def test_network_calls_of_a_long_video():
    calls = network_calls(CONFIG, SHORT, [0, 2, 4], image=True)
    assert [(c.context, c.first, c.end) for c in calls[:3]] == [(False, 0, 2)] * 2 + [(True, 0, 2)]
    assert calls[0].timesteps == (14.0, 1000.0) and calls[2].timesteps == (14.0, 14.0)
    assert len(calls) == 3 * len(SHORT.steps) + 2


def test_encodings_grow_no_more_than_they_say():
    """Also for the worst numbers: the signs of the matrix's largest row."""
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(1, 6, 12))
    where = np.concatenate([rng.integers(0, 9, (1, 6, 3)), matrices], -1)
    at = model_encodings(CONFIG).table(jnp.asarray(where, jnp.float32))
    of_keys, of_values = (float(g) for g in growth(at))
    rows = np.asarray(at.unproject).reshape(-1, 4)
    signs = np.sign(rows[np.abs(rows).sum(-1).argmax()])
    worst = np.tile(signs, (1, 2, 6, CONFIG.head_dim // 4))
    for x in (rng.uniform(-1, 1, worst.shape), worst):
        x = jnp.asarray(x, jnp.float32)
        assert float(jnp.abs(encode_keys(x, at)).max()) < 1.0001 * of_keys
        assert float(jnp.abs(encode_values(x, at)).max()) < 1.0001 * of_values
    assert float(jnp.abs(encode_values(jnp.asarray(worst), at)).max()) > 0.9999 * of_values
