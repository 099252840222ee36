"""Triton kernels without a GPU: compiled for each of them, and interpreted against the references.

The interpreter cuts bfloat16 results off instead of rounding them, and multiplies no bfloat16; so
numbers are compared in float32, which the same kernels take and give.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
pytest.importorskip("jax_triton", reason="Triton is for Linux on x86-64")

from pallas_kernels.dequant_attention import api as attention_api
from pallas_kernels.dequant_attention import combine_splits, prepare, visit
from pallas_kernels.dequant_attention import reference as attention_reference
from pallas_kernels.dequant_attention import triton as attention
from pallas_kernels.dequantize import (
    Encoded,
    Rotation,
    Scheme,
    Spans,
    Tokens,
    append_keys,
    decode_keys,
    decode_values,
    reference,
)
from pallas_kernels.dequantize import api as dequantize_api
from pallas_kernels.dequantize import triton as dequantize
from qvg_jax import backends
from qvg_jax.attention import choice, cudnn
from qvg_jax.attention import kernels as mosaic
from qvg_jax.attention.api import attend
from qvg_jax.attention.cudnn import Workspaces, attend_cudnn
from qvg_jax.attention.formats import scheme_of
from qvg_jax.codecs import presets
from qvg_jax.codecs.quantize.grid import grid_quantize
from tests.support.kernel_cases import (
    E4M3,
    FORMATS,
    HALF,
    INTERLEAVED,
    angles,
    codecs,
    encoded,
    filled_cache,
    form_of_cache,
    positions,
    with_window_garbage,
)
from tests.support.triton_cases import SHARED, compiled, interpreted, run_interpreted, usage

i32, f32 = jnp.int32, jnp.float32


def _random(scheme: Scheme, head_dim: int, rows: int, tokens: int) -> Encoded:
    rng = np.random.default_rng(scheme.bits)
    integers = lambda high, *s: jnp.asarray(rng.integers(0, high, s), jnp.uint8)  # noqa: E731
    s, some = scheme.stages, scheme.stages > 0
    tables = jnp.asarray(rng.standard_normal((rows, s, 200, head_dim)), jnp.bfloat16)
    return Encoded(
        codes_RTC=integers(256, rows, tokens, head_dim * scheme.bits // 8),
        scales_RTG=integers(0x40, rows, tokens, head_dim // scheme.group),
        ids_RST=integers(200, rows, s, tokens) if some else None,
        centroids_RSKD=tables if some else None,
    )


# Beside those of kernel_cases, which Hopper's kernels read as well.
MORE = {
    "1 bit": (Scheme(bits=1, group=128, offset=0.5, stages=1), 128),
    "3 bits": (Scheme(bits=3, group=128, offset=3.5, stages=1), 128),
    "3 bits, 64 channels": (Scheme(bits=3, group=16, offset=3, stages=2), 64),
    "8 bits": (Scheme(bits=8, group=64, offset=127, stages=0), 128),
    "4 bits, groups of 8": (Scheme(bits=4, group=8, offset=7, stages=1), 128),
    "256 channels": (Scheme(bits=2, group=64, offset=1.5, stages=1), 256),
}


def _source(name: str, rows: int, tokens: int) -> tuple[Encoded | jax.Array, Scheme | None, int]:
    if name == "plain":
        rng = np.random.default_rng(0)
        return jnp.asarray(rng.standard_normal((rows, tokens, 128)), jnp.bfloat16), None, 128
    if name in FORMATS:
        return *encoded(name, rows, tokens), 128
    scheme, head_dim = MORE[name]
    return _random(scheme, head_dim, rows, tokens), scheme, head_dim


def _launch(name, pairing, *, tokens=300, valid=300, width=None):
    source, scheme, d = _source(name, 12, tokens)
    rotation = None
    if pairing is not None:
        cos_sin = tuple(jnp.concatenate([t, t], -1)[..., : d // 2] for t in angles(0, 6, tokens))
        rotation = Rotation(cos_sin, pairing, batch=2, first=i32(2))
    args = Spans(source, scheme, i32(4), 6), i32(valid), rotation
    return args, dequantize.launch_for(*args, width)


# -- compiled


@pytest.mark.parametrize("cc", SHARED)
@pytest.mark.parametrize(
    "name, pairing",
    [
        ("qvg", "half"),
        ("qvg-pro", "interleaved"),
        ("rtn, 4 bits", None),
        ("midrise", "half"),
        ("midrise, e4m3 tables", "interleaved"),
        ("3 bits", "half"),
        ("256 channels", "half"),
        ("plain", "interleaved"),
    ],
)
def test_decoding_compiles_for_every_gpu(name, pairing, cc):
    width = 999 if name in ("qvg", "3 bits") else None  # tiles that are cut, and zeros behind them
    _, (launch, operands, out) = _launch(name, pairing, width=width)
    used = usage(compiled(launch, operands, out, cc))
    assert used.spills == 0 and used.shared <= 16 * 1024  # many programs on a multiprocessor
    assert used.registers <= 168, used


@pytest.mark.parametrize("cc", SHARED)
@pytest.mark.parametrize("head_dim", attention.TUNING)
def test_attention_compiles_for_every_gpu(head_dim, cc):
    form = lambda *s, dtype=f32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    q, k = (form(2, n, head_dim, dtype=jnp.bfloat16) for n in (256, 512))
    launch, out = attention.launch_for(q, k, splits=2, first=False)
    operands = (form(1, dtype=i32), q, form(2, 256), k, k, form(2), form(2))
    used = usage(compiled(launch, operands, out, cc))
    assert used.shared <= min(SHARED[cc], 99 * 1024), used
    assert used.spills <= (64 if head_dim == 256 else 0), used


# -- interpreted


@pytest.mark.parametrize("name", [*FORMATS, *MORE, "plain"])
@pytest.mark.parametrize("pairing", ["half", "interleaved", None])
def test_decoding_equals_the_reference(name, pairing):
    with interpreted(dequantize):
        args, (launch, operands, out) = _launch(name, pairing, valid=270)
        out = jax.ShapeDtypeStruct(out.shape, f32)
        ours = run_interpreted(launch, *operands, out=out)
    spans, valid, rotation = args
    cos_sin = None if rotation is None else reference.cos_sin_of(rotation)
    right = reference.rotated(reference.decoded(spans), cos_sin, pairing)
    right, source = reference._filled(right, valid), spans.stored
    # Tables of 8 bits times their steps are rounded to bfloat16.
    rounded = not isinstance(source, jax.Array) and source.steps_RS is not None
    bound = 4e-3 if rounded else 1e-6
    assert ours.shape == right.shape
    assert np.linalg.norm(ours - right) <= bound * np.linalg.norm(right)


@pytest.mark.parametrize(
    "name, pairing, tokens, valid, width",
    [
        ("qvg", "half", 70, 180, 300),  # part of the last span
        ("dither", "half", 64, 128, 192),  # no tile is cut
        ("qvg-asym", "interleaved", 40, 30, 131),  # of the second span nothing
        ("midrise", None, 33, 99, 99),  # no room behind the last span
        ("dither", None, 70, 0, 220),
        ("qvg", "half", 70, 180, None),
        ("plain", "half", 70, 210, 256),
    ],
)
def test_several_spans_lie_behind_each_other_in_a_workspace_that_is_written_whole(
    name, pairing, tokens, valid, width
):
    source, scheme, _ = _source(name, 12, tokens)
    rotation = None
    if pairing is not None:
        rotation = Rotation(angles(0, 6, tokens), pairing, batch=2, first=jnp.asarray([4, 0, 2]))
    spans = Spans(source, scheme, jnp.asarray([8, 0, 4]), 4)
    with interpreted(dequantize):
        launch, operands, out = dequantize.launch_for(spans, i32(valid), rotation, width)
        ours = run_interpreted(launch, *operands, out=jax.ShapeDtypeStruct(out.shape, f32))
    right = reference.decoded(spans)
    right = reference.rotated(right, rotation and reference.cos_sin_of(rotation), pairing)
    right = np.asarray(reference._filled(right, valid, width=width))
    written = width if width is not None else -(-valid // 256) * 256
    assert ours.shape == right.shape and np.isnan(ours[:, written:]).all()
    ours, right = ours[:, :written], right[:, :written]
    bound = 4e-3 if name in ("dither", "midrise") else 1e-6  # tables of 8 bits, as above
    assert np.linalg.norm(ours - right) <= bound * np.linalg.norm(right)
    assert not ours[:, valid:].any()


@pytest.mark.parametrize("tokens, valid", [(1, 1), (300, 257), (300, 0), (600, 30)])
def test_decoding_hides_what_is_not_valid_and_leaves_out_what_nobody_reads(tokens, valid):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, tokens, 128)), jnp.bfloat16)
    x = x.at[:, valid:].set(jnp.nan)
    with interpreted(dequantize):
        launch, operands, out = dequantize.launch_for(Tokens(x, i32(1), 3), i32(valid), None)
        ours = launch(*operands, out=out).astype(np.float32)
    np.testing.assert_array_equal(ours[:, :valid], np.asarray(x[1:, :valid], np.float32))
    read = -(-valid // 256) * 256
    assert (ours[:, valid:read] == 0).all() and np.isnan(ours[:, read:]).all()


@pytest.mark.parametrize("head_dim, splits", [(128, 1), (128, 3), (64, 2), (256, 1)])
def test_attention_equals_the_reference(head_dim, splits):
    """A partial tile, an empty segment, one token, more parts than tiles; NaN behind the valid."""
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.standard_normal((2, 100, head_dim)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((2, 512, head_dim)) + m, f32) for m in (0, 1))
    scale = jnp.asarray([0.5, 2.0])
    queries = prepare(q, f32(head_dim**-0.5), jnp.bfloat16)
    right = attention_reference.empty(1, *queries.q_nQD.shape)
    state = None
    with interpreted(attention):
        for valid in (400, 0, 1, 512, 128):
            hidden = (x.at[:, valid:].set(jnp.nan) for x in (k, v))
            new = attention.segment(
                queries.q_nQD.astype(f32), queries.logits_scale_nQ, *hidden, jnp.asarray([valid], i32),
                scale, scale, state, splits=splits,
            )  # fmt: skip
            state = [jax.new_ref(jnp.asarray(x)) for x in new] if state is None else state
            right = attention_reference.segment(*queries, k, v, valid, scale, scale, right)
    ours, right = combine_splits([r[...] for r in state], 100), combine_splits(right, 100)
    assert float(jnp.linalg.norm(ours - right)) < 1e-5 * float(jnp.linalg.norm(right))


# -- attend


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on a GPU with jax_triton, which only lowering would need."""
    for module in (backends, choice, cudnn):
        monkeypatch.setattr(module, "no_triton", lambda: None)
    for api in (attention_api, dequantize_api):
        monkeypatch.setattr(api, "missing", lambda: None)


