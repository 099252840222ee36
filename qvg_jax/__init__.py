"""Quant VideoGen in JAX: a KV cache at two bits for long auto-regressive video generation.

Letters in array names: B batch, L layers, T tokens, H heads, D head dim, K centroids, G groups,
C code bytes, S stages, F latent frames, N spans, P position components.
"""

from qvg_jax import presets
from qvg_jax.accounting import bits_per_element, compression_ratio, packed_bytes
from qvg_jax.attention import attend
from qvg_jax.cache import KVCache, append, compress, evict
from qvg_jax.codec import Codec, identity
from qvg_jax.compose import chain, encoded_by
from qvg_jax.health import CacheFullError, NonFiniteError, cache_bytes, raise_if_bad
from qvg_jax.key_bias import KeyBias
from qvg_jax.quantize.grid import grid_quantize
from qvg_jax.quantize.integer import residual_quantize
from qvg_jax.recode import recode
from qvg_jax.rollout import rollout, stream
from qvg_jax.rope import Rope, axial_rope, frequency_ladder
from qvg_jax.smoothing.kmeans import kmeans_smoothing

__version__ = "0.1.0"

__all__ = [
    "CacheFullError",
    "Codec",
    "KVCache",
    "KeyBias",
    "NonFiniteError",
    "Rope",
    "append",
    "attend",
    "axial_rope",
    "bits_per_element",
    "cache_bytes",
    "chain",
    "compress",
    "compression_ratio",
    "encoded_by",
    "evict",
    "frequency_ladder",
    "grid_quantize",
    "identity",
    "kmeans_smoothing",
    "packed_bytes",
    "presets",
    "raise_if_bad",
    "recode",
    "residual_quantize",
    "rollout",
    "stream",
]
