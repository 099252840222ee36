"""The path of `implementation="cudnn"` with XLA's flash attention in cuDNN's place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

from qvg_jax.attention.api import attend
from qvg_jax.attention.cudnn import Workspaces, attend_cudnn, undecodable, unsupported
from qvg_jax.cache.key_bias import KeyBias
from qvg_jax.cache.operations import KVCache, append, compress, evict
from qvg_jax.cache.rope import axial_rope, frequency_ladder
from qvg_jax.codecs import presets
from qvg_jax.codecs.quantize.integer import residual_quantize
from qvg_jax.sharding import head_shardings
from tests.support.cache_model import SIZES, ListCache, block, coarse, query
from tests.support.kernel_cases import (
    difference,
    encodings,
    filled_cache,
    rope_of,
    with_window_garbage,
)

COARSE = coarse(7)
ROPE = axial_rope([frequency_ladder(4), frequency_ladder(2), frequency_ladder(2)])
# Of a cache of SIZES in float32 a token takes 128 bytes: 15 tokens of sink and window are two calls of 8,
# so the last one moves back; two spans of 6 tokens are a call; and parts of a call may hold no key.
SMALL = Workspaces(dense_bytes=1024, span_bytes=1536, parts=3)
FEW_CALLS = Workspaces()


@functools.partial(jax.jit, static_argnames=("workspaces", "backend"))
def ours(q, view, k, v, layer=0, scale=None, workspaces=FEW_CALLS, backend="xla"):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    layer, scale = jnp.asarray(layer, jnp.int32), jnp.float32(scale)
    return attend_cudnn(q, view, k, v, layer, scale, backend=backend, workspaces=workspaces)[0]


def filled(steps="", **sizes):
    """A cache and its list model after steps a(ppend), c(ompress), e(vict)."""
    defaults = dict(sink_blocks=1, span_blocks=2, max_spans=3, keep_recent=1)
    cache = KVCache.create(
        **(SIZES | defaults | dict(key_codec=COARSE, value_codec=COARSE) | sizes)
    )
    model = ListCache(cache.layout)
    for i, step in enumerate(steps):
        if step == "a":
            new = block(i, cache.layout)
            cache = append(cache, *new)
            model.append(*new)
        elif step == "c":
            cache = compress(cache)
            model.compress()
        else:
            cache = evict(cache)
            model.evict()
    return cache, model


def check(cache, model, rope=ROPE, dtype=jnp.float32, tolerance=2e-5, workspaces=SMALL, **how):
    q, k, v, pos = query(7, cache.layout, dtype=dtype, **how)
    view = cache.view(pos if rope else None, rope or False)
    for layer in range(cache.layout.layers):
        out = ours(q, view, k, v, layer, workspaces=workspaces)
        assert out.dtype == dtype and out.shape == q.shape
        want = model.attend(q, k, v, layer, pos, rope)
        np.testing.assert_allclose(
            np.asarray(out, np.float64), want, rtol=tolerance, atol=tolerance
        )


def same(q, view, k, v, tolerance=2e-5, **how):
    """Compares with attend's own XLA path."""
    out = ours(q, view, k, v, **how)
    want = attend(q, view, k, v, layer=0, implementation="xla")
    out, want = (np.asarray(x, np.float32) for x in (out, want))
    np.testing.assert_allclose(out, want, rtol=tolerance, atol=tolerance)


HISTORIES = {
    "empty": "",
    "sink only": "a",
    "part of a window": "aa",
    "full window": "aaaaa",
    "a span, short window": "aaaac",
    "spans": "aaacacacacac",
    "after eviction": "aaaacaaceaac",
    "all spans evicted": "aaaacaacee",
}


@pytest.mark.parametrize("workspaces", [SMALL, FEW_CALLS], ids=["many calls", "few calls"])
@pytest.mark.parametrize("steps", HISTORIES.values(), ids=HISTORIES)
def test_every_mix_of_regions_is_one_softmax(steps, workspaces):
    check(*filled(steps), workspaces=workspaces)


def test_without_rope():
    check(*filled("aaaacaac"), rope=None)


def test_span_by_span():
    check(*filled("aaaacaacaac"), workspaces=Workspaces(span_bytes=1))


def test_a_ring_that_has_dropped_its_oldest_spans():
    check(*filled("aaa" + "aac" * 5, overflow="drop"))


