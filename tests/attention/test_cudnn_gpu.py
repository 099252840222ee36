"""attend through cuDNN on a GPU, against the same path with XLA's attention in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qvg_jax.attention.cudnn import Workspaces, attend_cudnn, unsupported
from qvg_jax.backends import no_triton
from qvg_jax.cache.key_bias import KeyBias
from qvg_jax.cache.rope import axial_rope, frequency_ladder
from qvg_jax.codecs import presets
from tests.support.kernel_cases import difference, encodings, filled_cache, with_window_garbage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU"),
]

# Several calls for sink and window, and for spans.
SMALL = Workspaces(dense_bytes=2**17, span_bytes=2**18)
ROUNDING = 6e-3  # of the output and of merged results to bfloat16


@functools.partial(jax.jit, static_argnames=("workspaces", "backend"))
def ours(q, view, k, v, layer=0, workspaces=SMALL, backend="cudnn"):
    layer, scale = jnp.asarray(layer, jnp.int32), jnp.float32(q.shape[-1] ** -0.5)
    return attend_cudnn(q, view, k, v, layer, scale, backend=backend, workspaces=workspaces)[0]


def rope_of(head_dim):
    side = head_dim // 6 * 2
    return axial_rope([frequency_ladder(n) for n in (head_dim - 2 * side, side, side)])


def tokens(heads, head_dim, count=96, batch=1, query_heads=None, dtype=jnp.bfloat16):
    """q, k, v and positions of a new block."""
    keys = jax.random.split(jax.random.key(count), 3)
    many = query_heads or heads
    q, k, v = (
        jax.random.normal(key, (batch, count, n, head_dim)).astype(dtype)
        for key, n in zip(keys, (many, heads, heads), strict=True)
    )
    t = jnp.arange(count, dtype=jnp.float32)
    return q, k, v, jnp.stack([40 + t // 16, t % 16 // 4, t % 4], -1)[None]


def same(q, view, k, v, most=ROUNDING, **how):
    assert unsupported(view, q) is None
    out = ours(q, view, k, v, **how)
    want = ours(q, view, k, v, **how, backend="xla")
    assert out.dtype == q.dtype
    assert difference(out, want) < most


@pytest.mark.parametrize(
    "head_dim, name", [(64, "qvg"), (96, "bf16"), (96, "qvg"), (128, "bf16"), (256, "qvg")]
)
def test_head_dims(head_dim, name):
    settings = dict(num_centroids=16, group=32) if name == "qvg" else {}
    codec = presets.get(name, **settings)
    cache = filled_cache(codec, head_dim=head_dim)
    q, k, v, pos = tokens(2, head_dim)
    same(q, cache.view(pos, rope_of(head_dim)), k, v, layer=1)


@pytest.mark.parametrize(
    "count, sizes", [(1, Workspaces()), (7, SMALL), (130, Workspaces(parts=3))]
)
def test_any_number_of_tokens_and_parts(count, sizes):
    cache = filled_cache(presets.get("qvg", num_centroids=16), block=33)
    q, k, v, pos = tokens(2, 128, count)
    same(q, cache.view(pos, rope_of(128)), k, v, workspaces=sizes)


@pytest.mark.parametrize("blocks", [0, 1, 3, 5, 7])
def test_histories(blocks):
    cache = filled_cache(presets.get("qvg", num_centroids=16), blocks=blocks)
    q, k, v, pos = tokens(2, 128)
    same(q, cache.view(pos, rope_of(128)), k, v)


def test_groups_of_query_heads():
    cache = filled_cache(presets.get("qvg", num_centroids=16))
    q, k, v, pos = tokens(2, 128, query_heads=6)
    same(q, cache.view(pos, rope_of(128)), k, v)


def test_branches_share_a_cache():
    cache = filled_cache(presets.get("qvg", num_centroids=16))
    q, k, v, pos = tokens(2, 128, batch=3, query_heads=4)
    same(q, cache.view(pos, rope_of(128)), k, v)


def test_float16():
    cache = filled_cache(presets.get("qvg", num_centroids=16))
    q, k, v, pos = tokens(2, 128, dtype=jnp.float16)
    same(q, cache.view(pos, rope_of(128)), k, v, most=1e-3)


def test_encodings():
    cache = filled_cache(presets.get("qvg", num_centroids=16))
    q, k, v, _ = tokens(4, 128)
    same(q, cache.view(None, encodings()), k, v)


def test_an_offset_of_the_key_bias():
    cache = filled_cache(presets.get("rtn"), key_bias=KeyBias(offset=-0.7))
    q, k, v, pos = tokens(2, 128)
    same(q, cache.view(pos, rope_of(128)), k, v)


def test_nan_in_unused_slots_is_never_seen():
    cache = filled_cache(presets.get("bf16"), blocks=5)
    dead = jnp.arange(cache.layout.max_spans) >= cache.num_spans
    assert bool(dead.any()) and not bool(dead.all())
    nan = lambda x: jnp.where(dead[None, :, None, None, None, None], jnp.nan, x)  # noqa: E731
    spans = [jax.tree.map(nan, x) for x in (cache.span_k, cache.span_v)]
    poisoned = dataclasses.replace(cache, span_k=spans[0], span_v=spans[1])
    poisoned = with_window_garbage(poisoned)
    q, k, v, pos = tokens(2, 128)
    for sizes in (SMALL, Workspaces()):
        out = ours(q, poisoned.view(pos, rope_of(128)), k, v, workspaces=sizes)
        want = ours(q, cache.view(pos, rope_of(128)), k, v, workspaces=sizes)
        np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(want, np.float32))


def test_the_same_bytes_twice():
    cache = filled_cache(presets.get("qvg", num_centroids=16))
    q, k, v, pos = tokens(2, 128)
    first, second = (ours(q, cache.view(pos, rope_of(128)), k, v) for _ in range(2))
    np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))


def test_scan_over_layers():
    cache = filled_cache(presets.get("qvg", num_centroids=16), layers=3)
    q, k, v, pos = tokens(2, 128)
    view = cache.view(pos, rope_of(128))

    @jax.jit
    def scanned(view):
        return lax.scan(lambda c, i: (c, ours(q, view, k, v, i)), 0, jnp.arange(3))[1]

    for i, out in enumerate(scanned(view)):
        want = ours(q, view, k, v, i)
        assert difference(out, want) < 1e-6


def test_memory_is_that_of_one_call_and_no_layer_is_copied():
    block, heads = 1024, 4
    settings = dict(layers=3, heads=heads, block=block, span_blocks=4, max_spans=6, blocks=9)
    cache = filled_cache(presets.get("qvg", num_centroids=16), **settings)
    q, k, v, pos = tokens(heads, 128, 256)
    sizes = Workspaces(dense_bytes=2**20, span_bytes=1, parts=2)
    f = jax.jit(lambda c, q, k, v, i: ours(q, c.view(pos, rope_of(128)), k, v, i, sizes))
    compiled = f.lower(cache, q, k, v, 1).compile()
    program = compiled.as_text()
    layers, batch, _, total, d = cache.dense_k.shape
    whole, one = f"bf16[{layers},{batch},{heads},{total},{d}]", f"[{batch},{heads},{total},{d}]"
    assert whole in program and f"bf16{one}" not in program and f"f32{one}" not in program
    assert not [x for x in program.splitlines() if f"= {whole}" in x and "copy(" in x]
    one_span = 2 * 2 * heads * 4 * block * 128
    tables = 4 * 128 * (cache.span_pos.size + cache.dense_pos.size) // 3
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * one_span + 2 * tables


@pytest.mark.skipif(no_triton() is not None, reason=str(no_triton()))
@pytest.mark.parametrize(
    "name, blocks, sizes",
    [
        ("qvg", 7, dict()),  # both spans in a call
        ("dither", 7, dict(span_bytes=1)),  # one span in a call
        ("qvg", 5, dict(parts=3)),  # room for three spans, one there
    ],
)
def test_triton_decodes_spans(name, blocks, sizes):
    cache = filled_cache(presets.pair(name, num_centroids=16), block=33, blocks=blocks)
    q, k, v, pos = tokens(2, 128, query_heads=4)
    view = with_window_garbage(cache).view(pos, rope_of(128))
    triton = Workspaces(**sizes, decoder="triton")
    want = ours(q, view, k, v, layer=1, backend="xla", workspaces=Workspaces(**sizes))
    out = ours(q, view, k, v, layer=1, workspaces=triton)
    assert difference(out, want) < ROUNDING
    np.testing.assert_array_equal(out, ours(q, view, k, v, layer=1, workspaces=triton))
