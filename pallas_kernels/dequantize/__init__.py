"""Packed spans back to keys and values, in the form that the attention kernels read."""

from pallas_kernels.dequantize.api import (
    append_keys,
    append_values,
    decode_keys,
    decode_values,
    supported,
)
from pallas_kernels.dequantize.reference import in_key_rows
from pallas_kernels.dequantize.types import (
    HEAD_DIMS,
    Encoded,
    Rotation,
    Scheme,
    Spans,
    Tokens,
    Window,
)

__all__ = [
    "HEAD_DIMS",
    "Encoded",
    "Rotation",
    "Scheme",
    "Spans",
    "Tokens",
    "Window",
    "append_keys",
    "append_values",
    "decode_keys",
    "decode_values",
    "in_key_rows",
    "supported",
]
