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
