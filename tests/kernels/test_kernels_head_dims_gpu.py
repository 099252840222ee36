"""Numbers of the kernels that read, for heads of 64 and 256 channels, on a Hopper GPU:

    python -m pytest -n 1 -m gpu tests/kernels/test_kernels_head_dims_gpu.py

Bounds as in test_kernels_gpu.py, which has 128 channels, more formats and more shapes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.dequant_attention import combine_splits, prepare, visit
from pallas_kernels.dequant_attention import reference as attention_reference
from pallas_kernels.dequantize import (
    Rotation,
    Spans,
    Tokens,
    Window,
    decode_keys,
    decode_values,
)
from qvg_jax.attention.api import attend
from qvg_jax.backends import is_hopper
from tests.support.kernel_cases import (
    E4M3,
    angles,
    codecs,
    difference,
    encoded,
    filled_cache,
    on_cpu,
    positions,
    rope_of,
    with_window_garbage,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_hopper(), reason="no Hopper GPU"),
    pytest.mark.parametrize("head_dim", [64, 256]),
]


@pytest.mark.parametrize(
    "name, pairing",
    [("qvg", "half"), ("midrise, 3 bits", "interleaved"), ("midrise, e4m3 tables", "half")],
)
@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 4e-3), (E4M3, 1.5e-2)])
def test_decoding_equals_the_reference(head_dim, name, pairing, dtype, bound):
    tokens = 300  # partial tiles
    source, scheme = encoded(name, 12, tokens, head_dim=head_dim)
    here = dict(valid=tokens, dtype=dtype, scale_n=2.0 ** np.arange(-1.0, 5.0))

    def decode(source, cos_sin, implementation):
        spans, rotation = Spans(source, scheme, 4, 6), Rotation(cos_sin, pairing, batch=2, first=2)
        by = here | dict(implementation=implementation)
        return decode_keys(spans, rotation=rotation, **by), decode_values(spans, **by)

    args = source, angles(0, 6, tokens, head_dim)
    right = on_cpu(lambda s, x: decode(s, x, "reference"), *args)
    for a, b in zip(jax.jit(decode, static_argnums=2)(*args, "mosaic"), right, strict=True):
        assert a.shape == b.shape and difference(a, b) < bound


@pytest.mark.parametrize("dtype", [jnp.bfloat16, E4M3], ids=["bf16", "e4m3"])
def test_a_window_of_plain_tokens_is_decoded(head_dim, dtype):
    x = np.random.default_rng(0).standard_normal((4, 700, head_dim))
    x = jnp.asarray(x, jnp.bfloat16).at[:, 600:].set(jnp.nan)
    here = dict(valid=240, dtype=dtype, scale_n=np.ones(2))

    def decode(x, implementation):
        window, more = Window(Tokens(x, 1, 2), 360, 300), dict(implementation=implementation)
        return [f(window, **here, **more) for f in (decode_keys, decode_values)]

    right = on_cpu(lambda x: decode(x, "reference"), x)
    for a, b, axis in zip(decode(x, "mosaic"), right, (1, 2 if dtype == E4M3 else 1), strict=True):
        a, b = (np.asarray(y, np.float32).take(range(256), axis) for y in (a, b))
        np.testing.assert_array_equal(a, b)  # attention reads no further than those 256 tokens


@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 4e-3), (E4M3, 3e-2)])
def test_attention_equals_the_reference(head_dim, dtype, bound):
    """Three splits; partial tiles, an empty segment, one token."""
    rng = np.random.default_rng(2)
    tokens, segments = 1536, (1400, 0, 1, 1536)
    q = jnp.asarray(rng.standard_normal((3, 200, head_dim)), jnp.bfloat16)
    k, v = (
        jnp.asarray(rng.standard_normal((3, tokens, head_dim)) + m, jnp.bfloat16) for m in (0, 1)
    )
    scale = jnp.asarray([0.5, 1.0, 2.0])
    scales = scale if dtype == E4M3 else jnp.ones(3)

    def prepared(q, k, v, scale):
        here = dict(dtype=dtype, scale_n=scale, implementation="reference")
        both = ((decode_keys, k), (decode_values, v))
        return prepare(q, jnp.float32(head_dim**-0.5), dtype), [
            f(Tokens(x, 0, 3), valid=tokens, **here) for f, x in both
        ]

    queries, workspace = jax.device_put(on_cpu(prepared, q, k, v, scale), jax.devices()[0])

    @jax.jit
    def ours(queries, workspace):
        three = dict(k_scale_n=scales, v_scale_n=scales, splits=3)
        refs = [jax.new_ref(x) for x in visit(queries, *workspace, segments[0], **three)]
        for valid in segments[1:]:
            visit(queries, *workspace, valid, state=refs, **three)
        return combine_splits([r[...] for r in refs], 200)

    def reference(queries, workspace, scales):
        state = attention_reference.empty(1, *queries.q_nQD.shape)
        for valid in segments:
            state = attention_reference.segment(*queries, *workspace, valid, scales, scales, state)
        return combine_splits(state, 200)

    right = on_cpu(reference, queries, workspace, scales)
    assert difference(ours(queries, workspace), right) < bound


@pytest.mark.parametrize(
    "implementation, name, bound", [("mosaic", "midrise-k1v3", 1e-2), ("mosaic_fp8", "qvg", 6e-2)]
)
def test_attend_equals_xla_inside_a_scan_over_layers(head_dim, implementation, name, bound):
    """Spans behind each other, shared queries of the last wave, two query heads a head."""
    cache = with_window_garbage(filled_cache(codecs()[name], head_dim=head_dim))
    rope = rope_of("half" if head_dim == 64 else "interleaved", head_dim)
    rng = np.random.default_rng(5)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, 1, 96, heads, head_dim)), jnp.bfloat16)
        for heads in (4, 2, 2)
    )

    def read(by):
        @jax.jit
        def run(q, cache, k, v, pos):
            view = cache.view(pos, rope)

            def layer(_, x):
                q, k, v, i = x
                return None, attend(q, view, k, v, layer=i, implementation=by)

            return lax.scan(layer, None, (q, k, v, jnp.arange(2)))[1]

        args = q, cache, k, v, positions(7, 96)
        return on_cpu(run, *args) if by == "xla" else run(*args)

    assert difference(read(implementation), read("xla")) < bound