def test_a_window_without_spans():
    check(*filled("aaaaaaa", max_spans=0, window_blocks=4, overflow="drop"))


def test_groups_of_query_heads_share_a_key_value_head():
    check(*filled("aaaacaac"), heads=6)


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_new_block_may_have_any_number_of_tokens(tokens):
    check(*filled("aaaacaac"), tokens=tokens)


def test_batch_of_2_without_sink_and_nothing_recent():
    check(*filled("aacaacaaca", batch=2, sink_blocks=0, keep_recent=0), heads=4)


def test_bfloat16_queries_accumulate_in_float32():
    check(*filled("aaaacaacaa"), dtype=jnp.bfloat16, tolerance=3e-2)


def test_branches_share_a_cache():
    cache, model = filled("aaaacaac", batch=2)
    q, k, v, pos = query(7, cache.layout, heads=4)
    both = [jnp.concatenate([x, 2 * x]) for x in (q, k, v)]
    out = ours(both[0], cache.view(pos, ROPE), *both[1:], layer=1, workspaces=SMALL)
    first = model.attend(q, k, v, 1, pos, ROPE)
    second = model.attend(2 * q, 2 * k, 2 * v, 1, pos, ROPE)
    np.testing.assert_allclose(out, np.concatenate([first, second]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)])
def test_another_scale(dtype, tolerance):
    cache, model = filled("aaaacaac")
    q, k, v, pos = query(7, cache.layout, dtype=dtype)
    out = ours(q, cache.view(pos, ROPE), k, v, layer=1, scale=0.9, workspaces=SMALL)
    want = model.attend(q, k, v, 1, pos, ROPE, scale=0.9)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["qvg", "midrise", "bf16"])
def test_codecs(name):
    pair = presets.pair(name) if name == "bf16" else presets.pair(name, num_centroids=16)
    cache = filled_cache(pair, block=16, blocks=7, heads=2)
    rope = axial_rope([frequency_ladder(44), frequency_ladder(42), frequency_ladder(42)])
    q, k, v, pos = query(3, cache.layout, dtype=jnp.bfloat16)
    # The workspaces of both are bf16 and rounded alike.
    same(q, cache.view(pos, rope), k, v, tolerance=2e-2)


def test_encodings_of_stored_keys_and_values():
    cache = filled_cache(presets.pair("qvg", num_centroids=16), block=16, blocks=7, heads=2)
    view = cache.view(None, encodings())
    shape = (1, 16, 4, 128)
    q, k, v = (jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16) for i in range(3))
    same(q, view, k, v, tolerance=2e-2)
    sizes = Workspaces(dense_bytes=2**15, span_bytes=2**20, parts=2)
    same(q, view, k, v, tolerance=2e-2, workspaces=sizes)


# --- spans decoded by kernels ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, blocks, rotated, settings, sizes",
    [
        # Both spans in a call; then of 48 tokens and one by one.
        ("qvg", 7, "half", dict(heads=2), dict(span_bytes=2**20, parts=3)),
        ("qvg", 7, "interleaved", dict(block=24, batch=2), dict(span_bytes=1)),
        # Room for three spans in a call, and one there; and none.
        ("dither", 6, None, dict(block=24), dict(parts=2)),
        ("midrise", 3, "half", dict(), dict()),
        # 40 tokens, which kernels do not cut into tiles.
        ("bf16", 7, "half", dict(block=20), dict(parts=1)),
    ],
)
def test_spans_decoded_by_kernels(name, blocks, rotated, settings, sizes):
    pair = presets.pair(name) if name == "bf16" else presets.pair(name, num_centroids=16)
    settings = dict(layers=1, heads=1, block=16) | settings
    cache = with_window_garbage(filled_cache(pair, blocks=blocks, **settings))
    rope = False if rotated is None else rope_of(rotated, 128)
    heads = 2 * cache.layout.heads
    q, k, v, pos = query(3, cache.layout, tokens=21, heads=heads, dtype=jnp.bfloat16)
    view = cache.view(pos if rope else None, rope)
    # XLA rounds keys once more, before it rotates them.
    by_kernels, by_xla = (
        ours(q, view, k, v, workspaces=Workspaces(**sizes, decoder=by))
        for by in ("reference", "xla")
    )
    assert difference(by_kernels, by_xla) < 4e-3


