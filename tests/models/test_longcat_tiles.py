"""LongCat with block-sparse attention: its config.json, the plain and the joint pass, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.longcat.condition import build_condition, view_condition
from models.longcat.config import LongCatConfig
from models.longcat.passes import cached_forward, clip_attention, clip_forward
from models.longcat.rope import clip_positions, model_rope
from models.longcat.settings import chosen_sizes, released_sizes
from models.runs.checkpoint_folder import Parts
from qvg_jax.attention.tiles import TileRule
from qvg_jax.errors import UserError
from tests.support.longcat_model import CONFIG, model, normal

SHAPE = (1, 6, 4, 8, 8)  # six latent frames of 4 x 4 tokens
GIVEN, FRAME = 2, 16
FILE = dict(depth=2, hidden_size=24, num_heads=2, enable_bsa=True)


def with_tiles(rule):
    """The tiny model with block-sparse attention."""
    other = nnx.merge(*nnx.split(model()))
    other.config = dataclasses.replace(CONFIG, tiles=rule)
    return other


def test_config_json_says_the_rule():
    released = dict(sparsity=0.9375, chunk_3d_shape_q=[4, 4, 4], chunk_3d_shape_k=[4, 4, 4])
    assert LongCatConfig.from_json(FILE | dict(bsa_params=released)).tiles == TileRule()
    assert LongCatConfig.from_json(FILE | dict(enable_bsa=False, bsa_params=released)).tiles is None
    by_mass = dict(sparsity=None, cdf_threshold=0.9, chunk_3d_shape_k=[2, 4, 4])
    rule = TileRule(query_tile=(4, 4, 8), key_tile=(2, 4, 4), sparsity=None, mass=0.9)
    assert LongCatConfig.from_json(FILE | dict(bsa_params=by_mass)).tiles == rule


def test_given_frames_read_tiles_of_their_own_and_the_rest_tiles_of_all_frames():
    rule = TileRule(query_tile=(1, 2, 2), key_tile=(2, 2, 2), sparsity=0.5)
    config = dataclasses.replace(CONFIG, tiles=rule)
    q, k, v = (jnp.asarray(normal(i, 1, 6 * FRAME, 2, 12)) for i in range(3))
    out = jax.jit(lambda *x: clip_attention(config, SHAPE, GIVEN)(*x, 0))(q, k, v)

    rope = model_rope(config)
    table = rope.table(clip_positions(config, 0, SHAPE))
    q, k = (np.asarray(rope.rotate(jnp.swapaxes(x, 1, 2), table))[0] for x in (q, k))  # (H, T, D)
    v, want = np.asarray(v)[0].swapaxes(0, 1), np.zeros_like(v)
    frame, row, column = np.indices((6, 4, 4)).reshape(3, -1)
    of_q, of_k = frame * 4 + row // 2 * 2 + column // 2, frame // 2 * 4 + row // 2 * 2 + column // 2
    for h in range(2):
        for n in range(of_q.max() + 1):
            mine = q[h, of_q == n]
            seen = 4 if n < 4 * GIVEN else 12  # key tiles of the given frames, and of all
            score = [mine.mean(0) @ k[h, of_k == m].mean(0) for m in range(seen)]
            kept = np.isin(of_k, np.argsort(score)[::-1][: seen // 2])
            p = np.exp(mine @ k[h, kept].T / np.sqrt(12))
            want[0, of_q == n, h] = p @ v[h, kept] / p.sum(1, keepdims=True)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


def test_a_forward_that_keeps_every_tile_is_the_dense_one():
    x, t = jnp.asarray(normal(0, *SHAPE)), jnp.full((1,), 300.0)
    forward = functools.partial(jax.jit(clip_forward, static_argnames="given_frames"), text_kv=None)
    all_tiles = TileRule(query_tile=(2, 2, 2), key_tile=(2, 4, 4), sparsity=0.0)
    half = TileRule(query_tile=(2, 2, 2), key_tile=(2, 2, 2), sparsity=0.5)
    dense = forward(model(), x, t, given_frames=GIVEN).out_BFZYX
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    near(forward(with_tiles(all_tiles), x, t, given_frames=GIVEN).out_BFZYX, dense)
    assert (
        jnp.abs(forward(with_tiles(half), x, t, given_frames=GIVEN).out_BFZYX - dense).max() > 1e-4
    )
    one = x[:, :1]  # a picture: the original leaves it dense
    near(forward(with_tiles(half), one, t).out_BFZYX, forward(model(), one, t).out_BFZYX)


def test_what_tiles_do_not_fit_is_refused():
    x, t = jnp.asarray(normal(0, *SHAPE)), jnp.zeros((1,))
    sparse = with_tiles(TileRule(query_tile=(2, 2, 2), key_tile=(2, 2, 2), sparsity=0.5))
    with pytest.raises(
        ValueError, match=r"query_tile=\(2, 2, 2\) does not divide grid=\(3, 4, 4\)"
    ):
        jax.eval_shape(
            lambda m, x: clip_forward(m, x, t, None, given_frames=3).out_BFZYX, sparse, x
        )
    cache = jax.eval_shape(build_condition, model(), x[:, :GIVEN])
    with pytest.raises(ValueError, match="not accepted in the cached pass"):
        jax.eval_shape(
            lambda m, c: cached_forward(m, x, t, None, view_condition(CONFIG, c, SHAPE)).out_BFZYX,
            sparse,
            cache,
        )
    parts = Parts(dit=(), vae=(), text=(), tokenizer=None, config=FILE | dict(bsa_params={}))
    options = type("Options", (), dict(weights="folder", layers=None))
    with pytest.raises(UserError, match="config.json in folder: enable_bsa=True is not accepted"):
        chosen_sizes(options, parts, released_sizes())
