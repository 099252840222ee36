"""attend: one softmax over all regions, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding

from qvg_jax.attention.api import attend
from qvg_jax.attention.xla import DENSE_CHUNK_TOKENS
from qvg_jax.cache.operations import KVCache, append, compress, evict
from qvg_jax.cache.rope import Rope, axial_rope, frequency_ladder
from qvg_jax.codecs.base import identity
from qvg_jax.sharding import head_shardings
from tests.support.cache_model import SIZES, ListCache, block, coarse, query

COARSE, COARSER, IDENTITY = coarse(7), coarse(2), identity()
CODECS = {
    "bf16": (IDENTITY, IDENTITY),
    "lossy": (COARSE, COARSE),
    "K and V apart": (COARSER, COARSE),
}
ROPE = axial_rope([frequency_ladder(4), frequency_ladder(2), frequency_ladder(2)])
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 3e-2}


def filled(steps="", codecs="lossy", scale=1.0, **sizes):
    """A cache and its list model after steps a(ppend), c(ompress), e(vict)."""
    defaults = dict(sink_blocks=1, span_blocks=2, max_spans=3, keep_recent=1)
    key_codec, value_codec = CODECS[codecs]
    defaults |= dict(key_codec=key_codec, value_codec=value_codec)
    cache = KVCache.create(**(SIZES | defaults | sizes))
    model = ListCache(cache.layout)
    for i, step in enumerate(steps):
        if step == "a":
            new = block(i, cache.layout, scale)
            cache = append(cache, *new)
            model.append(*new)
        elif step == "c":
            cache = compress(cache)
            model.compress()
        else:
            cache = evict(cache)
            model.evict()
    return cache, model


def check(cache, model, rope=ROPE, dtype=jnp.float32, tol=None, direct=False, **how):
    """Compares all layers with the model, through a view or (`direct`) the cache itself."""
    q, k, v, pos = query(7, cache.layout, dtype=dtype, **how)
    at, turn = (pos, rope) if rope else (None, False)
    for layer in range(cache.layout.layers):
        if direct:
            out = attend(q, cache, k, v, layer=layer, positions=at, rope=turn)
        else:
            out = attend(q, cache.view(at, turn), k, v, layer=layer)
        assert out.dtype == dtype and out.shape == q.shape
        want = model.attend(q, k, v, layer, pos, rope)
        tolerance = TOLERANCE[dtype] if tol is None else tol
        out = np.asarray(out, np.float64)
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


@pytest.mark.parametrize("rope", [ROPE, None], ids=["rope", "no rope"])
@pytest.mark.parametrize("steps", HISTORIES.values(), ids=HISTORIES)
def test_every_mix_of_regions_is_one_softmax(steps, rope):
    check(*filled(steps), rope=rope)
    check(*filled(steps), rope=rope, direct=True)


@pytest.mark.parametrize("codecs", CODECS)
def test_any_codecs_for_k_and_v(codecs):
    check(*filled("aaaacaacaa", codecs))


def test_the_lossy_codec_is_lossy():
    # Or else the tests above would not notice if spans were read from somewhere else.
    q, k, v, pos = query(7, filled()[0].layout)
    outs = [
        attend(q, filled("aaaacaac", c)[0], k, v, layer=0, positions=pos, rope=ROPE)
        for c in ("bf16", "lossy")
    ]
    assert 1e-3 < np.abs(outs[0] - outs[1]).max() < 1


def test_groups_of_query_heads_share_a_key_value_head():
    check(*filled("aaaacaac"), heads=6)


def test_the_new_block_may_have_any_number_of_tokens():
    check(*filled("aaaacaac"), tokens=1)
    check(*filled("aaaacaac"), tokens=5)


def test_batch_of_2_without_sink_and_nothing_recent():
    check(*filled("aacaacaaca", batch=2, sink_blocks=0, keep_recent=0), heads=4)


def test_a_window_longer_than_a_chunk():
    # Chunk 2 is partly hidden, chunk 3 moves back to stay inside the buffer.
    tokens = DENSE_CHUNK_TOKENS // 4
    sizes = dict(block_tokens=tokens, max_spans=0, window_blocks=8, layers=1)
    for blocks in (1, 4, 5, 9):
        check(*filled("a" * blocks, **sizes), tokens=3)


@pytest.mark.parametrize("span_blocks", [3, 4])
def test_a_span_longer_than_a_chunk(span_blocks, monkeypatch):
    # 9 tokens are pieces of 5 and 5 with one repeated and hidden, 12 are three pieces of 4.
    monkeypatch.setattr("qvg_jax.attention.xla.SPAN_CHUNK_TOKENS", 5)
    check(*filled("a" * (2 + span_blocks) + "caa", span_blocks=span_blocks))


def test_bfloat16_queries_accumulate_in_float32():
    check(*filled("aaaacaacaa"), dtype=jnp.bfloat16)


def test_logits_far_apart_do_not_overflow():
    # Logits of several hundred carry float32 errors of 1e-5 to 1e-4, and values go up to 100.
    cache, model = filled("aaaacaac", scale=40.0)
    check(cache, model, tol=5e-3)
    q, k, v, _ = query(7, cache.layout)
    out = attend(q, cache, k, v, layer=1, scale=3.0, rope=False)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, model.attend(q, k, v, 1, scale=3.0), rtol=5e-3, atol=5e-3)


def test_what_lies_beyond_the_valid_tokens_is_never_seen():
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
    check(poisoned, model)


# --- many layers ------------------------------------------------------------------------------


def test_scan_over_layers_equals_a_loop():
    cache, _ = filled("aaaacaac", layers=3)
    q, k, v, pos = query(1, cache.layout)

    @jax.jit
    def scanned(cache, h):
        view = cache.view(pos, ROPE)

        def layer(h, i):
            h = h + attend(h, view, k, v, layer=i)
            return h, h

        return lax.scan(layer, h, jnp.arange(3))[1]

    outs, h = scanned(cache, q), q
    for i in range(3):
        h = h + attend(h, cache, k, v, layer=i, positions=pos, rope=ROPE)
        np.testing.assert_allclose(outs[i], h, rtol=2e-5, atol=2e-5)


def test_tables_of_the_view_are_made_once_for_all_layers():
    cache, _ = filled("aaaacaac", layers=3)
    q, k, v, pos = query(1, cache.layout)

    def forward(cache, precompute):
        view = cache.view(pos, ROPE, precompute=precompute)
        return lax.scan(lambda h, i: (attend(h, view, k, v, layer=i), None), q, jnp.arange(3))[0]

    def cosines_in_the_layer_scan(precompute):
        outer = jax.make_jaxpr(lambda c: forward(c, precompute))(cache)
        scans = [e for e in outer.eqns if e.primitive.name == "scan"]
        return str(scans[-1]).count(" cos ")

    assert cosines_in_the_layer_scan(True) == 0
    assert cosines_in_the_layer_scan(False) == 2  # dense and spans
    np.testing.assert_allclose(forward(cache, True), forward(cache, False), rtol=1e-5, atol=1e-5)


def test_a_longer_history_does_not_recompile():
    f = jax.jit(lambda c, q, k, v, i, pos: attend(q, c.view(pos, ROPE), k, v, layer=i))
    for steps in ("", "aa", "aaaac", "aaaacaacaac", "aaaacaace"):
        cache, model = filled(steps)
        q, k, v, pos = query(3, cache.layout)
        out = f(cache, q, k, v, 1, pos)
        want = model.attend(q, k, v, 1, pos, ROPE)
        np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
    assert f._cache_size() == 1


def test_vmap_over_independent_caches():
    pairs = [filled("aaaacaac"), filled("aa")]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[c for c, _ in pairs])
    q, k, v, pos = query(3, pairs[0][0].layout)
    out = jax.vmap(lambda c: attend(q, c, k, v, layer=0, positions=pos, rope=ROPE))(stacked)
    for got, (_, model) in zip(out, pairs, strict=True):
        want = model.attend(q, k, v, 0, pos, ROPE)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_heads_on_different_devices(axis_type):
    cache, model = filled("aaaacaac", heads=4)
    q, k, v, pos = query(3, cache.layout, heads=8)
    want = model.attend(q, k, v, 1, pos, ROPE)
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(axis_type,))
    apart, everywhere = (NamedSharding(mesh, jax.P(*p)) for p in ((None, None, "heads"), ()))
    args = jax.device_put(
        (cache, q, k, v, pos),
        (head_shardings(cache, mesh, "heads"), apart, apart, apart, everywhere),
    )

    @jax.jit
    def forward(cache, q, k, v, pos):
        return attend(q, cache.view(pos, ROPE), k, v, layer=1)

    with jax.set_mesh(mesh):
        compiled = forward.lower(*args).compile()
        out = compiled(*args)
    assert out.sharding.is_equivalent_to(apart, 4)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()


# --- rope -------------------------------------------------------------------------------------


def test_only_differences_of_positions_matter():
    cache, _ = filled("aaaacaac")
    shift = jnp.array([3.0, -2.0, 0.5]).reshape(1, 1, 3)
    moved = dataclasses.replace(
        cache, dense_pos=cache.dense_pos + shift, span_pos=cache.span_pos + shift[None]
    )
    q, k, v, pos = query(3, cache.layout)
    a = attend(q, cache.view(pos, ROPE), k, v, layer=0)
    b = attend(q, moved.view(pos + shift, ROPE), k, v, layer=0)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    still = attend(q, cache.view(pos + shift, ROPE), k, v, layer=0)
    assert np.abs(a - still).max() > 1e-2


def test_a_rope_of_someone_else():
    # Any pytree of tables: here a sign that flips with the parity of an integer position.
    flip = Rope(
        lambda pos: {"sign": jnp.where(jnp.floor(pos[..., 0]) % 2 == 0, 1.0, -1.0)},
        lambda x, t: x * t["sign"][:, None, :, None],
    )
    cache, model = filled("aaaacaac")
    check(cache, model, rope=flip)


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(layer=None), "layer=None; the cache has 2 layers: give an index below it"),
        (dict(layer=2), "layer=2 is not accepted: give 0 <= layer < 2"),
        (dict(positions=None), "positions=None with a rope"),
        (dict(k=lambda x: x[:, :2]), r"k has shape \(1, 2, 2, 8\); accepted: \(1, 3, 2, 8\)"),
        (dict(v=lambda x: x[0]), r"v has shape \(3, 2, 8\); accepted: \(1, 3, 2, 8\)"),
        (
            dict(q=lambda x: x[:, :, :1]),
            r"q has shape .*; accepted: \(1 or a multiple, T, a multiple of 2, 8\)",
        ),
        (dict(q=lambda x: x[..., :4]), r"q has shape \(1, 3, 2, 4\); accepted"),
        (dict(q=lambda x: x.astype(int)), "q has dtype int32; accepted: floating point"),
        (dict(positions=lambda p: p[..., :2]), r"positions have shape \(1, 3, 2\)"),
    ],
)
def test_attend_says_what_is_wrong(change, message):
    cache, _ = filled("a")
    q, k, v, pos = query(3, cache.layout)
    args = dict(q=q, k=k, v=v, positions=pos, layer=0)
    for name, value in change.items():
        args[name] = value(args[name]) if callable(value) else value
    with pytest.raises(ValueError, match=message):
        attend(args.pop("q"), cache, args.pop("k"), args.pop("v"), rope=ROPE, **args)


def test_positions_belong_to_the_view():
    cache, _ = filled("a")
    q, k, v, pos = query(3, cache.layout)
    with pytest.raises(ValueError, match=r"belong to cache\.view"):
        attend(q, cache.view(pos, ROPE), k, v, layer=0, positions=pos)
    with pytest.raises(ValueError, match="pos_dims=0: the cache stores no positions"):
        filled(pos_dims=0)[0].view(pos, ROPE)
