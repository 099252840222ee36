"""Spans for tests of codecs, and what is asked of every encoding of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qvg_jax.codecs.accounting import packed_bytes
from qvg_jax.codecs.base import EmptyState

# Level 0: each program runs once or twice in a test, so that compile time is what counts.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal_tokens(seed, shape=(2, 2, 24, 32), spread=0.6):
    """Normal channels, token sizes that differ, float32."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, spread, (*shape[:3], 1)))
    return jnp.asarray(rng.normal(0, 1, shape) * size, jnp.float32)


def correlated_tokens(seed, shape=(1, 2, 64, 128)):
    """Channels around a mean, of falling size, bfloat16."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(0, 1, (*shape[:2], 1, shape[3]))
    x = mean + rng.normal(0, 0.5, shape) * np.geomspace(1.5, 0.3, shape[3])
    return jnp.asarray(x, jnp.bfloat16)


def code(codec, x):
    """Packed form and reconstruction of a codec without state, whose bytes are as promised."""
    packed, state = jit(codec.encode)(x, codec.init(x.shape, x.dtype))
    assert state == EmptyState() and packed_bytes(packed) == codec.nbytes(x.shape)
    return packed, np.asarray(jit(codec.decode, static_argnums=1)(packed, jnp.float32))


def round_trip(codec, x):
    """Packed form, state and reconstruction in float32."""
    packed, state = jit(codec.encode)(x, codec.init(x.shape, x.dtype))
    return packed, state, np.asarray(jit(codec.decode, static_argnums=1)(packed, jnp.float32))


def energy(x):
    """The sum of squares, in float64."""
    return float((np.asarray(x, np.float64) ** 2).sum())


def relative_error(x, hat):
    """The norm of the difference over the norm."""
    x = np.asarray(x, np.float64)
    return np.linalg.norm(x - hat) / np.linalg.norm(x)
