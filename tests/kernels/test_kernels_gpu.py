"""Numbers of the kernels on a Hopper GPU: `python -m pytest -m gpu tests/kernels/test_kernels_gpu.py`.

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
    prepare_tokens,
    visit,
)
from pallas_kernels.dequant_attention import reference as attention_reference
from pallas_kernels.dequantize import (
    Rotation,
    Spans,
    Tokens,
    Window,
    append_keys,
    append_values,
    decode_keys,
    decode_values,
)
from pallas_kernels.dequantize.reference import key_row_of_token
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
    FORMATS,
    HALF,
    INTERLEAVED,
    angles,
    codecs,
    difference,
    encoded,
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


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 2e-3), (E4M3, 1.5e-2)])
def test_decoding_equals_the_reference(name, dtype, bound):
    tokens = 300  # partial tiles
    source, scheme = encoded(name, 12, tokens)
    if "int8" in FORMATS[name][1] and dtype == jnp.bfloat16:
        bound = 4e-3  # int8 tables times their steps are rounded before the residual is added
    here = dict(valid=tokens, dtype=dtype, scale_n=2.0 ** np.arange(-1.0, 5.0))

    def keys(source, cos_sin, implementation, pairing):
        rotation = Rotation(cos_sin, pairing, batch=2, first=2)
        spans = Spans(source, scheme, 4, 6)
        return decode_keys(spans, **here, rotation=rotation, implementation=implementation)

    def values(source, implementation):
        return decode_values(Spans(source, scheme, 4, 6), **here, implementation=implementation)

    for pairing in ("half", "interleaved"):
        args = source, angles(0, 6, tokens)
        ours = keys(*args, "mosaic", pairing)
        right = on_cpu(lambda s, x, p=pairing: keys(s, x, "reference", p), *args)
        assert ours.shape == right.shape and difference(ours, right) < bound
    ours = values(source, "mosaic")
    right = on_cpu(lambda s: values(s, "reference"), source)
    assert ours.shape == right.shape and difference(ours, right) < bound


@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 2e-3), (E4M3, 1.5e-2)])
@pytest.mark.parametrize("valid", [3, 1, 0])
def test_several_spans_are_decoded_behind_each_other(dtype, bound, valid):
    """Of four slots three, not in order, the first ones valid; 208 tokens are no whole block."""
    tokens, rows = 208, 2
    source, scheme = encoded("qvg", 4 * rows, tokens)
    slot = np.asarray([3, 0, 2])
    here = dict(valid=valid * tokens, dtype=dtype, scale_n=np.asarray([1.0, 4.0]))

    def decode(source, cos_sin, implementation):
        spans = Spans(source, scheme, slot * rows, rows)
        more = here | dict(implementation=implementation)
        rotation = Rotation(cos_sin, first=slot)
        return decode_keys(spans, rotation=rotation, **more), decode_values(spans, **more)

    args = source, angles(0, 4, tokens)
    ours = decode(*args, "mosaic")
    right = on_cpu(lambda s, x: decode(s, x, "reference"), *args)
    read = -(-valid * tokens // 256) * 256
    for a, b, axis in zip(ours, right, (1, 1 if dtype == jnp.bfloat16 else 2), strict=True):
        assert a.shape == b.shape
        a, b = (np.asarray(x, np.float32).take(range(read), axis) for x in (a, b))
        assert not valid or difference(a, b) < bound


@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 2e-3), (E4M3, 1.5e-2)])
@pytest.mark.parametrize("valid", [2, 1, 0])
@pytest.mark.parametrize("slots", [1, 2])
def test_new_tokens_are_laid_behind_spans(dtype, bound, valid, slots):
    """As (B, T, H, D), rotated; spans before them are as they were, and zeros follow."""
    tokens, new, valid = 208, 70, min(valid, slots)
    source, scheme = encoded("qvg", 8, tokens)
    first = np.asarray([4, 0])[:slots] if slots > 1 else np.int32(4)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, new, 2, 128)), jnp.bfloat16)

    def decode(source, x, cos_sin, implementation):
        here = dict(scale_n=np.asarray([1.0, 4.0, 0.5, 2.0]), implementation=implementation)
        spans, more = Spans(source, scheme, first, 4), dict(valid=valid * tokens, dtype=dtype)
        k, v = (f(spans, room=new, **more, **here) for f in (decode_keys, decode_values))
        at, x = jnp.int32(valid * tokens), Tokens(x, 0, 4)
        rotation = Rotation(cos_sin, "interleaved", batch=2)
        return (
            append_keys(k, at, x, valid=new, rotation=rotation, **here),
            append_values(v, at, x, valid=new, **here),
        )

    args = source, x, angles(0, 2, new)
    ours = jax.jit(lambda *a: decode(*a, "mosaic"))(*args)
    right = on_cpu(lambda *a: decode(*a, "reference"), *args)
    read = -(-(valid * tokens + new) // 256) * 256
    for a, b, axis in zip(ours, right, (1, 1 if dtype == jnp.bfloat16 else 2), strict=True):
        assert a.shape == b.shape
        a, b = (np.asarray(x, np.float32).take(range(read), axis) for x in (a, b))
        assert difference(a, b) < bound
        behind = range(valid * tokens + new, read)
        rows = np.asarray(key_row_of_token(read))[behind] if axis == 1 and dtype == E4M3 else behind
        assert not a.take(rows, axis).any()


@pytest.mark.parametrize("pairing", ["half", "interleaved", None])
@pytest.mark.parametrize("heads, branches", [(2, 1), (3, 2)])
def test_queries_are_rotated_and_grouped_in_one_pass(pairing, heads, branches):
    """Two query heads for each, two videos; a row of zeros, and magnitudes far apart."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2 * branches, 75, 2 * heads, 128))
    q *= 10.0 ** rng.integers(-4, 5, (*q.shape[:3], 1))
    q[0, 3, 1] = 0
    q = jnp.asarray(q, jnp.bfloat16)
    cos_sin = angles(0, 2, 75) if pairing else None

    def prepared(q, cos_sin, implementation):
        rotation = pairing and Rotation(cos_sin, pairing, batch=2)
        here = dict(batch=2, heads=heads, rotation=rotation, fp8=True)
        return prepare_tokens(q, jnp.float32(0.1), implementation=implementation, **here)

    ours = jax.jit(lambda q, x: prepared(q, x, "mosaic"))(q, cos_sin)
    right = on_cpu(lambda q, x: prepared(q, x, "reference"), q, cos_sin)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), ours) == jax.tree.map(
        lambda x: (x.shape, x.dtype), right
    )

    def logits(x):
        return (_floats(x.q_nQD) * _floats(x.logits_scale_nQ)[..., None])[:, : branches * 2 * 75]

    exact, norms = logits(right[0]), np.linalg.norm(logits(right[0]), axis=-1)
    for x, bound in zip(ours, (4e-3, 4e-2), strict=True):  # of every row
        assert np.all(np.linalg.norm(logits(x) - exact, axis=-1) <= bound * norms)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, E4M3], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("one_after_another", [True, False], ids=["rows", "listed rows"])
