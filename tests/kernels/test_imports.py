"""What importing the kernels' packages brings with it."""

import subprocess
import sys


def test_the_packages_import_neither_mosaic_nor_triton():
    """Their types and functions are for every machine; kernels are imported when one is asked for."""
    program = """
import sys
import jax.numpy
before = set(sys.modules)
import pallas_kernels
from pallas_kernels import dequant_attention, dequantize, kmeans, quantize_pack
new = {m for m in set(sys.modules) - before if not m.startswith("pallas_kernels")}
assert "pallas_kernels.dequantize.types" in sys.modules
print(*sorted(m for m in new if "mosaic" in m or "triton" in m or "pallas" in m or "mlir" in m))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []
