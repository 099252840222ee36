"""GPU kernels of the compressed cache: arrays in, arrays out, nothing about caches or models.

There is one folder per kernel: `api.py` chooses an implementation, `reference.py` is the definition in
plain JAX, `mosaic_gpu.py` is the Hopper kernel, `triton.py` the one for other GPUs. `gpu` holds the parts
that several kernels share. Importing a folder imports neither Mosaic nor Triton: a kernel is imported
when it is first asked for.
"""

from pallas_kernels.dequantize import Encoded, Scheme, decode_keys, decode_values

__all__ = ["Encoded", "Scheme", "decode_keys", "decode_values"]