def test_attend_traces_in_a_scan_over_layers_to_calls_that_update_their_state(on_a_gpu):
    cache = form_of_cache(codecs()["midrise"])
    x, pos = jax.ShapeDtypeStruct((1, 160, 2, 128), jnp.bfloat16), positions(9, 160)

    def model(q, cache, k, v, pos, implementation):
        view = cache.view(pos, HALF)
        read = functools.partial(attend, cache=view, implementation=implementation)
        layer = lambda h, i: (read(h, k_BTHD=k, v_BTHD=v, layer=i), None)  # noqa: E731
        return lax.scan(layer, q, jnp.arange(3))[0]

    for implementation, calls in (("triton", 9), (None, 9), ("xla", 0)):
        program = str(
            jax.make_jaxpr(functools.partial(model, implementation=implementation))(
                x, cache, x, x, pos
            )
        )
        # Three decoded and attended: the new block, sink and window, spans. Unnamed where cuDNN is not.
        assert program.count("triton_kernel_call[") == calls and "pallas_call" not in program


def test_triton_decodes_for_cudnn(on_a_gpu):
    cache = form_of_cache(codecs()["midrise"])
    x, pos = jax.ShapeDtypeStruct((1, 160, 2, 128), jnp.bfloat16), positions(9, 160)

    def read(decoder, q, cache, k, v, pos):
        sizes, view = Workspaces(decoder=decoder), cache.view(pos, HALF)
        return attend_cudnn(q, view, k, v, i32(0), f32(1), backend="xla", workspaces=sizes)[0]

    # Keys and values, in the loop over spans.
    for decoder, calls in (("triton", 2), (None, 2), ("xla", 0)):
        program = str(jax.make_jaxpr(functools.partial(read, decoder))(x, cache, x, x, pos))
        assert program.count("triton_kernel_call[") == calls


