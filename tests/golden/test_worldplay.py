"""The WorldPlay transformer and its cache against vectors of the PyTorch reference (CPU)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.worldplay.attention import cached_attention, dense_branches
from models.worldplay.block import State, look_from, remember_context
from models.worldplay.config import SamplerConfig
from models.worldplay.encoding import (
    apart,
    decode_outputs,
    encode_keys,
    encode_queries,
    encode_values,
    here,
    positions,
)
from models.worldplay.history import History, make_cache
from models.worldplay.memory import recall
from models.worldplay.prope import camera_matrices
from qvg_jax.attention.api import attend
from tests.support.golden import stored_layers
from tests.support.worldplay_model import close, close_kv, frames_at, frames_first, loader

SUBJECT = "worldplay"
BLOCK = 4  # latent frames, as the README of the vectors says
FORMS = [(s, f) for s in ("append", "recompute") for f in ("packed", "single")]


@pytest.fixture(scope="module")
def model(folder):
    return loader(folder)


def dense_attention_of(config, frames, shape, first):
    F, _, Y, X = shape[1:]
    camera = camera_matrices(frames.w2c_BF44, frames.intrinsics_BF33, config.dtype)
    at_BTP = positions(first + jnp.arange(F), config.grid(Y, X), camera)
    return dense_branches(here(config, at_BTP, camera))


@jax.jit
def dense(model, x, t_BF, frames, text, first):
    attention = dense_attention_of(model.config, frames, x.shape, first)
    out = model(x, t_BF, frames.actions_BF, model.text_kv(text), attention)
    return jnp.swapaxes(out.velocity_BFZYX, 1, 2)


@jax.jit
def walk_dense(model, x, t_BF, frames, text):
    """The inside of a call without cache: embeddings, residual stream after each layer."""
    attention = dense_attention_of(model.config, frames, x.shape, 0)
    text_kv, (e_BFM, e_BF6M) = model.text_kv(text), model.condition(t_BF, frames.actions_BF)
    inside = dict(temb=e_BFM[0], timestep_proj=e_BF6M[0].reshape(x.shape[1], -1))
    inside |= dict(text_proj=model.encode_text(text), patch=model.patchify(x))
    stream = inside["patch"]
    for i in range(model.config.layers):
        block = model.layer(i)
        branches = attention(*block.project(stream, e_BF6M), i)
        kv = jax.tree.map(lambda a, i=i: a[i], text_kv)
        stream = block.finish(stream, e_BF6M, branches, kv)
        inside[f"block{i}_out"] = stream
    return inside


def first_frames(v, dtype=jnp.float32):
    F = len(v["a_timestep"])
    x, t_BF = frames_first(v["latents"])[:, :F], jnp.asarray(v["a_timestep"])[None]
    return x.astype(dtype), t_BF, frames_at(v, slice(0, F)), jnp.asarray(v["text"])


def test_call_without_cache_matches(vectors, model):
    v, m = vectors("dit_tiny_io"), model()
    x, t_BF, frames, text = first_frames(v)
    close(dense(m, x, t_BF, frames, text, 0), v["a_output"])
    F = x.shape[1]
    last = slice(F - 1, F)
    out = dense(m, x[:, last], t_BF[:, last], frames_at(v, last), text, F - 1)
    close(out, v["a1_output"])


def test_inside_of_the_layers_matches(vectors, model):
    v = vectors("dit_tiny_io")
    inside = walk_dense(model(), *first_frames(v))
    wanted = {name for name in v if name.startswith("a_")}
    wanted -= {"a_timestep", "a_output", "a_output_bf16"}
    left_out = {f"a_{name}" for name in inside} - wanted
    assert wanted <= {f"a_{name}" for name in inside}
    stored = stored_layers(v, "a_block{}_out", model().config.layers)
    assert left_out <= {f"a_block{i}_out" for i in range(stored[-1])}
    for name in wanted:
        close(inside[name.removeprefix("a_")], v[name])


def test_bfloat16_stays_near(vectors, model):
    v = vectors("dit_tiny_io")
    out = dense(model(jnp.bfloat16), *first_frames(v, jnp.bfloat16), 0)
    close(out, v["a_output_bf16"], rel=2e-2, atol=np.inf)


def start(v, m, history, most):
    """A state whose clean frames are all known, and an empty cache."""
    latents = frames_first(v["latents"])
    B, F, _, Y, X = latents.shape
    size = dict(latent_height=Y, latent_width=X, batch=B)
    return State(
        cache=make_cache(m.config, history, frames=most + BLOCK, **size),
        text_kv=jax.jit(lambda m, text: m.text_kv(text))(m, jnp.asarray(v["text"])),
        latents_BFZYX=latents,
        frames=frames_at(v, slice(0, F)),
        blocks=jnp.int32(0),
    )


def remembered(m, state, chosen, history, most):
    """The state after a context pass over the chosen frames, at the vectors' context timestep."""
    context_S = np.pad(np.int32(chosen), (0, most - len(chosen)), constant_values=-1)
    cache = _remember(m, state, context_S, history)
    return dataclasses.replace(state, cache=cache)


@functools.partial(jax.jit, static_argnames="history")
def _remember(m, state, context_S, history):
    return remember_context(m, state, context_S, SamplerConfig().context_timestep, history)


