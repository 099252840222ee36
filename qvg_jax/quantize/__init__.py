"""Quantizers: codecs that store what the smoothings leave, in a few bits per channel."""

from qvg_jax.quantize.integer import IntegerPacked, residual_quantize
from qvg_jax.quantize.packing import pack, packed_width, unpack

__all__ = ["IntegerPacked", "pack", "packed_width", "residual_quantize", "unpack"]