def test_what_kernels_do_not_decode_for_cudnn():
    kernels = Workspaces(decoder="reference")
    cases = [
        (dict(key_codec=presets.pair("kivi")[0]), "do not decode the key codec kivi"),
        (dict(value_codec=presets.pair("klt")[1]), "do not decode the value codec klt"),
        (dict(blocks="padded"), "blocks='padded'"),
    ]
    plain = dict(key_codec=presets.get("rtn"), value_codec=presets.get("rtn"))
    for settings, message in cases:
        cache = KVCache.create(
            heads=1, head_dim=128, block_tokens=16, span_blocks=2, max_spans=2, pos_dims=0,
            **(plain | settings),
        )  # fmt: skip
        q, k, v, _ = query(3, cache.layout, dtype=jnp.bfloat16)
        with pytest.raises(NotImplementedError, match=f"decoder='reference': .*{message}.*'xla'"):
            ours(q, cache.view(rope=False), k, v, workspaces=kernels)
    cache = filled_cache(presets.get("rtn"), layers=1, heads=2, block=16)
    q, k, v, _ = query(3, cache.layout, dtype=jnp.float32)
    assert undecodable(cache.view(rope=False), q).startswith("q has dtype float32")
    q = q.astype(jnp.bfloat16)
    assert undecodable(cache.view(None, encodings()), q).startswith("the kernels do not apply Enco")
    assert undecodable(cache.view(rope=False), q) is None


def test_nan_in_unused_slots_is_never_seen():
    cache, model = filled("aaaacaace")
    n = int(cache.dense_blocks) * cache.layout.block_tokens
    dead = (int(cache.first_span) - 1) % cache.layout.max_spans
    scales = cache.span_k.scale_BHT1
    nan_scales = scales.bytes_x.at[:, dead].set(0x7F)  # NaN in e4m3
    poisoned = dataclasses.replace(
        cache,
        dense_k=cache.dense_k.at[:, :, :, n:].set(jnp.nan),
        dense_v=cache.dense_v.at[:, :, :, n:].set(jnp.nan),
        dense_pos=cache.dense_pos.at[:, n:].set(jnp.nan),
        span_k=cache.span_k._replace(scale_BHT1=dataclasses.replace(scales, bytes_x=nan_scales)),
        span_pos=cache.span_pos.at[dead].set(jnp.nan),
    )
    assert cache.layout.max_spans > int(cache.num_spans) > 0
    for workspaces in (SMALL, FEW_CALLS):
        check(poisoned, model, workspaces=workspaces)


def test_nan_behind_a_window_of_a_bf16_cache():
    cache = with_window_garbage(filled_cache(presets.get("bf16"), block=16, blocks=4))
    q, k, v, _ = query(3, cache.layout, dtype=jnp.bfloat16)
    same(q, cache.view(rope=False), k, v, tolerance=2e-2)


# --- key bias ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["aa", "aaaacaac"])
def test_an_offset_of_the_key_bias_moves_the_spans_only(steps):
    codec = residual_quantize(bits=2, group=8)
    bias = KeyBias(offset=-0.7)
    cache, _ = filled(steps, key_codec=codec, value_codec=codec, key_bias=bias)
    q, k, v, pos = query(7, cache.layout)
    view = cache.view(pos, ROPE)
    same(q, view, k, v, workspaces=SMALL)
    plain = dataclasses.replace(cache, layout=dataclasses.replace(cache.layout, key_bias=None))
    moved = np.abs(ours(q, view, k, v) - ours(q, plain.view(pos, ROPE), k, v)).max()
    assert (moved > 1e-3) == ("c" in steps)


# --- programs ----------------------------------------------------------------------------------


def test_scan_over_layers_equals_a_loop():
    cache, _ = filled("aaaacaac", layers=3)
    q, k, v, pos = query(1, cache.layout)
    view = cache.view(pos, ROPE)

    @jax.jit
    def scanned(view, h):
        def layer(h, i):
            h = h + ours(h, view, k, v, i, workspaces=SMALL)
            return h, h

        return lax.scan(layer, h, jnp.arange(3))[1]

    outs, h = scanned(view, q), q
    for i in range(3):
        h = h + ours(h, view, k, v, i, workspaces=SMALL)
        np.testing.assert_allclose(outs[i], h, rtol=2e-5, atol=2e-5)


