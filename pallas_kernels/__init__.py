"""GPU kernels of the compressed cache: arrays in, arrays out, nothing about caches or models.

One folder per kernel: `api.py` chooses an implementation, `reference.py` is the definition in plain
JAX, `mosaic_gpu.py` is the Hopper kernel, `triton.py` the one for other GPUs. `lanes.py` is the small
vocabulary for code that says what one GPU thread does, `triton_launch.py` calls Triton from JAX.
"""

from pallas_kernels.dequantize import Encoded, Scheme, decode_keys, decode_values

__all__ = ["Encoded", "Scheme", "decode_keys", "decode_values"]
