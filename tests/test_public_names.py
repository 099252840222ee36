"""The public names of the library, and what importing it costs."""

import subprocess
import sys

import qvg_jax

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


def test_the_library_on_a_cpu_loads_no_dialect_of_mosaic():
    code = "import qvg_jax\nfor name in qvg_jax.__all__: getattr(qvg_jax, name)"
    ours = modules_after(code) - modules_after("import jax, flax")
    assert "qvg_jax.attention.api" in ours
    assert not [m for m in ours if "mosaic" in m or m.startswith("triton") or "jax_triton" in m]
