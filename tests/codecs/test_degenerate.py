"""Spans that have next to nothing in them, in every kind of codec: defined, finite, and not wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_jax.codecs.accounting import packed_bytes
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.quantize import (
    allocated_quantize,
    by_energy,
    grid_quantize,
    heads_as_channels,
    heads_as_tokens,
    residual_quantize,
    trellis_quantize,
)
from qvg_jax.codecs.smoothing import (
    klt_rotation,
    kmeans_smoothing,
    low_rank_smoothing,
    rotation,
)

D = 16
CODECS = {
    "k-means, integers": chain(kmeans_smoothing(1), residual_quantize(4, 8, normalize=True)),
    "one axis, by energy": chain(
        low_rank_smoothing(1),
        rotation(signs="token"),
        heads_as_tokens(by_energy(trellis_quantize(4), grid_quantize(4))),
    ),
    "full rank, across heads": chain(klt_rotation(), heads_as_channels(allocated_quantize(4.0))),
    "low rank": chain(low_rank_smoothing(rank=D), grid_quantize(4)),
}


@functools.cache
def programs(name):
    low = dict(compiler_options={"xla_backend_optimization_level": 0})
    codec = CODECS[name]
    return jax.jit(codec.encode, **low), jax.jit(codec.decode, static_argnums=1, **low)


@pytest.mark.parametrize("name", CODECS)
@given(
    count=st.sampled_from([1, 3]),
    kind=st.sampled_from(["any", "constant", "equal tokens", "one entry", "zero"]),
    size=st.sampled_from([1e-20, 1.0, 700.0, 1e6]),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_spans_of_one_token_one_value_or_less_rank_than_axes(name, count, kind, size, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (1, 2, count, D))
    if kind == "constant":
        x[:] = x[0, 0, 0, 0]
    elif kind == "equal tokens":
        x[:] = x[:, :, :1]
    elif kind == "one entry":
        x = np.zeros_like(x)
        x[0, 1, -1, 3] = 1
    elif kind == "zero":
        x = np.zeros_like(x)
    x = jnp.asarray(x * size, jnp.float32)
    codec, (encode, decode) = CODECS[name], programs(name)
    packed, _ = encode(x, codec.init(x.shape, x.dtype))
    assert packed_bytes(packed) == codec.nbytes(x.shape)
    hat = np.asarray(decode(packed, jnp.float32), np.float64) / size
    exact = np.asarray(x, np.float64) / size
    assert np.isfinite(hat).all()
    wrong = np.linalg.norm(hat - exact)
    if kind == "zero":
        assert wrong == 0
    else:  # "one entry" is the hardest: a grid without a level at zero, one scale for all channels
        assert wrong <= (1.0 if kind == "one entry" else 0.3) * np.linalg.norm(exact)