def test_vmap_over_independent_caches():
    pairs = [filled("aaaacaac"), filled("aa")]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[c for c, _ in pairs])
    q, k, v, pos = query(3, pairs[0][0].layout)
    out = jax.vmap(lambda c: ours(q, c.view(pos, ROPE), k, v, workspaces=SMALL))(stacked)
    for got, (_, model) in zip(out, pairs, strict=True):
        want = model.attend(q, k, v, 0, pos, ROPE)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_a_longer_history_does_not_recompile():
    f = jax.jit(lambda c, q, k, v, i, pos: ours(q, c.view(pos, ROPE), k, v, i, workspaces=SMALL))
    for steps in ("", "aaaac", "aaaacaacaac"):
        cache, _ = filled(steps)
        q, k, v, pos = query(3, cache.layout)
        f(cache, q, k, v, 1, pos)
    assert f._cache_size() == 1


def test_heads_on_different_devices_inside_of_shard_map():
    cache, model = filled("aaaacaac", heads=4)
    q, k, v, pos = query(3, cache.layout, heads=8)
    view = cache.view(pos, ROPE, precompute=False)
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(AxisType.Auto,))
    apart, everywhere = jax.P(None, None, "heads"), jax.P()
    cut = jax.tree.map(lambda s: s.spec, head_shardings(cache, mesh, "heads"))
    specs = dataclasses.replace(jax.tree.map(lambda x: everywhere, view), cache=cut)

    def local(q, view, k, v):
        layout = dataclasses.replace(view.cache.layout, heads=1)
        view = dataclasses.replace(view, cache=dataclasses.replace(view.cache, layout=layout))
        return ours(q, view, k, v, layer=1, workspaces=SMALL)

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(apart, specs, apart, apart), out_specs=apart, check_vma=False
    )
    out = jax.jit(run)(q, view, k, v)
    np.testing.assert_allclose(out, model.attend(q, k, v, 1, pos, ROPE), rtol=2e-5, atol=2e-5)


def test_the_program_copies_neither_the_cache_nor_a_layer():
    cache = filled_cache(presets.pair("qvg", num_centroids=16), layers=3, block=64, window_blocks=9)
    q, k, v, _ = query(3, cache.layout, dtype=jnp.bfloat16)
    sizes = Workspaces(dense_bytes=2 * 2 * 128 * 2 * 128, span_bytes=1)
    f = jax.jit(lambda c, q, k, v, i: ours(q, c.view(rope=False), k, v, i, workspaces=sizes))
    program = f.lower(cache, q, k, v, 1).compile().as_text()
    layers, batch, heads, tokens, d = cache.dense_k.shape
    whole, one = f"bf16[{layers},{batch},{heads},{tokens},{d}]", f"[{batch},{heads},{tokens},{d}]"
    assert f"{whole}" in program
    assert not [x for x in program.splitlines() if f"= {whole}" in x and "copy(" in x]
    assert f"bf16{one}" not in program and f"f32{one}" not in program


# --- what is not served ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, dtype, message",
    [
        ({}, jnp.float32, "q has dtype float32; cuDNN reads bfloat16 and float16"),
        (dict(head_dim=12), jnp.bfloat16, "head_dim=12; cuDNN reads multiples of 8 up to 256"),
        (dict(head_dim=264), jnp.bfloat16, "head_dim=264; cuDNN reads multiples of 8 up to 256"),
        ({}, jnp.bfloat16, "the default device is cpu; cuDNN needs a GPU of compute capability"),
        (dict(bias=0.5), jnp.bfloat16, "key_bias factor=0.5; with cuDNN only factor=0 is served"),
    ],
)
def test_unsupported_says_why(sizes, dtype, message):
    sizes = dict(sizes)
    if "bias" in sizes:
        codec = residual_quantize(bits=2, group=8)
        sizes = dict(key_codec=codec, key_bias=KeyBias(factor=sizes["bias"]))
    cache, _ = filled(**sizes)
    q, *_ = query(3, cache.layout, dtype=dtype)
    assert unsupported(cache.view(rope=False), q).startswith(message)


def test_an_unknown_backend_is_an_error():
    cache, _ = filled("a")
    q, k, v, _ = query(3, cache.layout)
    with pytest.raises(ValueError, match=r"backend='triton' is not accepted: give one of"):
        ours(q, cache.view(rope=False), k, v, backend="triton")
