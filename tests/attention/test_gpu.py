"""What only a GPU can show: run by hand with `python -m pytest -m gpu tests/test_gpu.py`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.self_forcing.entry import Options
from models.self_forcing.params import WEIGHTS
from models.self_forcing.plan import _step
from models.self_forcing.settings import released_sizes, settle
from qvg_jax.attention.api import attend
from qvg_jax.cache.devices import spread
from qvg_jax.cache.operations import KVCache, append, compress
from qvg_jax.cache.plan import Plan
from qvg_jax.cache.rope import axial_rope, frequency_ladder
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import identity
from qvg_jax.loop import run_chunk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU"),
]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _clustered(key, shape, centres=64):
    """Tokens around a few centres, bf16: what k-means is for."""
    k_centre, k_pick, k_noise = jax.random.split(key, 3)
    b, h, t, d = shape
    centre = jax.random.normal(k_centre, (h, centres, d))
    pick = jax.random.randint(k_pick, (b, h, t), 0, centres)
    x = jax.vmap(lambda c, i: c[i], (0, 1), 1)(centre, pick)
    return (x + 0.4 * jax.random.normal(k_noise, shape)).astype(jnp.bfloat16)


@pytest.mark.parametrize("name", ["qvg", "qvg-pro"])
def test_encode_gives_the_same_bytes_twice(name):
    codec, shape = presets.get(name), (1, 12, 37_440, 128)
    x = _clustered(jax.random.key(0), shape)
    encode = jax.jit(lambda x, s: codec.encode(x, s)[0])
    state = codec.init(shape, x.dtype)
    first, second = (jax.device_get(encode(x, state)) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    error = jax.jit(
        lambda p: jnp.linalg.norm((codec.decode(p, jnp.float32) - x).astype(jnp.float32))
    )
    assert float(error(first)) < 0.5 * float(jnp.linalg.norm(x.astype(jnp.float32)))


def _filled(codec, blocks, *, block_tokens, span_blocks, heads=12, head_dim=128, max_spans=3):
    cache = KVCache.create(
        heads=heads, head_dim=head_dim, block_tokens=block_tokens, span_blocks=span_blocks, max_spans=max_spans,
        keep_recent=1, sink_blocks=1, pos_dims=1, key_codec=codec, value_codec=codec,
    )  # fmt: skip
    add = jax.jit(lambda c, k, v, p: compress(append(c, k, v, p)), donate_argnums=0)
    for i in range(blocks):
        k, v = (
            _clustered(jax.random.key(2 * i + j), (1, heads, block_tokens, head_dim)).swapaxes(1, 2)
            for j in (0, 1)
        )
        position = (i * block_tokens + jnp.arange(block_tokens, dtype=jnp.float32))[None, :, None]
        cache = add(cache, k, v, position)
    return cache


def test_attend_in_bf16_equals_exact_softmax_over_the_stored_history():
    heads, d, block, blocks = 4, 128, 256, 20
    rope = axial_rope([frequency_ladder(d)])
    cache = _filled(identity(), blocks, block_tokens=block, span_blocks=6, heads=heads)
    shape = (1, block, heads, d)
    q, k, v = (
        jax.random.normal(jax.random.key(100 + i), shape).astype(jnp.bfloat16) for i in range(3)
    )
    now = (blocks * block + jnp.arange(block, dtype=jnp.float32))[None, :, None]
    ours = jax.jit(functools.partial(attend, rope=rope))(q, cache, k, v, positions=now)

    keys, values, positions = [k], [v], [now]
    for i in range(blocks):
        made = (
            _clustered(jax.random.key(2 * i + j), (1, heads, block, d)).swapaxes(1, 2)
            for j in (0, 1)
        )
        for parts, x in zip((keys, values), made, strict=True):
            parts.append(x)
        positions.append((i * block + jnp.arange(block, dtype=jnp.float32))[None, :, None])
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    rotate = lambda x, p: rope.rotate(f32(x).swapaxes(1, 2), rope.table(p))  # noqa: E731
    q_BHTD, k_BHTD = rotate(q, now), rotate(jnp.concatenate(keys, 1), jnp.concatenate(positions, 1))
    with jax.default_matmul_precision("highest"):
        weights = jax.nn.softmax(jnp.einsum("bhqd,bhtd->bhqt", q_BHTD, k_BHTD) / d**0.5, -1)
        exact = jnp.einsum("bhqt,bthd->bqhd", weights, f32(jnp.concatenate(values, 1)))
    error = jnp.linalg.norm(f32(ours) - exact) / jnp.linalg.norm(exact)
    assert float(error) < 1e-2


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_kernels_on_parts_of_a_cache_give_what_they_give_on_all_of_it(precision):
    """Their log-sum-exp is that of XLA, and on two GPUs, where there are two, plans merge by it."""
    cache = _filled(presets.get("qvg"), 20, block_tokens=256, span_blocks=6)
    q, k, v = jax.random.normal(jax.random.key(7), (3, 1, 256, 12, 128)).astype(jnp.bfloat16)
    now = (20 * 256 + jnp.arange(256, dtype=jnp.float32))[None, :, None]
    rope = axial_rope([frequency_ladder(128)])

    def read(cache, **names):
        read = functools.partial(attend, rope=rope, return_lse=True, **names)
        return jax.jit(read)(q, cache, k, v, positions=now)

    right = read(cache, implementation="xla")
    caches = [cache]
    if jax.device_count() > 1:
        longer = _filled(presets.get("qvg"), 20, block_tokens=256, span_blocks=6, max_spans=4)
        caches += [spread(longer, Plan(spans=2)), spread(longer, Plan(heads=2))]
        caches += [spread(longer, Plan(ring=2))]
    for some in caches:
        out, lse = jax.device_get(read(some, implementation="mosaic", precision=precision))
        error = np.linalg.norm(np.float32(out) - np.float32(right[0]))
        assert error < (6e-2 if precision == "fp8" else 2e-2) * np.linalg.norm(np.float32(right[0]))
        np.testing.assert_allclose(lse, right[1], rtol=0, atol=0.1 if precision == "fp8" else 2e-2)


def test_reading_three_long_spans_takes_the_memory_of_one():
    """A Self-Forcing layer: 12 heads, spans of 37,440 tokens, 4,680 queries."""
    block = 4_680
    cache = _filled(presets.get("qvg"), 26, block_tokens=block, span_blocks=8)
    assert int(cache.num_spans) == 3
    q, k, v = (
        jax.random.normal(jax.random.key(i), (1, block, 12, 128)).astype(jnp.bfloat16)
        for i in range(3)
    )
    now = (26 * block + jnp.arange(block, dtype=jnp.float32))[None, :, None]
    rope = axial_rope([frequency_ladder(128)])
    compiled = (
        jax.jit(functools.partial(attend, rope=rope)).lower(q, cache, k, v, positions=now).compile()
    )
    temporary = compiled.memory_analysis().temp_size_in_bytes
    one_span = 2 * 2 * 12 * 8 * block * 128  # K and V in bf16
    out = compiled(q, cache, k, v, positions=now)
    assert bool(jnp.isfinite(out.astype(jnp.float32)).all())
    print(f"temporaries {temporary / 2**20:.0f} MiB, one decoded span {one_span / 2**20:.0f} MiB")
    assert temporary < 5 * one_span


def test_a_model_that_appends_neither_copies_nor_transposes_its_cache():
    """XLA for GPUs once turned the whole bf16 buffer, twice a block; XLA for CPUs never did."""
    options = Options(frames=54, codec="qvg:num_centroids=16", height=64, width=96)
    sizes = released_sizes()
    small = dict(layers=2, width=256, heads=2, ffn_width=64)
    sizes = dataclasses.replace(sizes, dit=dataclasses.replace(sizes.dit, **small))
    settings = settle(options, sizes)
    cache = settings.cache(options.codecs[0])
    arguments = _step(settings, WEIGHTS.skeleton(sizes.dit), cache)
    program = run_chunk.lower(*arguments).compile().as_text()
    layers, batch, heads, tokens, d = cache.dense_k.shape
    whole = f"bf16[{layers},{batch},{heads},{tokens},{d}]"
    turned = f"bf16[{layers},{batch},{tokens},{heads},{d}]"
    assert whole in program and turned not in program
    made = [line.split("=", 1)[1] for line in program.splitlines() if f"= {whole}" in line]
    assert made and not [m for m in made if " transpose(" in m or " copy(" in m]
