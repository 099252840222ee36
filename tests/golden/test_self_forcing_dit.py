"""The Self-Forcing transformer against vectors of the PyTorch reference (float32, CPU)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.common.tokens import token_positions
from models.common.wan_layers import layer_norm, modulate
from models.common.wan_rope import axis_slots, host_table, wan_rope
from models.self_forcing.block import cached_forward
from models.self_forcing.config import SelfForcingConfig
from models.self_forcing.dense import block_causal_mask, dense_forward, teacher_forcing_mask
from models.self_forcing.history import (
    History,
    append_frames,
    block_positions,
    make_cache,
    recall,
)
from models.self_forcing.layers import sinusoid
from models.self_forcing.params import load_dit
from models.self_forcing.rope import model_rope
from tests.support.golden import close, distance, frames_first, stored_layers

SUBJECT = "self_forcing"


@pytest.fixture(scope="module")
def model(folder):
    sizes, n = folder.config["dit"], folder.config["num_frame_per_block"]

    @functools.cache
    def load(dtype=jnp.float32):
        config = SelfForcingConfig.from_wan(sizes, frames_per_block=n, dtype=dtype)
        return load_dit(folder.path / "dit_tiny.safetensors", config)

    return load


def near(actual, expected, limit=0.03):
    """Relative L2 distance of bfloat16 results, which round differently in every order."""
    assert distance(actual, expected) <= limit


@functools.partial(nnx.jit, static_argnames=("blocks", "window", "teacher"))
def dense(model, x, t, text, *, blocks=None, window=None, teacher=False):
    mask = frames = None
    if teacher:
        mask, frames = teacher_forcing_mask(blocks), np.tile(np.arange(sum(blocks)), 2)
    elif blocks is not None:
        mask = block_causal_mask(blocks, window)
    return dense_forward(model, x, t, model.text_kv(text), mask=mask, frames=frames).flow_BFZYX


def test_embeddings_match(vectors, model):
    v, m = vectors("dit_tiny_io"), model()
    t = jnp.asarray(v["temb_t"])
    close(sinusoid(t, m.config.time_width), v["temb_sin"], 1e-6)
    e_BFM, e_BF6M = nnx.jit(lambda m, t: m.time(t))(m, t[None])
    close(e_BFM[0], v["temb_e"])
    close(e_BF6M[0], v["temb_e0"])
    close(m.encode_text(jnp.asarray(v["context"])), v["text_emb_out"])
    close(m.patchify(frames_first(v["bidir_x"])), v["patch_out"])


def test_inside_of_the_layers_matches(vectors, model):
    v, m = vectors("dit_tiny_io"), model()

    @nnx.jit
    def walk(m, x_BFZYX, t_B, context):
        B, F, _, Y, X = x_BFZYX.shape
        e_BFM, e_BF6M = m.time(jnp.broadcast_to(t_B[:, None], (B, F)))
        text, rope = m.text_kv(context), model_rope(m.config)
        positions_TP = token_positions(jnp.arange(F), *m.config.grid(Y, X))
        table = rope.table(jnp.repeat(positions_TP[None], B, axis=0))

        def rotated(x):
            return jnp.swapaxes(rope.rotate(jnp.swapaxes(x, 1, 2), table), 1, 2)

        def attention(q, k, v):
            return jax.nn.dot_product_attention(rotated(q), rotated(k), v)

        block = m.layer(0)
        x = m.patchify(x_BFZYX)
        shift, scale, gate = jnp.moveaxis(block.modulation[...][None, None] + e_BF6M, 2, 0)[:3]
        y = modulate(layer_norm(x, m.config.eps), shift, scale)
        q = block.self_attn.query(y)
        out = {"selfattn_in": y, "norm_q": q.reshape(y.shape)}
        out["selfattn_out"] = block.self_attn.output(attention(q, *block.self_attn.key_value(y)))
        after = x + out["selfattn_out"] * jnp.repeat(gate, x.shape[1] // F, axis=1)
        out["crossattn_out"] = block.cross_attention(
            block.cross_norm(after), jax.tree.map(lambda a: a[0], text)
        )
        out = {f"blk0_{name}": a for name, a in out.items()}
        for i in range(m.config.layers):
            x, _ = m.layer(i)(x, e_BF6M, jax.tree.map(lambda a, i=i: a[i], text), attention)
            out[f"blk{i}_out"] = x
        return out | {"head_out": m.head(x, e_BFM)}

    x, t, context = frames_first(v["bidir_x"]), jnp.asarray(v["bidir_t"]), v["context"]
    found = walk(m, x, t, jnp.asarray(context))
    stored = stored_layers(v, "bidir_blk{}_out", m.config.layers)
    for i in set(range(m.config.layers)) - set(stored):
        del found[f"blk{i}_out"]
    for name, value in found.items():
        close(value, v[f"bidir_{name}"])


def test_forward_without_cache_matches(vectors, model):
    v, m = vectors("dit_tiny_io"), model()
    n, context = m.config.frames_per_block, jnp.asarray(v["context"])

    def check(x, t, expected, text=context[:1], keep=None, **kwargs):
        flow = dense(m, x, jnp.asarray(t), text, **kwargs)
        close(np.swapaxes(flow[:, keep:], 1, 2), v[expected])

    check(frames_first(v["bidir_x"]), v["bidir_t"], "bidir_out", context)
    x, t = frames_first(v["cmask_x"]), v["cmask_t"]
    blocks = (n,) * (x.shape[1] // n)
    check(x, t, "cmask_out", blocks=blocks)
    for window in filter(None, (re.fullmatch(r"cmask_local(\d+)_out", name) for name in v)):
        check(x, t, window[0], blocks=blocks, window=int(window[1]))
    x_first, t_first = frames_first(v["cmask_i2v_x"]), v["cmask_i2v_t"]
    blocks_first = (1,) + (n,) * (x_first.shape[1] // n)
    check(x_first, t_first, "cmask_i2v_out", blocks=blocks_first)
    both = jnp.concatenate([frames_first(v["tf_clean_x"]), x], axis=1)
    t_both = np.concatenate([np.zeros_like(t), t], axis=1)
    check(both, t_both, "tf_out", keep=x.shape[1], blocks=blocks, teacher=True)


def empty_cache(m, history, x):
    B, F, _, Y, X = x.shape
    return make_cache(m.config, history, frames=F, latent_height=Y, latent_width=X, batch=B)


@nnx.jit
def two_passes(model, cache, text_kv, x, t):
    """A block at its timesteps, then half of it as the clean block: outputs stacked on axis 0."""
    positions_BTP = block_positions(model.config, cache, x.shape)
    view = cache.view(positions_BTP, model_rope(model.config))

    def one(x_t):
        return cached_forward(model, *x_t, text_kv, view, keep_kv=True)

    out = jax.lax.map(one, (jnp.stack([x, x / 2]), jnp.stack([t, 0 * t])))
    after = [append_frames(cache, k, v, positions_BTP) for k, v in zip(*out[1:], strict=True)]
    return out.flow_BFZYX, after


def check_cache(m, expected, prefix, cache, before=None, distance=close):
    """K as attention sees it, and V, of all frames in the cache, and in `before` if given.

    The reference keeps the newest block inside its window, we beside it: frames that have just
    left our sliding window are still in theirs.
    """
    frames = {}
    for c in (before, cache):
        if c is not None:
            frame, k, v = recall(c, model_rope(m.config))
            for f in np.unique(frame):
                frames[f] = [x[:, :, frame == f] for x in (k, v)]
    kv = [np.concatenate(x, axis=2) for x in zip(*(frames[f] for f in sorted(frames)), strict=True)]
    for i in stored_layers(expected, f"{prefix}_k_l{{}}", m.config.layers):
        for name, x in zip("kv", kv, strict=True):
            reference = expected[f"{prefix}_{name}_l{i}"]
            distance(x[i], reference[:, : x.shape[2]])
            assert not reference[:, x.shape[2] :].any()  # slots that were never filled


def test_block_by_block_with_cache_matches(vectors, model):
    v, m = vectors("dit_tiny_io"), model()
    x, t, n = frames_first(v["cached_x"]), jnp.asarray(v["cached_t"]), m.config.frames_per_block
    text_kv = m.text_kv(jnp.asarray(v["context"]))
    for i in stored_layers(v, "cached_xattn_k_l{}", m.config.layers):
        close(text_kv.k_LBUHD[i], v[f"cached_xattn_k_l{i}"])
        close(text_kv.v_LBUHD[i], v[f"cached_xattn_v_l{i}"])
    cache = empty_cache(m, History(), x)
    for b, expected in enumerate(v["cached_out"]):
        here = slice(b * n, (b + 1) * n)
        flow, (cache, _) = two_passes(m, cache, text_kv, x[:, here], t[:, here])
        close(np.swapaxes(flow[0], 1, 2), expected)
        assert int(cache.tokens) == v[f"cached_gei_b{b}"] == v[f"cached_lei_b{b}"]
    check_cache(m, v, "cached", cache)


def test_sliding_windows_match(vectors, model):
    v, m = vectors("dit_tiny_io"), model()
    x, t, n = frames_first(v["roll_x"]), jnp.asarray(v["roll_t"]), m.config.frames_per_block
    text_kv = m.text_kv(jnp.asarray(v["context"][:1]))
    runs = [re.fullmatch(r"roll_l(\d+)_s(\d+)_out", name) for name in v]
    for run in filter(None, runs):
        window, sink = (int(number) for number in run.groups())
        cache = empty_cache(m, History(window_frames=window, sink_frames=sink), x)
        name = run[0].removesuffix("_out")
        for b in range(x.shape[1] // n):
            here = slice(b * n, (b + 1) * n)
            before = cache
            flow, (_, cache) = two_passes(m, cache, text_kv, x[:, here], t[:, here])
            close(np.swapaxes(flow, 2, 3), v[f"{name}_out"][2 * b : 2 * b + 2])
            S = cache.layout.block_tokens
            assert int(before.tokens) + n * S == v[f"{name}_lei_b{b}"]
            assert int(cache.seen_blocks) * S == v[f"{name}_gei_b{b}"]
        check_cache(m, v, name, cache, before)


def test_bfloat16_stays_near(vectors, model):
    v, m = vectors("dit_tiny_io"), model(jnp.bfloat16)
    count, n = len(v["bf16_out"]), m.config.frames_per_block
    x = frames_first(v["cached_x"][:1]).astype(jnp.bfloat16)
    t = jnp.asarray(v["cached_t"][:1])
    text_kv = m.text_kv(jnp.asarray(v["context"][:1]))
    cache = empty_cache(m, History(), x)
    for b in range(count):
        here = slice(b * n, (b + 1) * n)
        flow, (cache, _) = two_passes(m, cache, text_kv, x[:, here], t[:, here])
        near(np.swapaxes(flow[0], 1, 2), v["bf16_out"][b])
        assert int(cache.tokens) == v[f"bf16_gei_b{b}"] == v[f"bf16_lei_b{b}"]
    check_cache(m, v, "bf16", cache, distance=near)


def test_rope_matches(vectors):
    names = vectors("rope_io")
    for head_dim in sorted({int(re.match(r"d(\d+)_", name)[1]) for name in names}):
        prefix = f"d{head_dim}_"
        check_rope(
            head_dim, {k[len(prefix) :]: a for k, a in names.items() if k.startswith(prefix)}
        )


def check_rope(head_dim, v):
    assert axis_slots(head_dim) == tuple(v["split"])
    cos, sin = host_table(head_dim, 1024)
    close(cos[v["rows"]], v["cos"], 1e-12)
    close(sin[v["rows"]], v["sin"], 1e-12)

    rope = wan_rope(head_dim)

    @functools.partial(jax.jit, static_argnames=("grid", "pad"))
    def rotated(x, first, *, grid, pad=0):
        positions_TP = token_positions(first + jnp.arange(grid[0]), *grid[1:])
        positions_TP = jnp.pad(positions_TP, ((0, pad), (0, 0)))  # position 0 does not rotate
        table = rope.table(jnp.repeat(positions_TP[None], x.shape[0], axis=0))
        return jnp.swapaxes(rope.rotate(jnp.swapaxes(x, 1, 2), table), 1, 2)

    grid = tuple(int(n) for n in v["grid"][0])
    x = jnp.asarray(v["x"])
    close(rotated(x, 0, grid=grid), v["rope0"], 2e-6)
    close(rotated(x, 177, grid=grid), v["rope_start177"], 2e-6)
    pad = v["xpad"].shape[1] - np.prod(grid)
    close(rotated(jnp.asarray(v["xpad"]), 0, grid=grid, pad=int(pad)), v["rope_pad"], 2e-6)
    long = v["xlong"].shape[1] // (grid[1] * grid[2])
    close(rotated(jnp.asarray(v["xlong"]), 0, grid=(long, *grid[1:])), v["rope_long"], 2e-6)
    half = np.asarray(rotated(x.astype(jnp.bfloat16), 177, grid=grid), np.float32)
    expected = v["rope_start177_bf16"]
    np.testing.assert_allclose(half, expected, rtol=2**-7, atol=0)  # one bf16 step
    assert (half != expected).mean() < 1e-3  # and almost all are equal
