"""LongCat's schedules, guidance, RoPE and whole loops against the PyTorch reference (CPU)."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from models.common.rounding import round_to
from models.longcat import schedule as schedules
from models.longcat.config import LongCatConfig
from models.longcat.params import load_dit
from models.longcat.pipeline import LongCat, Prompt
from models.longcat.rope import axis_channels, axis_frequencies, clip_positions, longcat_rope
from models.longcat.sampler import cached_step, clip_step, denoise, euler_step, guide
from models.longcat.text import read_text
from models.wan_vae import WanVAE, WanVAEConfig
from tests.support.golden import close as close_to
from tests.support.golden import frames_first

SUBJECT = "longcat"
ATOL = 3e-4  # float32 loops; measured distance is below 2e-5
ATOL_TIMESTEP, ATOL_SIGMA, ATOL_LATENT, ATOL_ROPE = 2e-4, 2e-7, 1e-5, 1e-5


@pytest.fixture(scope="module")
def model(folder):
    config = LongCatConfig.from_json(folder.config, dtype=jnp.float32)
    return load_dit(folder.path / "dit_tiny.safetensors", config)


def close(actual, expected, atol=ATOL):
    close_to(actual, expected, atol)


def numbers(v, pattern):
    found = [int(m[1]) for m in map(re.compile(pattern).fullmatch, v) if m]
    assert found
    return found


def test_schedules_match(vectors):
    v = vectors("sampler_io")
    shift = float(v["shift"])

    def check(name, schedule):
        close(schedule.timesteps, v[f"{name}_timesteps"], ATOL_TIMESTEP)
        close(schedule.sigmas, v[f"{name}_sigmas"], ATOL_SIGMA)
        assert schedule.timesteps.dtype == schedule.sigmas.dtype == np.float32
        assert schedule.steps == len(v[f"{name}_timesteps"])
        if f"{name}_timesteps_bf16" in v:
            half = round_to(jnp.asarray(v[f"{name}_timesteps"]), jnp.bfloat16)
            np.testing.assert_array_equal(half, v[f"{name}_timesteps_bf16"])

    for n in numbers(v, r"std(\d+)_sigmas"):
        close(schedules.raw_levels(n), v[f"std{n}_raw_sigmas"], ATOL_SIGMA)
        check(f"std{n}", schedules.standard(n, shift))
    for n in numbers(v, r"vc(\d+)_sigmas"):
        check(f"vc{n}", schedules.continuation(n, shift))
    for n in numbers(v, r"refine(\d+)_sigmas"):
        check(f"refine{n}", schedules.refinement(n, shift=shift))
    for n in numbers(v, r"distill(\d+)_sigmas"):
        close(schedules.raw_distilled_levels(n), v[f"distill{n}_raw_sigmas"], ATOL_SIGMA)
        check(f"distill{n}", schedules.distilled(n, shift))


def test_guidance_and_euler_steps_match(vectors):
    v = vectors("sampler_io")
    n = numbers(v, r"std(\d+)_sigmas")[0]
    sigmas, x = schedules.standard(n, float(v["shift"])).sigmas, jnp.asarray(v["euler_latents0"])
    scale_B = jnp.full(x.shape[:1], v["euler_guidance_scale"], jnp.float32)
    for i, expected in enumerate(v["euler_latents"]):
        u, p = (jnp.asarray(v[f"euler_v_{k}"][i]) for k in ("uncond", "cond"))
        out, s_B = guide(u, p, scale_B)
        close(s_B, np.broadcast_to(v["euler_st_star"][i], s_B.shape), ATOL_LATENT)
        close(out, v["euler_guided"][i], ATOL_LATENT)
        x = euler_step(x, out, sigmas[i], sigmas[i + 1])
        close(x, expected, ATOL_LATENT)
    last = euler_step(v["euler_latents0"], v["euler_v_cond"][0], sigmas[-2], sigmas[-1])
    close(last, v["euler_last_latents"], ATOL_LATENT)


def test_guidance_is_per_video():
    rng = np.random.default_rng(0)
    u, p = (jnp.asarray(rng.normal(size=(2, 3, 2, 4, 4)), jnp.float32) for _ in range(2))
    scale_B = jnp.asarray([4.0, 1.5])
    both, s_B = guide(u, p, scale_B)
    for i in range(2):
        one, s_1 = guide(u[i : i + 1], p[i : i + 1], scale_B[i : i + 1])
        close(both[i : i + 1], one, 1e-6)
        close(s_B[i : i + 1], s_1, 1e-6)
    assert abs(float(s_B[0] - s_B[1])) > 1e-3


def test_latent_statistics_match(vectors):
    """The arithmetic is the shared VAE's; what is LongCat's own is the dtype it runs in."""
    v = vectors("sampler_io")
    sizes = {name: tuple(v[f"latents_{name}"].tolist()) for name in ("mean", "std")}
    # One step of the dtype; values reach 20, where float32 has steps of 2e-6.
    for bits, dtype, rtol, atol in (
        ("f32", "float32", 2**-23, 1e-6),
        ("bf16", "bfloat16", 2**-7, 0),
    ):
        config = WanVAEConfig.wan_2_1(dtype=jnp.dtype(dtype))
        config = dataclasses.replace(config, **sizes, latent_channels=len(sizes["mean"]))
        vae = nnx.eval_shape(lambda config=config: WanVAE(config, rngs=nnx.Rngs(0)))
        z = jnp.moveaxis(jnp.asarray(v["norm_in"], dtype), 1, -1)
        mean, inverse_std = vae.statistics()
        for name, ours in (("norm", (z - mean) * inverse_std), ("denorm", vae.denormalize(z))):
            ours = np.asarray(jnp.moveaxis(ours, -1, 1), np.float32)
            np.testing.assert_allclose(ours, v[f"{name}_{bits}"], rtol=rtol, atol=atol)


def token_angles(head_dim, positions_TP):
    """float32 angles of all channels; a frequency turns a pair of neighbours."""
    parts = [
        np.float32(positions_TP[:, axis, None]) * np.float32(ladder)
        for axis, ladder in enumerate(axis_frequencies(head_dim))
    ]
    return np.repeat(np.concatenate(parts, axis=1), 2, axis=1)


def test_rope_matches(vectors):
    v = vectors("rope_io")
    sizes = LongCatConfig(layers=1, width=16, heads=1, patch=(1, 1))

    def positions(grid):
        T, h, w = (int(n) for n in grid)
        return np.asarray(clip_positions(sizes, 0, (1, T, 1, h, w)))

    for case in numbers(v, r"case(\d+)_grid"):
        at, head_dim = f"case{case}_", int(v[f"case{case}_head_dim"])
        assert sum(axis_channels(head_dim)) == head_dim
        positions_BTP, rope = positions(v[at + "grid"]), longcat_rope(head_dim)
        close(token_angles(head_dim, positions_BTP[0]), v[at + "angles"], ATOL_ROPE)
        table = rope.table(jnp.asarray(positions_BTP))
        for name in "qk":
            close(rope.rotate(jnp.asarray(v[at + name]), table), v[f"{at}{name}_rot"], ATOL_ROPE)

    head_dim, positions_BTP = int(v["big_head_dim"]), positions(v["big_grid"])
    assert positions_BTP.shape[1] == v["big_total"][0]
    some = positions_BTP[:, v["big_index"]]
    close(token_angles(head_dim, some[0]), v["big_angles"], ATOL_ROPE)
    cos, sin = longcat_rope(head_dim).table(jnp.asarray(some))
    for ours, name in ((cos, "cos"), (sin, "sin")):
        close(np.repeat(np.asarray(ours)[0], 2, axis=-1), v[f"big_{name}"], ATOL_ROPE)
    assert axis_channels(128) == (44, 42, 42)


def prompt_of(v):
    names = dict(text_BUE="pos_emb", negative_BUE="neg_emb")
    names |= dict(mask_BU="pos_mask", negative_mask_BU="neg_mask")
    return Prompt(**{k: v[n][:, 0] if n.endswith("emb") else v[n] for k, n in names.items()})


@jax.jit
def texts(model, *pairs):
    return read_text(model, *(jnp.concatenate(x) for x in zip(*pairs, strict=True)))


GUIDANCE = 4.0


@pytest.mark.parametrize("run", ["vc_cached", "vc_joint", "vc_distill", "t2v"])
def test_loop_matches(vectors, model, run):
    v, shift = vectors("loop_io"), float(vectors("sampler_io")["shift"])
    prompt, pipeline, steps = prompt_of(v), LongCat(model), len(v[f"{run}_timesteps"])
    given = frames_first(v["cond_latents"])
    noise = frames_first(v["t2v_latents0" if run == "t2v" else "noise_latents"])
    if run == "t2v":
        schedule, given, cached = schedules.standard(steps, shift), noise[:, :0], False
    elif run == "vc_distill":
        schedule, cached = schedules.distilled(steps, shift), True
    else:
        schedule = schedules.continuation(len(v["t2v_timesteps"]), shift)
        cached = run == "vc_cached"
    close(schedule.timesteps, v[f"{run}_timesteps"], ATOL_TIMESTEP)
    close(schedule.sigmas, v[f"{run}_sigmas"], ATOL_SIGMA)

    guided = schedule.guided
    guidance_B = jnp.full((1,), GUIDANCE, jnp.float32) if guided else None
    pairs = [(jnp.asarray(prompt.text_BUE), jnp.asarray(prompt.mask_BU))]
    if guided:
        negative = jnp.asarray(prompt.negative_BUE), jnp.asarray(prompt.negative_mask_BU)
        pairs.insert(0, negative)
    memory, step = (pipeline.remember(given), cached_step) if cached else (given, clip_step)
    step = Partial(step, model, texts(model, *pairs), guidance_B, memory)
    x, trace = denoise(step, noise, schedule, chunk=4)
    close(trace.x_JBFZYX, np.swapaxes(v[f"{run}_step_latents"], 2, 3))
    close(x, trace.x_JBFZYX[-1], 0)
    if guided:
        close(trace.scale_JB[:, 0], v[f"{run}_st_star"])
    else:
        assert (trace.scale_JB == 1).all() and f"{run}_st_star" not in v

    # The pipeline does the same, with one padded row of the text for all.
    options = dict(schedule=schedule, guidance=GUIDANCE if guided else 1.0, chunk=4)
    if run == "t2v":
        out = pipeline.text_to_video(prompt, noise, **options)
    else:
        out = pipeline.continue_video(prompt, given, noise, cached=cached, **options)
    close(jnp.swapaxes(out, 1, 2), v[f"{run}_out"])
