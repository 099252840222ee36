"""Attention kernels on a Hopper GPU: `python -m pytest -m gpu tests/kernels/test_kernels_gpu.py`.

Everything is compared with a reference on the same packed bytes: 2e-3 relative in bf16, 4e-3 where tables of
8 bits are one more rounding; in e4m3 the reference rounds the same values, so differences are those of one
rounding now and then. References are computed on the CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from models.worldplay.history import side_by_side
from pallas_kernels.dequant_attention import (
    Schedule,
    combine_splits,
    prepare,
    visit,
)
from pallas_kernels.dequant_attention import reference as attention_reference
from pallas_kernels.dequantize import (
    Tokens,
    decode_keys,
    decode_values,
)
from qvg_jax.attention import kernel_plan
from qvg_jax.attention import kernels as mosaic
from qvg_jax.attention.api import attend
from qvg_jax.attention.choice import explain
from qvg_jax.attention.kernel_plan import Plan
from qvg_jax.backends import is_hopper
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.codecs.quantize.grid import grid_quantize
from tests.support.kernel_cases import (
    E4M3,
    HALF,
    INTERLEAVED,
    codecs,
    difference,
    encodings,
    filled_cache,
    on_cpu,
    positions,
    with_window_garbage,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_hopper(), reason="no Hopper GPU"),
]


def _floats(x) -> np.ndarray:
    return np.asarray(x, np.float32)


@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 4e-3), (E4M3, 3e-2)])
@pytest.mark.parametrize("splits", [1, 3, Schedule(6, 4, 3)], ids=["1", "3", "last ones in 3"])
def test_attention_equals_the_reference(dtype, bound, splits):
    """Partial tiles, an empty segment, one token; e4m3 rounds the probabilities too."""
    rng = np.random.default_rng(2)
    tokens = 1536
    q = jnp.asarray(rng.standard_normal((3, 200, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((3, tokens, 128)) + m, jnp.bfloat16) for m in (0, 1))
    scale = jnp.asarray([0.5, 1.0, 2.0])
    scales = scale if dtype == E4M3 else jnp.ones(3)

    def prepared(q, k, v, scale):
        here = dict(dtype=dtype, scale_n=scale, implementation="reference")
        both = ((decode_keys, k), (decode_values, v))
        return prepare(q, jnp.float32(128**-0.5), dtype), [
            f(Tokens(x, 0, 3), valid=tokens, **here) for f, x in both
        ]

    queries, workspace = jax.device_put(on_cpu(prepared, q, k, v, scale), jax.devices()[0])

    @jax.jit
    def ours(queries, workspace):
        two = dict(k_scale_n=scales, v_scale_n=scales, splits=splits)
        refs = [jax.new_ref(x) for x in visit(queries, *workspace, 1400, **two)]
        for valid in (0, 1, tokens):
            visit(queries, *workspace, valid, state=refs, **two)
        schedule = None if isinstance(splits, int) else splits
        return combine_splits([r[...] for r in refs], 200, schedule)

    def reference(queries, workspace, scales):
        state = attention_reference.empty(1, *queries.q_nQD.shape)
        for valid in (1400, 0, 1, tokens):
            state = attention_reference.segment(*queries, *workspace, valid, scales, scales, state)
        return combine_splits(state, 200)

    right = on_cpu(reference, queries, workspace, scales)
    assert difference(ours(queries, workspace), right) < bound


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_queries_of_zeros_and_of_large_logits_in_e4m3(head_dim):
    """A query of zeros has the mean of the keys that count; base-2 logits of up to 7,000 leave one key."""
    rng = np.random.default_rng(3)
    tokens, valid = 1024, 700
    q, k, v = (rng.standard_normal((2, size, head_dim)) for size in (128, tokens, tokens))
    q[:, :10] = 0
    largest = np.linspace(20, 7000, 10)[:, None] * np.log(2) * head_dim**0.5
    q[:, 10:20] = k[:, :10] / np.sum(k[:, :10] ** 2, axis=-1, keepdims=True) * largest

    def prepared(q, k, v):
        here = dict(valid=valid, dtype=E4M3, scale_n=jnp.full(2, 0.02), implementation="reference")
        queries = prepare(q.astype(jnp.bfloat16), jnp.float32(head_dim**-0.5), E4M3)
        return queries, [
            f(Tokens(x, 0, 2), **here) for f, x in ((decode_keys, k), (decode_values, v))
        ]

    queries, workspace = on_cpu(prepared, q, k, v)
    scales = jnp.full(2, 0.02)
    state = attention_reference.empty(1, *queries.q_nQD.shape)
    right = on_cpu(attention_reference.segment, *queries, *workspace, valid, scales, scales, state)
    two = dict(k_scale_n=scales, v_scale_n=scales, splits=2)
    queries, workspace = jax.device_put((queries, workspace), jax.devices()[0])
    found = visit(queries, *workspace, valid, **two)
    ours, right = (_floats(combine_splits(x, 128)) for x in (found, right))
    assert np.isfinite(ours).all()
    for rows in (slice(0, 10), slice(10, 20), slice(20, 128)):
        error = np.linalg.norm(ours[:, rows] - right[:, rows])
        assert error < 3e-2 * np.linalg.norm(right[:, rows])


@pytest.mark.parametrize("name", codecs())
@pytest.mark.parametrize("implementation, bound", [("mosaic", 1e-2), ("mosaic_fp8", 6e-2)])
def test_attend_equals_xla_inside_a_scan_over_layers(name, implementation, bound):
    if name == "bf16" and implementation == "mosaic_fp8":
        with pytest.raises(NotImplementedError, match="bound"):
            _layers(filled_cache(codecs()[name]), HALF, implementation)
        return
    cache = with_window_garbage(filled_cache(codecs()[name]))
    rope = INTERLEAVED if name == "midrise" else HALF
    ours, right = (_layers(cache, rope, i) for i in (implementation, "xla"))
    assert difference(ours, right) < bound
    chosen = explain(cache.view(rope=False), jnp.zeros((1, 96, 2, 128), jnp.bfloat16))
    assert chosen.implementation == "mosaic"
    if implementation == ("mosaic_fp8" if chosen.precision == "fp8" else "mosaic"):
        np.testing.assert_array_equal(_layers(cache, rope, None), ours)


@pytest.mark.parametrize("implementation, bound", [("mosaic", 1e-2), ("mosaic_fp8", 6e-2)])
@pytest.mark.parametrize("own_window", [False, True], ids=["one window", "own windows"])
def test_heads_with_a_history_and_local_ones_are_attended_as_xla_does(
    implementation, bound, own_window
):
    """Layers with both heads, one and none; two layers of one program."""
    table = [[True, True], [True, False], [False, False], [False, True]]
    history = HeadHistory(table, 1, own_window)
    cache = filled_cache(codecs()["dither"], layers=4, history=history)
    cache = with_window_garbage(cache)
    ours, right = (_layers(cache, HALF, i) for i in (implementation, "xla"))
    assert difference(ours, right) < bound
    assert not bool(jnp.isnan(ours).any())


@pytest.mark.parametrize("implementation, bound", [("mosaic", 1e-2), ("mosaic_fp8", 6e-2)])
def test_two_encodings_of_one_k_and_v_are_attended_as_xla_does(implementation, bound):
    cache = with_window_garbage(filled_cache(codecs()["qvg"]))
    ours, right = (_layers(cache, encodings(), i) for i in (implementation, "xla"))
    assert difference(ours, right) < bound


@pytest.mark.parametrize(
    "codec, bound",
    [(grid_quantize(grid="lloyd_max"), 1e-2), (side_by_side(codecs()["qvg"]), 6e-2)],
    ids=["odd", "joined"],
)
def test_a_codec_that_the_kernels_cannot_read_comes_in_by_xla(codec, bound):
    """Levels not equally spaced; two heads in one vector, which become two rows, read in fp8.

    Nothing is named: a named kernel would refuse the levels, the choice takes its attention.
    """
    cache = filled_cache(codec)
    assert (
        explain(cache.view(rope=False), jnp.zeros((1, 96, 2, 128), jnp.bfloat16)).implementation
        == "mosaic"
    )
    ours, right = (_layers(cache, HALF, i) for i in (None, "xla"))
    assert difference(ours, right) < bound


def _layers(cache, rope, implementation, block=96, plan=None):
    """All layers in a scan; "xla" on the CPU, and with a plan the kernels under it."""
    rng = np.random.default_rng(5)
    layers = cache.layout.layers
    copies = getattr(rope, "copies", 1)
    shape = (1, block, copies * cache.layout.heads, 128)
    q, k, v = (jnp.asarray(rng.standard_normal((layers, *shape)), jnp.bfloat16) for _ in range(3))
    q = jnp.concatenate([q, q[:, :, ::-1]], 3)  # two query heads for each key-value head

    @jax.jit
    def run(q, cache, k, v, pos):
        view = cache.view(pos if rope and copies == 1 else None, rope or False)

        def layer(_, x):
            q, k, v, i = x
            if plan is None:
                return None, attend(q, view, k, v, layer=i, implementation=implementation)
            fp8, scale = implementation == "mosaic_fp8", jnp.float32(128**-0.5)
            return None, mosaic.attend_kernels(q, view, k, v, i, scale, fp8=fp8, plan=plan)

        return lax.scan(layer, None, (q, k, v, jnp.arange(layers)))[1]

    args = q, cache, k, v, positions(7, block)
    return on_cpu(run, *args) if implementation == "xla" else run(*args)


@pytest.mark.parametrize("name", ["qvg", "midrise, int8 tables", "midrise-k1v3", "midrise-1bit"])
@pytest.mark.parametrize("implementation, bound", [("mosaic", 1e-2), ("mosaic_fp8", 6e-2)])
def test_other_plans_give_the_same(monkeypatch, name, implementation, bound):
    """Spans behind each other, one slot empty; sink and window in parts; looped and in a line."""
    monkeypatch.setattr(kernel_plan, "_LEAST_BYTES", 1)
    cache = with_window_garbage(filled_cache(codecs()[name]))
    one = 2 * 2 * 192 * 128 * (2 if implementation == "mosaic" else 1)
    right = _layers(cache, HALF, "xla")
    for plan in (kernel_plan.SPAN_BY_SPAN, Plan(even=True, workspace=2 * one, cut=True)):
        assert difference(_layers(cache, HALF, implementation, plan=plan), right) < bound


def test_a_longer_history_neither_compiles_again_nor_copies_the_cache():
    codec = codecs()["qvg"]
    caches = [filled_cache(codec, layers=1, blocks=n) for n in (4, 7)]
    assert int(caches[0].num_spans) < int(caches[1].num_spans)
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 96, 2, 128)), jnp.bfloat16)
    run = jax.jit(
        lambda q, cache, pos: attend(
            q, cache, q, q, positions=pos, rope=HALF, implementation="mosaic_fp8"
        )
    )
    for cache in caches:
        run(q, cache, positions(7, 96))
    assert run._cache_size() == 1
    program = run.lower(q, caches[1], positions(7, 96)).compile().as_text()
    codes = "u8[1,3,1,2,192,32]"  # layers, slots, batch, heads, tokens, bytes
    assert codes in program
    assert not [x for x in program.splitlines() if "copy(" in x and codes in x.split("=")[0]]
