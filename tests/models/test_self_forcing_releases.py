"""Checkpoints of Self-Forcing's kind: their settings, their LoRA, and a tiny run of each."""

import fnmatch
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import registry
from models.common.checkpoint import CheckpointError
from models.common.weights import Weights
from models.self_forcing import job
from models.self_forcing.config import SelfForcingConfig
from models.self_forcing.entry import ENTRIES, Options, PlanOptions
from models.self_forcing.releases import RELEASES
from models.self_forcing.sampler import Ladder
from models.self_forcing.settings import released_sizes, settle, sizes_of
from models.umt5 import Tokenizer
from qvg_jax.app import cli
from qvg_jax.errors import UserError
from tests.support import tiny_self_forcing as tiny
from tests.support.tiny_world import as_in_its_own_process
from tests.support.tiny_worldplay import drawn

SIZE = ["--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH)]


def settings_of(name, **options):
    release = RELEASES[name]
    options = Options(**(dict(codec="midrise", frames=60) | options))
    return settle(options, sizes_of(release, released_sizes()), release=release)


def test_every_release_is_known_to_the_command_with_its_files():
    assert set(ENTRIES) == set(RELEASES) <= set(registry.names())
    for name, release in RELEASES.items():
        entry = registry.named(name)
        assert entry is ENTRIES[name] and entry.needs == release.needs
        assert entry.needs[0].what == "the transformer" and release.source
        assert any("VAE" in d.what for d in entry.needs)
        (file,) = entry.needs[0].files
        stem = file.rpartition(".")[0]
        assert any(fnmatch.fnmatch(stem, pattern) for pattern in release.dit_names)


def test_krea_has_14b_of_parameters_and_its_own_timesteps():
    settings = settings_of("krea-realtime", codec="bf16", frames=3)
    model = job.WEIGHTS.skeleton(settings.sizes.dit)
    # 28.58 GB in bfloat16, as public tables of the release's files say.
    assert 2 * sum(x.size for x in jax.tree.leaves(model)) / 1e9 == pytest.approx(28.58, abs=0.01)
    ladder = Ladder(settings.sampler)
    np.testing.assert_array_equal(ladder.steps, [1000, 937, 833, 625])
    np.testing.assert_allclose(ladder.step_sigmas, [1, 0.937, 0.833, 0.625, 0], atol=1.1e-3)
    # K and V of a latent frame of 480 x 832 take 1.28 GB in bf16; at 2.33 bits, a seventh.
    lay = settings.cache("bf16").layout
    per_frame = 2 * 2 * lay.layers * lay.heads * lay.block_tokens * lay.head_dim
    assert per_frame / 1e9 == pytest.approx(1.28, abs=0.01)


def test_blocks_windows_and_steps_of_the_others():
    assert settings_of("causal-forcing-framewise").sizes.dit.frames_per_block == 1
    assert settings_of("causal-forcing").sampler == settings_of("self-forcing").sampler
    two, one = (settings_of(f"causal-forcing-{n}-step") for n in (2, 1))
    assert two.sizes.dit.frames_per_block == one.sizes.dit.frames_per_block == 1
    for ours, steps in ((two, (1000, 500)), (one, (1000,))):
        first, later = (ours.sampler.of_block(frame).steps for frame in (0, 1))
        assert (first, later) == ((1000, 750, 500, 250), steps)
    assert settings_of("causal-forcing-2-step", steps=3).sampler.of_block(0).steps == (
        1000,
        667,
        334,
    )
    live = settings_of("longlive")
    lay = live.cache("midrise").layout
    assert (lay.sink_blocks, lay.span_blocks, lay.overflow) == (3, 3, "drop")
    plain = settings_of("longlive", codec="bf16").cache("bf16").layout
    assert plain.sink_blocks + plain.window_blocks + 3 == 12
    wide = settings_of("longlive", window=48, span=12).cache("midrise").layout
    assert wide.span_blocks == 12 and wide.max_spans > lay.max_spans
    reward = settings_of("reward-forcing", codec="bf16")
    assert reward.sampler == settings_of("self-forcing").sampler
    assert reward.histories["bf16"].sink_average == 0.999
    lay = reward.cache("bf16").layout
    assert (lay.sink_blocks, lay.window_blocks, lay.is_ring) == (3, 3, True)
    with pytest.raises(UserError, match="sink_average=0.999 needs .* without codecs"):
        settings_of("reward-forcing", codec="qvg")
    assert settings_of("raven").histories == settings_of("self-forcing").histories


def _lora(folder, name):
    rng = np.random.default_rng(3)
    pairs = {}
    for i in range(2):
        at = f"base_model.model.blocks.{i}.self_attn.q"
        pairs[f"{at}.lora_A.weight"] = rng.normal(size=(2, 32)).astype(np.float32)
        pairs[f"{at}.lora_B.weight"] = rng.normal(size=(32, 2)).astype(np.float32)
    save_file(pairs, folder / name)


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    with (
        as_in_its_own_process(tmp_path_factory.getbasetemp()),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(job, "released_sizes", tiny.sizes)
        patch.setattr(SelfForcingConfig, "wan_14b", lambda dtype: tiny.sizes(dtype).dit)
        patch.setattr(Weights, "random", drawn)
        patch.setattr(Tokenizer, "from_file", lambda path, length: tiny.letters(length))
        yield


def test_a_lora_of_the_release_is_looked_for_before_anything_is_read(tmp_path, process, capsys):
    folder = tiny.weights_folder(tmp_path)
    (folder / "self_forcing_dmd.safetensors").rename(folder / "raven_model.safetensors")
    argv = ["generate", "raven", "--weights", str(folder), "--prompt", "a fox", *SIZE]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "0 files *lora*.safetensors" in capsys.readouterr().err
    _lora(folder, "cmgrpo_raven_lora.safetensors")
    parts = job.latent_job.find_parts(folder, RELEASES["raven"].dit_names)
    raven = job._SelfForcing(RELEASES["raven"])
    options = Options(weights=str(folder), prompt="a fox", height=tiny.HEIGHT, width=tiny.WIDTH)
    settings = raven.settle(options, parts)
    merged = raven.load_dit(parts.dit, options, settings)
    plain = job.WEIGHTS.load(parts.dit, settings.sizes.dit)
    ours, theirs = (m.blocks.self_attn.q.kernel[...] for m in (merged, plain))
    assert np.abs(ours - theirs).max() > 0.1
    np.testing.assert_array_equal(
        merged.blocks.self_attn.k.kernel[...], plain.blocks.self_attn.k.kernel[...]
    )
    file = folder / "cmgrpo_raven_lora.safetensors"
    assert raven.identity(options, settings)["loras"] == {file.name: file.stat().st_size}
    with pytest.raises(CheckpointError, match="none.safetensors"):
        job.loras(Options(lora="none.safetensors"), RELEASES["self-forcing"], None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("causal-forcing-2-step", ["--frames", "4", "--codec", "bf16"]),
        ("longlive", ["--frames", "15", "--codec", tiny.CODEC]),
        ("reward-forcing", ["--frames", "12"]),
        ("krea-realtime", ["--frames", "6", "--codec", "bf16"]),
    ],
)
def test_a_tiny_run_with_random_weights(name, argv, tmp_path, process):
    out = tmp_path / "out"
    common = ["generate", name, "--weights", "random", "--prompt", "a fox", *SIZE]
    assert cli.main([*common, *argv, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["model"] == name and report["config"]["frames"] == 4 * int(argv[1]) - 3


def test_a_plan_names_the_release(process):
    asked = PlanOptions(memory=10**9, codec=("bf16",), frames=6, height=32, width=48)
    made = ENTRIES["krea-realtime"].plan(asked)
    assert made.what.startswith("Krea Realtime 14B") and made.needs[0].longest > 0


def test_gguf_and_fp8_are_named_with_what_is_accepted(tmp_path):
    folder = tiny.weights_folder(tmp_path)
    file = folder / "self_forcing_dmd.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="F8_E4M3 .fp8.*'BF16'"):
        job.WEIGHTS.check(file, tiny.sizes().dit)
    file.rename(folder / "self_forcing_dmd.gguf")
    with pytest.raises(CheckpointError, match="is GGUF, which is not read; accepted"):
        job.latent_job.find_parts(folder, RELEASES["self-forcing"].dit_names)
