"""Quantizers: codecs that store what the smoothings leave, in a few bits per channel."""

from qvg_jax.codecs.quantize.allocated import AllocatedPacked, allocated_quantize
from qvg_jax.codecs.quantize.by_energy import ByEnergyPacked, by_energy
from qvg_jax.codecs.quantize.dithered import DitheredPacked, dithered_quantize
from qvg_jax.codecs.quantize.grid import GridPacked, grid_quantize
from qvg_jax.codecs.quantize.heads import HeadsPacked, heads_as_channels, heads_as_tokens
from qvg_jax.codecs.quantize.integer import IntegerPacked, residual_quantize
from qvg_jax.codecs.quantize.lattice import LatticePacked, lattice_quantize
from qvg_jax.codecs.quantize.minmax import MinMaxPacked, minmax_quantize
from qvg_jax.codecs.quantize.nvfp4 import NVFP4Packed, nvfp4_quantize
from qvg_jax.codecs.quantize.packing import pack, packed_width, unpack
from qvg_jax.codecs.quantize.trellis import TrellisPacked, trellis_quantize

__all__ = [
    "AllocatedPacked",
    "ByEnergyPacked",
    "DitheredPacked",
    "GridPacked",
    "HeadsPacked",
    "IntegerPacked",
    "LatticePacked",
    "MinMaxPacked",
    "NVFP4Packed",
    "TrellisPacked",
    "allocated_quantize",
    "by_energy",
    "dithered_quantize",
    "grid_quantize",
    "heads_as_channels",
    "heads_as_tokens",
    "lattice_quantize",
    "minmax_quantize",
    "nvfp4_quantize",
    "pack",
    "packed_width",
    "residual_quantize",
    "trellis_quantize",
    "unpack",
]