def test_a_window_of_plain_tokens_is_that_part(dtype, one_after_another):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 700, 128)), jnp.bfloat16)
    x = x.at[:, 600:].set(jnp.nan)
    here = dict(valid=240, dtype=dtype, scale_n=jnp.ones(2))
    cos_sin, part = angles(0, 1, 700), slice(360, 660)
    rows = (1, 2) if one_after_another else (0, 2, jnp.asarray([3, 1]))
    window, tokens = Window(Tokens(x, *rows), 360, 300), Tokens(x[:, part], *rows[:2])
    if not one_after_another:
        tokens = Tokens(x[rows[2]][:, part], 0, 2)
    ours = decode_keys(window, **here, rotation=Rotation(cos_sin, "interleaved"))
    cut = tuple(x[:, part] for x in cos_sin)
    right = decode_keys(tokens, **here, rotation=Rotation(cut, "interleaved"))
    np.testing.assert_array_equal(np.asarray(ours, np.float32)[:, :256], _floats(right)[:, :256])
    ours, right = decode_values(window, **here), decode_values(tokens, **here)
    axis = 2 if dtype == E4M3 else 1  # attention reads no further than a tile of 256 tokens
    ours, right = (_floats(y).take(range(256), axis) for y in (ours, right))
    np.testing.assert_array_equal(ours, right)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, E4M3], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("tokens, valid", [(1, 1), (300, 257), (300, 0), (256, 256)])
def test_decoding_plain_tokens_hides_what_is_not_valid(dtype, tokens, valid):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, tokens, 128)), jnp.bfloat16)
    x = x.at[:, valid:].set(jnp.nan)
    here = dict(valid=valid, dtype=dtype, scale_n=np.ones(3))
    for decode in (decode_keys, decode_values):
        ours = decode(Tokens(x, 1, 3), **here)
        right = on_cpu(
            lambda x, f=decode: f(Tokens(x, 1, 3), **here, implementation="reference"), x
        )
        read = -(-valid // 256) * 256  # attention reads no further
        axis = 2 if ours.shape[1] == 128 and decode is decode_values and dtype == E4M3 else 1
        ours, right = (np.asarray(y, np.float32).take(range(read), axis) for y in (ours, right))
        np.testing.assert_array_equal(ours, right)


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
