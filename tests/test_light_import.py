"""`import qvg_jax` is light: kernels and the compilers' dialects are imported when a kernel is asked for."""

import subprocess
import sys

PROGRAM = """
import sys
import jax
import qvg_jax as qvg

cache = qvg.KVCache.create(
    heads=1, head_dim=64, block_tokens=4, span_blocks=2, max_spans=1, pos_dims=0,
    key_codec=qvg.presets.get("qvg", num_centroids=4), value_codec=qvg.presets.get("rtn"),
)
heavy = ("pallas_kernels", "jax.experimental.mosaic", "jax.experimental.pallas", "jaxlib.mlir.dialects.nvvm")
print([m for m in sys.modules if m.startswith(heavy)])
"""


def test_importing_the_library_and_making_a_cache_imports_no_kernel():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "[]"