@pytest.mark.parametrize("name", ["qvg", "midrise, int8 tables", "odd", "1 and 3 bits"])
def test_attend_equals_xla(name, monkeypatch, on_a_gpu):
    """The whole way, kernels interpreted: a window with garbage, spans, two queries a head."""
    more = {
        "odd": grid_quantize(grid="lloyd_max"),
        "1 and 3 bits": presets.pair("midrise-k1v3", num_centroids=16),
    }
    cache = filled_cache((codecs() | more)[name], layers=1, heads=1, blocks=6, block=32)
    view = with_window_garbage(cache).view(positions(6, 32), INTERLEAVED if name == "odd" else HALF)
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((1, 32, 2, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((1, 32, 1, 128)), jnp.bfloat16) for _ in range(2))
    right = attend(q, view, k, v, implementation="xla").astype(f32)
    for codec in (cache.layout.key_codec, cache.layout.value_codec):  # tried before, with jit
        assert isinstance(scheme_of(codec, 128), str) == (name == "odd")
    with interpreted(dequantize, attention), jax.disable_jit():
        segment = attention.segment  # in float32
        monkeypatch.setattr(
            attention,
            "segment",
            lambda q, f, k, v, *more, **named: segment(
                q.astype(f32), f, jnp.asarray(k, f32), jnp.asarray(v, f32), *more, **named
            ),
        )
        ours = mosaic.attend_kernels(
            q, view, k, v, i32(0), f32(128**-0.5), fp8=False, implementation="triton"
        )
    assert ours.shape == right.shape and ours.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(ours.astype(f32) - right)) < 1e-2 * float(jnp.linalg.norm(right))


