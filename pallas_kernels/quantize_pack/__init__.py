"""The last pass of encoding a span: nearest centroid, residual, codes and scales."""

from pallas_kernels.quantize_pack.api import (
    assign_and_pack,
    assign_and_subtract,
    pack_dithered,
    supported,
)
from pallas_kernels.quantize_pack.types import Dithered, Integers, Midrise

__all__ = [
    "Dithered",
    "Integers",
    "Midrise",
    "assign_and_pack",
    "assign_and_subtract",
    "pack_dithered",
    "supported",
]
