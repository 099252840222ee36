"""The Self-Forcing sampler, roll-outs and cache schedule against the PyTorch reference (CPU)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.self_forcing.block import BlockNoise, cached_forward, denoise_block
from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from models.self_forcing.history import History, append_frames, block_positions, recall
from models.self_forcing.params import load_dit
from models.self_forcing.pipeline import Generation, SelfForcing
from models.self_forcing.rope import model_rope
from models.self_forcing.sampler import Ladder, add_noise, flow_to_x0, x0_to_flow
from models.self_forcing.schedule import compressions, network_calls, plan_blocks
from qvg_jax.codecs.base import Codec, identity
from tests.support.golden import close, stored_layers

ATOL = 1e-4  # float32 roll-outs; the README's tolerance, measured distance is below 1e-5
SUBJECT = "self_forcing"
SPAN_BLOCKS = 8  # the released schedule compresses eight blocks at a time


@pytest.fixture(scope="module")
def model(folder):
    sizes, n = folder.config["dit"], folder.config["num_frame_per_block"]

    @functools.cache
    def load(dtype=jnp.float32):
        config = SelfForcingConfig.from_wan(sizes, frames_per_block=n, dtype=dtype)
        return load_dit(folder.path / "dit_tiny.safetensors", config)

    return load


def one_bf16_step(actual, expected):
    """bfloat16 results of the same float32 arithmetic: a rare tie may round the other way."""
    actual = np.asarray(actual, np.float32)
    np.testing.assert_allclose(actual, expected, rtol=2**-7, atol=0)
    assert (actual != expected).mean() < 1e-3


def test_ladder_matches(vectors):
    v, ladder = vectors("sampler_io"), Ladder(SamplerConfig())
    close(ladder.sigmas, v["sigmas"], 1e-6)
    close(ladder.timesteps, v["timesteps"], 1e-3)
    close(ladder.training_weights, v["training_weights"], 1e-5)
    close(Ladder(SamplerConfig(shift=8.0)).sigmas, v["sigmas_shift8"], 1e-6)
    np.testing.assert_array_equal(SamplerConfig().steps, v["denoising_step_list_raw"])
    np.testing.assert_array_equal(ladder.steps, v["denoising_step_list"])
    np.testing.assert_array_equal(ladder.index(v["addnoise_t"]), v["argmin_id"])
    assert ladder.steps.dtype == np.float32  # 833.3333: bfloat16 would be another timestep


def test_noise_and_flow_conversions_match(vectors):
    v, ladder = vectors("sampler_io"), Ladder(SamplerConfig())
    sigma = ladder.sigma(v["addnoise_t"])
    for bits, distance, dtype in (("", close, jnp.float32), ("_bf16in", one_bf16_step, "bfloat16")):
        x0, noise = (jnp.asarray(v[f"addnoise_{k}"], dtype) for k in ("x0", "noise"))
        distance(add_noise(x0, noise, sigma), v["addnoise_out" + bits])
        flow, x = (jnp.asarray(v[f"x0conv_{k}"], dtype) for k in ("flow", "xt"))
        distance(flow_to_x0(flow, x, ladder.sigma(v["x0conv_t"])), v["x0conv_out" + bits])
    flow, x = jnp.asarray(v["x0conv_flow"]), jnp.asarray(v["x0conv_xt"])
    # Divides by sigma as small as 0.005: near 900 the tolerance is relative, 1e-6.
    back = x0_to_flow(flow, x, ladder.sigma(v["x0conv_t"]))
    np.testing.assert_allclose(back, v["flowconv_out"], rtol=1e-6, atol=ATOL)


def block_noise(v, prefix, blocks):
    """The injected noise, cut into the generated blocks of a run."""
    start, renoise = v[prefix + "noise"], v[prefix + "renoise"]
    B, passes = start.shape[0], len(SamplerConfig().steps) - 1
    # One block after the other along axis 0; a first block of its own has fewer frames a row.
    flat = renoise.reshape(-1, *renoise.shape[-3:])
    noise, frame, row = [], 0, 0
    for b in (b for b in blocks if not b.given):
        rows = passes * B * b.frames
        eps = flat[row : row + rows].reshape(passes, B, b.frames, *flat.shape[1:])
        noise.append(BlockNoise(start[:, frame : frame + b.frames], eps))
        frame, row = frame + b.frames, row + rows
    assert (frame, row) == (start.shape[1], len(flat))
    return noise


def roll_out(m, v, run, history, *, alone=None, capacity=None):
    """Generates a run of the vectors; returns latents, plan, and what was in the cache when."""
    prefix = f"{run}_" if run else ""
    start, initial = v[prefix + "noise"], v.get(prefix + "initial_latent")
    initial_frames = 0 if initial is None else initial.shape[1]
    frames = start.shape[1] + initial_frames
    blocks = plan_blocks(m.config, frames, initial_frames=initial_frames, first_frame_alone=alone)
    text = v["context"][: start.shape[0]]
    request = Generation(
        text_BUE=text,
        frames=frames,
        latent_height=start.shape[-2],
        latent_width=start.shape[-1],
        noise=block_noise(v, prefix, blocks),
        initial_BFZYX=initial,
        first_frame_alone=alone,
        capacity=capacity,
    )
    seen = []

    def look(done, total, state):
        assert total == frames
        frame, k, value = recall(state.cache, model_rope(m.config) if run else None)
        seen.append((done, *map(np.asarray, (frame, k, value)), int(state.cache.num_spans)))

    pipeline = SelfForcing(m, history=history)
    latents = pipeline.generate(request, chunk=1, progress=look)
    return latents, blocks, seen


SINK_FRAMES = {"roll": 0, "roll_sink": 3}  # runs with a sliding window; its length is in the data
UNBOUNDED = ("t2v", "i2v", "indep_t2v", "extend")


def history_of(m, v, run):
    if run not in SINK_FRAMES:
        return History()
    tokens = np.prod(m.config.grid(*v[f"{run}_noise"].shape[-2:]))
    window = v[f"{run}_k_l0"].shape[1] // tokens
    return History(window_frames=int(window), sink_frames=SINK_FRAMES[run])


@pytest.mark.parametrize("run", (*UNBOUNDED, "t2v_b2", *SINK_FRAMES))
def test_roll_out_matches(vectors, model, run):
    v, m = vectors("sampler_io"), model()
    alone = True if run == "indep_t2v" else None
    # One capacity for all of these: they share a compiled program.
    longest = max(v[f"{r}_latents"].shape[1] for r in UNBOUNDED)
    capacity = longest if run in UNBOUNDED else None
    history = history_of(m, v, run)
    latents, blocks, seen = roll_out(m, v, run, history, alone=alone, capacity=capacity)
    close(latents, v[f"{run}_latents"])
    assert [done for done, *_ in seen] == [b.end_frame for b in blocks]

    S = np.prod(m.config.grid(*latents.shape[-2:]))
    if f"{run}_call_t" in v:
        calls = network_calls(blocks, SamplerConfig())
        filled = {done: len(frame) for done, frame, *_ in seen}
        B = latents.shape[0]
        for i, call in enumerate(calls):
            given, at = call.block.given, f"{run}_call_"
            assert call.timestep == v[at + "t"][i]
            assert call.block.first_frame * S == v[at + "start"][i]
            assert (B, 1 if given else call.block.frames) == tuple(v[at + "tshape"][i])
            assert call.block.end_frame * S == v[at + "gei"][i]
            assert filled[call.block.end_frame] == v[at + "lei"][i]
        assert len(calls) == len(v[f"{run}_call_t"])

    if f"{run}_k_l0" in v:
        # The reference keeps the newest block inside its window, we beside it: a frame that has
        # just left our cache is still in theirs, so take every frame from when it was last seen.
        k_of, v_of = {}, {}
        for _, frame, k, value, _ in seen:
            for f in np.unique(frame):
                k_of[f], v_of[f] = k[:, :, frame == f], value[:, :, frame == f]
        kept = v[f"{run}_k_l0"].shape[1] // S
        sink = history.sink_frames
        order = [*range(sink), *range(latents.shape[1] - kept + sink, latents.shape[1])]
        k, value = (np.concatenate([of[f] for f in order], axis=2) for of in (k_of, v_of))
        close(k[0], v[f"{run}_k_l0"])
        close(value[0], v[f"{run}_v_l0"])
        close(k[-1], v[f"{run}_k_last"])


def test_every_pass_of_a_roll_out_matches(vectors, model):
    v, m = vectors("sampler_io"), model()
    blocks = plan_blocks(m.config, v["t2v_noise"].shape[1])
    start = v["t2v_noise"]
    request = Generation(
        text_BUE=v["context"][: start.shape[0]],
        frames=start.shape[1],
        latent_height=start.shape[-2],
        latent_width=start.shape[-1],
        noise=jax.random.key(0),
    )
    ladder = Ladder(SamplerConfig())

    @jax.jit
    def traced(model, state, noise):
        positions_BTP = block_positions(model.config, state.cache, noise.start_BFZYX.shape)
        view = state.cache.view(positions_BTP, model_rope(model.config))
        x0, trace = denoise_block(model, state.text_kv, view, noise, ladder)
        clean = cached_forward(model, x0, jnp.zeros((1, 1)), state.text_kv, view, keep_kv=True)
        cache = append_frames(state.cache, clean.k_LBTHD, clean.v_LBTHD, positions_BTP)
        return cache, trace, x0, clean.flow_BFZYX

    state, at = SelfForcing(m).start(request), 0
    for noise in block_noise(v, "t2v_", blocks):
        cache, trace, x0, clean_flow = traced(m, state, jax.tree.map(jnp.asarray, noise))
        state = type(state)(cache=cache, text_kv=state.text_kv)
        passes = slice(at, at + len(trace.x_JBFZYX))
        close(trace.x_JBFZYX, v["t2v_call_x"][passes])
        close(trace.flow_JBFZYX, v["t2v_call_flow"][passes])
        close(trace.x0_JBFZYX, v["t2v_call_x0"][passes])
        close(x0, v["t2v_call_x"][passes.stop])
        close(clean_flow, v["t2v_call_flow"][passes.stop])
        unused = flow_to_x0(clean_flow, x0, ladder.sigma(0.0))
        close(unused, v["t2v_call_x0"][passes.stop])
        at = passes.stop + 1
    assert at == len(v["t2v_call_x"])


def test_bfloat16_roll_out_stays_near(vectors, model):
    v = vectors("sampler_io")
    latents, *_ = roll_out(model(jnp.bfloat16), v, "bf16", History())
    actual, expected = np.asarray(latents, np.float64), v["bf16_latents"]
    assert actual.shape == expected.shape
    # A sanity check: the roll-out amplifies every rounding.
    assert np.linalg.norm(actual - expected) <= 0.05 * np.linalg.norm(expected)


def towards_the_mean() -> Codec:
    """The vectors' stand-in for a codec: y = m + 0.8 (x - m), m the mean over the span's tokens."""
    plain = identity(jnp.float32)

    def encode(x_BHTD, state, *, key=None):
        mean = x_BHTD.mean(axis=2, keepdims=True)
        return plain.encode(mean + 0.8 * (x_BHTD - mean), state, key=key)

    return dataclasses.replace(plain, encode=encode, name="towards the mean")


@pytest.mark.parametrize("kind", ["none", "fake"])
def test_quantization_schedule_matches(vectors, model, kind):
    v, m = vectors("qvg_schedule_io"), model()
    span_frames = SPAN_BLOCKS * m.config.frames_per_block
    codec = {"none": identity(jnp.float32), "fake": towards_the_mean()}[kind]
    history = History.qvg(codec, span_frames=span_frames)
    latents, blocks, seen = roll_out(m, v, "", history)
    close(latents, v[f"{kind}_latents"])

    S = np.prod(m.config.grid(*latents.shape[-2:]))
    events = compressions(blocks, span_frames=span_frames)
    expected = [tuple(int(n) for n in row) for row in v[f"{kind}_quant_events"]]
    assert [(e.first * S, e.end * S, e.stored * S) for e in events] == expected
    for done, *_, spans in seen:  # the cache decides by itself, and must decide the same
        assert spans == sum(e.stored < done for e in events)

    quantized = np.zeros(latents.shape[1], int)
    for e in events:
        quantized[e.first : e.end] = 1
    if kind == "fake":
        np.testing.assert_array_equal(1 + quantized, v["fake_chunk_state"])
        assert [(e.first, e.end) for e in events] == [tuple(row) for row in v["fake_spans"]]
    else:
        assert not v["none_spans"].size and (v["none_chunk_state"] == 1).all()

    _, frame, k, value, _ = seen[-1]  # before RoPE: that is what is stored
    assert len(frame) == latents.shape[1] * S
    for name, x in (("k", k), ("v", value)):
        x = x.reshape(*x.shape[:2], -1, S, *x.shape[-2:])[:, :, v["kv_frames_kept"]]
        for i in stored_layers(v, f"{kind}_{name}_l{{}}", m.config.layers):
            close(x[i], v[f"{kind}_{name}_l{i}"])