def test_what_is_missing_is_named(monkeypatch):
    cache = filled_cache(codecs()["qvg"], layers=1, heads=1, blocks=2, block=32)
    q = jnp.zeros((1, 32, 1, 128), jnp.bfloat16)
    args = dict(positions=positions(2, 32), rope=HALF, implementation="triton")
    if jax.default_backend() == "cpu":
        message = "implementation='triton': .* cpu; .*compute capability 8.0.*'xla' serves it"
        with pytest.raises(NotImplementedError, match=message):
            attend(q, cache, q, q, **args)
    monkeypatch.setattr(choice, "no_triton", lambda: None)
    with pytest.raises(NotImplementedError, match="q has dtype float32"):
        attend(q.astype(f32), cache, q, q, **args)
    source, scheme = encoded("qvg", 2, 64)
    spans, here = Spans(source, scheme, 0, 2), dict(valid=64, implementation="triton")
    with pytest.raises(NotImplementedError, match="dtype=float8_e4m3fn; the kernel writes bf"):
        decode_keys(spans, dtype=E4M3, scale_n=jnp.ones(2), **here)
    with pytest.raises(NotImplementedError, match="leaves room by a width"):
        decode_keys(spans, dtype=jnp.bfloat16, room=64, **here)
    with pytest.raises(ValueError, match="width=63, room=0; accepted: no room, and at least 64"):
        decode_values(spans, dtype=jnp.bfloat16, width=63, **here)
    with pytest.raises(NotImplementedError, match="width=64 with implementation='mosaic'"):
        decode_keys(spans, dtype=jnp.bfloat16, width=64, valid=64)
    with pytest.raises(NotImplementedError, match="no workspace in place"):
        append_keys(jnp.zeros((2, 256, 128), jnp.bfloat16), 0, Tokens(q, 0, 1), **here)
    odd = Scheme(bits=2, group=24, offset=1, stages=1)
    with pytest.raises(NotImplementedError, match="group=24; .* 'reference' serves it"):
        decode_values(Spans(source, odd, 0, 2), dtype=jnp.bfloat16, **here)
    queries = prepare(jnp.zeros((2, 10, 128)), f32(1), jnp.bfloat16)
    k = jnp.zeros((2, 256, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"v_nTD.shape=\(2, 128, 256\)"):
        visit(queries, k, k.swapaxes(1, 2), 256, implementation="triton")
    with pytest.raises(NotImplementedError, match="float32"):
        visit(queries, k.astype(f32), k, 256, implementation="triton")
    with pytest.raises(ValueError, match="implementation='cuda'"):
        visit(queries, k, k, 256, implementation="cuda")
    for api in (attention_api, dequantize_api):
        monkeypatch.setattr(api, "missing", lambda: "jax_triton cannot be imported")
    with pytest.raises(NotImplementedError, match="jax_triton cannot"):
        visit(queries, k, k, 256, implementation="triton")
    with pytest.raises(NotImplementedError, match="jax_triton cannot"):
        decode_keys(spans, dtype=jnp.bfloat16, **here)