@jax.jit
def noise_pass(m, state, x, t, frames, first):
    t_BF = jnp.broadcast_to(t, x.shape[:2])
    sight = look_from(m.config, state.cache, frames, first, x.shape[3:])
    out = m(x, t_BF, frames.actions_BF, state.text_kv, cached_attention(m.config, sight))
    return jnp.swapaxes(out.velocity_BFZYX, 1, 2)


@functools.cache
def history_of(semantics, storage, memory_frames):
    sizes = dict(memory_frames=memory_frames, recent_frames=min(12, memory_frames))
    return History(semantics=semantics, storage=storage, **sizes)


@pytest.mark.parametrize(("semantics", "storage"), FORMS)
def test_block_by_block_with_cache_matches(vectors, model, semantics, storage):
    v, m, cached = vectors("dit_tiny_io"), model(), vectors("dit_tiny_cache")
    assert v["b_timestep_context"] == SamplerConfig().context_timestep
    noisy, most = frames_first(v["b_noisy"]), v["latents"].shape[2]
    history = history_of(semantics, storage, most)
    suffix = "_upstream" if semantics == "recompute" else ""
    state = start(v, m, history, most)
    for c, t in enumerate(v["b_timestep_noise"]):
        first, new = c * BLOCK, slice(c * BLOCK, (c + 1) * BLOCK)
        state = remembered(m, state, range(first), history, most)
        out = noise_pass(m, state, noisy[:, new], t, frames_at(v, new), first)
        close(out, v[f"b_chunk{c}_output{suffix}"])

    state = remembered(m, state, range(most), history, most)
    k, value = recall(m.config, state.cache)
    for i in stored_layers(cached, f"layer{{}}_k{suffix}", m.config.layers):
        close_kv(k[i], cached[f"layer{i}_k{suffix}"])
        close_kv(value[i], cached[f"layer{i}_v{suffix}"])


@pytest.mark.parametrize("storage", ["packed", "single"])
def test_context_of_retrieved_frames_matches(vectors, model, storage):
    v, m = vectors("dit_tiny_io"), model()
    chosen, noisy = v["b2_selected"], frames_first(v["b_noisy"])
    most = v["latents"].shape[2]
    history = history_of("recompute", storage, most)
    state = start(v, m, history, most)
    state = remembered(m, state, [0, 1, 2, 3], history, most)  # must leave no trace
    state = remembered(m, state, chosen, history, most)
    new = slice(most - BLOCK, most)
    t = np.float32(SamplerConfig().steps[1])
    out = noise_pass(m, state, noisy[:, new], t, frames_at(v, new), len(chosen))
    close(out, v["b2_output"])
    k, value = recall(m.config, state.cache)
    close_kv(k[0], v["b2_layer0_k"])
    close_kv(value[0], v["b2_layer0_v"])


def test_inside_of_cached_attention_matches(vectors, model):
    """Both branches in the noise pass of block 2, taken apart in the layer the vectors are of."""
    v, m = vectors("dit_tiny_io"), model()
    most, layer, c = v["latents"].shape[2], int(v["c_layer"]), 2
    history = history_of("append", "packed", most)
    state = start(v, m, history, most)
    for blocks in range(1, c + 1):
        state = remembered(m, state, range(blocks * BLOCK), history, most)
    new = slice(c * BLOCK, (c + 1) * BLOCK)
    x, t = frames_first(v["b_noisy"])[:, new], v["b_timestep_noise"][c]

    @jax.jit
    def walk(m, state, x, frames):
        view, at = look_from(m.config, state.cache, frames, c * BLOCK, x.shape[3:])
        _, e_BF6M = m.condition(jnp.full(x.shape[:2], t), frames.actions_BF)
        stream, out = m.patchify(x), {}
        for i in range(layer + 1):
            block = m.layer(i)
            q, k, value = (jnp.swapaxes(x, 1, 2) for x in block.project(stream, e_BF6M))
            q, k = encode_queries(q, at), encode_keys(k, at.place)
            value = encode_values(value, at.place)
            swapped = (jnp.swapaxes(x, 1, 2) for x in (q, k, value))
            q_BTCD, k_BTCD, v_BTCD = swapped
            o = jnp.swapaxes(attend(q_BTCD, view, k_BTCD, v_BTCD, layer=i), 1, 2)
            branches = decode_outputs(o, at)
            swapped = tuple(jnp.swapaxes(x, 1, 2) for x in branches)
            kv = jax.tree.map(lambda a, i=i: a[i], state.text_kv)
            stream = block.finish(stream, e_BF6M, swapped, kv)
            out[f"block{i}_out"] = stream
        pairs = dict(q=q, k=k, v=value, attn=o)
        split = {name: apart(x) for name, x in pairs.items()}
        out |= dict(q_rope=split["q"][0], q_prope=split["q"][1], k_rope=split["k"][0])
        out |= dict(k_prope=split["k"][1], v=split["v"][0], v_prope=split["v"][1])
        out |= dict(attn_rope=split["attn"][0], attn_prope_raw=split["attn"][1])
        return out | dict(attn_prope_out=branches[1])

    found = walk(m, state, x, frames_at(v, new))
    wanted = {name.removeprefix("c_") for name in v if name.startswith("c_")} - {"layer"}
    assert wanted <= set(found)
    assert set(found) - wanted <= {f"block{i}_out" for i in range(layer)}
    for name in wanted:
        (close if name.startswith("block") else close_kv)(found[name], v[f"c_{name}"])
