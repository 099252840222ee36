"""The public names of the library, and what importing it costs."""

import importlib.metadata
import subprocess
import sys
import tomllib
import warnings

import pytest

import qvg_jax
from qvg_jax.backends import KERNELS_JAX
from tests.support.pages import ROOT

NAMES = {
    "CacheFullError", "Codec", "KVCache", "KeyBias", "NonFiniteError", "Rope", "append", "attend",
    "axial_rope", "bits_per_element", "cache_bytes", "chain", "compress", "compression_ratio",
    "encoded_by", "evict", "frequency_ladder", "grid_quantize", "identity", "kmeans_smoothing",
    "packed_bytes", "presets", "raise_if_bad", "recode", "residual_quantize", "rollout", "stream",
}  # fmt: skip


def test_every_public_name_is_there_and_documented():
    assert set(qvg_jax.__all__) >= NAMES
    for name in qvg_jax.__all__:
        value = getattr(qvg_jax, name)
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"
        assert name in dir(qvg_jax)


def test_presets_are_the_module():
    assert qvg_jax.presets.pair("midrise") is not None
    assert qvg_jax.presets.__name__ == "qvg_jax.codecs.presets"


def modules_after(code):
    """Modules that a fresh Python has loaded after some code."""
    show = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_answers_without_jax():
    code = "from qvg_jax.app.cli import main\nassert main(['generate', '--loud']) == 2"
    assert "jax" not in modules_after(code)


CACHE = """
import qvg_jax as qvg
for name in qvg.__all__: getattr(qvg, name)
qvg.KVCache.create(
    heads=1, head_dim=64, block_tokens=4, span_blocks=2, max_spans=1, pos_dims=0,
    key_codec=qvg.presets.get("qvg", num_centroids=4), value_codec=qvg.presets.get("rtn"),
)
"""


def test_every_name_and_a_cache_load_no_kernel_and_no_dialect_of_mosaic():
    ours = modules_after(CACHE) - modules_after("import jax, flax")
    assert "qvg_jax.attention.api" in ours
    heavy = ("pallas_kernels", "triton", "jax_triton", "jax.experimental.pallas")
    assert not [m for m in ours if "mosaic" in m or m.startswith(heavy)]


def test_the_range_of_jax_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"jax{qvg_jax.JAX_RANGE}" in project["dependencies"]
    for extra in ("gpu", "gpu-cuda12"):  # what the kernels are for, exactly
        (pin,) = [p for p in project["optional-dependencies"][extra] if p.startswith("jax[")]
        assert pin.partition("==")[2].startswith(f"{KERNELS_JAX}.")


@pytest.mark.parametrize("version", ["0.7.2", "0.13.0", "1.0.0.dev3"])
def test_a_jax_outside_the_range_is_said_with_both_versions(version, monkeypatch):
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.warns(RuntimeWarning) as said:
        qvg_jax._warn_of_an_untried_jax()
    (line,) = [str(warning.message) for warning in said]
    assert f"jax {version} is installed" in line and f"jax{qvg_jax.JAX_RANGE}" in line


@pytest.mark.parametrize("version", ["0.8.0", "0.10.1", "0.11.2.dev20260801", "0.12.0.1"])
def test_a_jax_inside_the_range_is_not_spoken_of(version, monkeypatch):
    monkeypatch.setattr(sys.modules["jax"], "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qvg_jax._warn_of_an_untried_jax()


def test_the_warning_comes_at_import_which_does_not_import_jax():
    code = """
import importlib.metadata, warnings
found = importlib.metadata.version
importlib.metadata.version = lambda name: "0.7.2" if name == "jax" else found(name)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import qvg_jax
assert "jax 0.7.2 is installed" in str(said[0].message)
assert said[0].filename == "<string>", said[0].filename
"""
    assert "jax" not in modules_after(code)
