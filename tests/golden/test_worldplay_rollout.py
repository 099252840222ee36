"""WorldPlay roll-outs, network calls and the compression schedule against the reference (CPU)."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.worldplay.block import generate_block
from models.worldplay.cameras import CameraPath
from models.worldplay.config import SamplerConfig
from models.worldplay.history import History
from models.worldplay.memory import recall
from models.worldplay.pipeline import WorldPlay
from models.worldplay.request import Walk, block_inputs
from models.worldplay.schedule import compressions, network_calls
from qvg_jax.codecs.base import identity
from tests.support.worldplay_model import close, close_kv, loader

PLAIN = identity(jnp.float32)
SUBJECT = "worldplay"
BLOCK = 4  # latent frames, as the README of the vectors says


@pytest.fixture(scope="module")
def model(folder):
    return loader(folder)


def request(v, frames, *, image, **changes):
    path = CameraPath(np.linalg.inv(v["viewmats"]), v["Ks"], v["action"])
    condition = v["first_image_condition"][:, :, 0] if image else None
    fields = dict(text_BUE=v["text"], path=path, frames=frames, image_BZYX=condition)
    fields |= dict(zip(("latent_height", "latent_width"), v["noise"].shape[-2:], strict=True))
    return Walk(**(fields | dict(noise=np.swapaxes(v["noise"], 1, 2)) | changes))


def frames_of(v, name):
    return v[f"{name}_latents"].shape[2]


def frames_last(x_BFZYX):
    return np.swapaxes(x_BFZYX, 1, 2)


@functools.partial(jax.jit, static_argnames=("sampler", "history"))
def traced(m, state, x, sampler, history):
    return generate_block(m, state, x, sampler, history)


def test_every_pass_of_a_roll_out_matches(vectors, model):
    v, s, sampler = vectors("rollout_io"), vectors("sampler_io"), SamplerConfig()
    np.testing.assert_array_equal(sampler.timesteps, v["timesteps"])
    np.testing.assert_array_equal(sampler.sigmas, v["sigmas"])
    pipe, frames, history = WorldPlay(model()), frames_of(v, "i2v"), History()
    capacity = max(frames, frames_of(v, "t2v"))

    def run(asked):
        state = pipe.start(asked)
        for x in block_inputs(pipe.model.config, history, asked):
            state, latents, trace = traced(pipe.model, state, x, sampler, history)
            yield latents, jax.tree.map(np.asarray, trace)

    passes, J, made = 0, len(sampler.steps), []
    for block, (latents, trace) in enumerate(
        run(request(v, frames, image=True, capacity=capacity))
    ):
        now = slice(passes, passes + J)
        close(np.swapaxes(trace.x_JBFZYX, 2, 3), v["i2v_model_input"][now])
        close(np.swapaxes(trace.velocity_JBFZYX, 2, 3), v["i2v_noise_pred"][now])
        np.testing.assert_array_equal(trace.t_JBF[:, 0], v["i2v_timesteps"][now])
        if block == 1:
            close(np.swapaxes(trace.x_JBFZYX, 2, 3), s["f32_x"])
            close(np.swapaxes(trace.velocity_JBFZYX, 2, 3), s["f32_v"])
            close(frames_last(latents), s["f32_final"])
        passes = now.stop
        made.append(latents)
    assert passes == len(v["i2v_noise_pred"])
    close(frames_last(np.concatenate(made, 1)), v["i2v_latents"])
    asked = request(v, frames_of(v, "t2v"), image=False, capacity=capacity)
    made = np.concatenate([latents for latents, _ in run(asked)], 1)
    close(frames_last(made), v["t2v_latents"])

    contexts = range(0, frames, BLOCK)
    calls = network_calls(pipe.model.config, sampler, contexts, image=True)
    check_calls(calls, v["i2v_calls"])
    np.testing.assert_array_equal(
        np.float32([c.timesteps for c in calls if not c.context]), v["i2v_timesteps"]
    )


def check_calls(calls, expected):
    rows = [(int(c.context), c.first, c.end, len(c.timesteps)) for c in calls]
    np.testing.assert_array_equal(rows, expected)


def test_roll_out_with_retrieved_memory_matches(vectors, model):
    v, m = vectors("rollout_io"), model()
    chosen = v["upstream_selected"]
    contexts = [np.zeros(0, int), *(row[row >= 0] for row in chosen)]
    most = chosen.shape[1]
    history = History(semantics="recompute", memory_frames=most, recent_frames=min(12, most))
    asked = request(v, frames_of(v, "upstream_i2v"), image=True, contexts=contexts)
    latents = WorldPlay(m, history=history).generate(asked, chunk=1)
    close(frames_last(latents), v["upstream_i2v_latents"])
    calls = network_calls(m.config, SamplerConfig(), [len(c) for c in contexts], image=True)
    check_calls(calls, v["upstream_calls"])


def stand_in(factor, offset):
    """The vectors' stand-in for a codec: an affine map of what is stored."""

    def encode(x_BHTD, state, *, key=None):
        return PLAIN.encode(factor * x_BHTD + offset, state, key=key)

    return dataclasses.replace(PLAIN, encode=encode, name="stand-in")


def test_compression_schedule_and_reading_match(vectors, model):
    v, m = vectors("rollout_io"), model()
    history = History(key_codec=stand_in(0.8, 0.0), value_codec=stand_in(1.1, 0.05))
    frames, last, spans = frames_of(v, "pq"), {}, []

    def look(done, total, state):
        spans.append(int(state.cache.num_spans))
        if done == total:
            last["kv"] = recall(m.config, state.cache)

    asked = request(v, frames, image=True)
    latents = WorldPlay(m, history=history).generate(asked, chunk=1, progress=look)
    close(frames_last(latents), v["pq_latents"])
    layers = [int(name[len("pq_layer") : -2]) for name in v if re.fullmatch(r"pq_layer\d+_k", name)]
    assert layers
    for i in layers:
        close_kv(last["kv"][0][i], v[f"pq_layer{i}_k"])
        close_kv(last["kv"][1][i], v[f"pq_layer{i}_v"])

    blocks = frames // BLOCK
    events = compressions(m.config, history, blocks)
    np.testing.assert_array_equal([(e.first, e.end) for e in events], v["pq_quant_calls"])
    assert spans == [sum(e.block <= b for e in events) for b in range(blocks)]
    events = compressions(m.config, history, frames_of(v, "i2v") // BLOCK)
    np.testing.assert_array_equal([(e.first, e.end) for e in events], v["i2v_quant_calls"])
