"""Triton kernels on a GPU with jax_triton: `python -m pytest -n 0 -m gpu tests/kernels/test_triton_gpu.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequantize import Rotation, Spans, decode_keys, decode_values
from qvg_jax.backends import no_triton
from qvg_jax.codecs import presets
from tests.kernels.test_kernels_gpu import _layers
from tests.support.kernel_cases import (
    ENCODERS,
    FORMATS,
    HALF,
    INTERLEAVED,
    angles,
    codecs,
    difference,
    encoded,
    encoded_twice,
    filled_cache,
    on_cpu,
    round_trip_error,
    with_window_garbage,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(no_triton() is not None, reason=str(no_triton()))]


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_equals_the_reference(name):
    source, scheme = encoded(name, 12, 300)
    spans, here = Spans(source, scheme, 4, 6), dict(valid=300, dtype=jnp.bfloat16)
    # Tables of int8 with a step for each channel are rounded to bfloat16: 2.7e-3, of whatever codes.
    rounded = source.centroids_RSKD is not None and source.centroids_RSKD.dtype == jnp.int8
    bound = 4e-3 if rounded else 2e-3
    for pairing in ("half", "interleaved"):
        rotation = Rotation(angles(0, 6, 300), pairing, batch=2, first=2)
        keys = functools.partial(decode_keys, spans, **here, rotation=rotation)
        ours, right = keys(implementation="triton"), keys(implementation="reference")
        assert difference(ours, right) < bound
    values = functools.partial(decode_values, spans, **here)
    ours, right = values(implementation="triton"), values(implementation="reference")
    assert difference(ours, right) < bound


@pytest.mark.parametrize("pairing, tokens, width", [("half", 312, 1088), ("interleaved", 320, 999)])
def test_several_spans_fill_a_workspace(pairing, tokens, width):
    source, scheme = encoded("qvg", 12, tokens)
    spans = Spans(source, scheme, jnp.asarray([8, 0, 4]), 4)
    rotation = Rotation(angles(0, 6, tokens), pairing, batch=2, first=jnp.asarray([4, 0, 2]))
    here = dict(valid=2 * tokens + 100, dtype=jnp.bfloat16, width=width)
    for decode in (functools.partial(decode_keys, rotation=rotation), decode_values):
        ours, right = (decode(spans, **here, implementation=by) for by in ("triton", "reference"))
        assert difference(ours, right) < 2e-3
        assert not ours[:, 2 * tokens + 100 :].any()  # zeros, which NaN is not


@pytest.mark.parametrize("name", [*codecs(), "1 and 3 bits"])
def test_attend_equals_xla_inside_a_scan_over_layers(name):
    more = {"1 and 3 bits": presets.pair("midrise-k1v3", num_centroids=16)}
    cache = with_window_garbage(filled_cache((codecs() | more)[name]))
    rope = INTERLEAVED if name == "midrise" else HALF
    ours, again, right = (_layers(cache, rope, i) for i in ("triton", "triton", "xla"))
    assert difference(ours, right) < 1e-2
    np.testing.assert_array_equal(ours, again)


@pytest.mark.parametrize("name", ENCODERS)
def test_codecs_encode_as_well_as_xla(name):
    codec = ENCODERS[name]()
    ours, again = (encoded_twice(codec, "triton", tokens=1000) for _ in range(2))
    right = on_cpu(lambda: encoded_twice(codec, "xla", tokens=1000))
    error = functools.partial(on_cpu, functools.partial(round_trip_error, codec))
    for a, b in zip(ours, right, strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert error(a) < 1.03 * error(b)
    for a, b in zip(ours, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
