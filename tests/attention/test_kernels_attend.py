"""The whole way from a cache to the kernels and back, with a reference in place of every kernel.

So it runs anywhere, and is compared with what `attend` gives by XLA.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.worldplay.history import side_by_side
from pallas_kernels.dequant_attention import Schedule
from pallas_kernels.dequant_attention import reference as attention_reference
from qvg_jax.attention import api, by_head, choice, kernel_plan, new_block, workspaces
from qvg_jax.attention import kernels as mosaic
from qvg_jax.attention.api import attend
from qvg_jax.attention.features import Features
from qvg_jax.attention.kernel_plan import Plan
from qvg_jax.cache.devices import spread
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.cache.operations import evict
from qvg_jax.cache.plan import Plan as CachePlan
from qvg_jax.cache.relative import RelativeTime
from qvg_jax.cache.rope import axial_rope, frequency_ladder
from qvg_jax.codecs import presets
from qvg_jax.codecs.quantize.grid import grid_quantize
from qvg_jax.sharding import attend_by_heads
from tests.support.kernel_cases import (
    E4M3,
    HALF,
    INTERLEAVED,
    codecs,
    encodings,
    filled_cache,
    positions,
    rope_of,
    with_window_garbage,
)


def _visit_by_reference(
    queries, k, v, valid, *, k_scale_n=None, v_scale_n=None, state=None, splits=1, implementation
):
    """By the reference, which knows splits and puts all into the first one.

    Of a schedule those are the pieces that come first: one of every query tile.
    """
    ones = jnp.ones(k.shape[0])
    scales = [ones if s is None else s for s in (k_scale_n, v_scale_n)]
    n, padded_queries, d = queries.q_nQD.shape
    pieces = isinstance(splits, Schedule)
    if state is None:
        old = attention_reference.empty(1 if pieces else splits, n, padded_queries, d)
    elif pieces:
        old = [
            r[...][: splits.query_tiles].reshape(1, n, padded_queries, *r.shape[2:]) for r in state
        ]
    else:
        old = [r[...] for r in state]
    new = attention_reference.segment(*queries, k, v, valid, *scales, old)
    if pieces:
        rest = attention_reference.empty(1, splits.pieces - splits.query_tiles, 128, d)
        new = [x.reshape(-1, 128, *x.shape[3:]) for x in new]
        new = [jnp.concatenate([x, y[0]]) for x, y in zip(new, rest, strict=True)]
    if state is None:
        return tuple(new)
    for ref, x in zip(state, new, strict=True):
        ref[...] = x


@pytest.fixture
def references(monkeypatch):
    """attend_kernels with every kernel replaced by its reference: runs anywhere."""

    def by_reference(kernel):
        return lambda *args, implementation, **more: kernel(
            *args, implementation="reference", **more
        )

    for module in (workspaces, new_block):
        for name in ("decode_keys", "decode_values", "append_keys", "append_values"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, by_reference(getattr(module, name)))
    monkeypatch.setattr(mosaic, "prepare_tokens", by_reference(mosaic.prepare_tokens))
    monkeypatch.setattr(mosaic, "visit", _visit_by_reference)


@pytest.mark.parametrize(
    "name, fp8, pairing, precompute, d",
    [
        ("qvg", False, "half", True, 128),
        ("rtn", True, None, True, 128),
        ("midrise", True, "interleaved", True, 128),
        ("midrise, int8 tables", True, "half", False, 128),
        ("bf16", False, "interleaved", False, 128),
        ("midrise-k1v3", True, "half", True, 128),
        ("midrise-1bit", True, "interleaved", False, 128),
        ("qvg", True, "interleaved", True, 64),
        ("dither", True, "half", True, 128),
        ("dither-asym", False, "interleaved", False, 128),
        ("qvg-asym", True, "half", False, 64),
        ("midrise-k1v3", False, "half", True, 64),
        ("midrise, int8 tables", True, "half", True, 256),
        ("qvg", False, "interleaved", False, 256),
    ],
)
def test_the_way_from_cache_to_kernels_is_right(references, name, fp8, pairing, precompute, d):
    """Layers, slots of a ring that has turned, two query heads a head, a window with garbage."""
    rope = pairing and rope_of(pairing, d)
    cache = filled_cache(codecs()[name], blocks=9, block=64, head_dim=d)
    cache = evict(cache, spans=1)
    assert int(cache.first_span) == 1 and int(cache.num_spans) > 0
    cache = with_window_garbage(cache)
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((1, 64, 4, d)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((1, 64, 2, d)), jnp.bfloat16) for _ in range(2))
    at, turn = (positions(9, 64), rope) if rope else (None, False)
    relative = RelativeTime(9) if rope and name in ("qvg", "bf16") else None
    view = cache.view(at, turn, precompute=precompute, relative=relative)
    assert mosaic.unsupported(view, q, fp8) is None
    _agrees_with_xla(view, q, k, v, fp8)


ODD = {
    "lloyd": grid_quantize(grid="lloyd_max"),
    "joined": tuple(map(side_by_side, presets.pair("midrise", num_centroids=64))),
}


@pytest.mark.parametrize(
    "name, fp8", [("qvg", False), ("midrise", True), ("lloyd", False), ("joined", True)]
)
def test_what_kernels_cannot_read_comes_into_their_workspace_by_xla(references, name, fp8):
    """Two encodings of one stored k and v; levels not equally spaced; two heads in a vector."""
    cache = with_window_garbage(filled_cache((codecs() | ODD)[name], blocks=9, block=64))
    rope, copies = (HALF, 1) if name in ODD else (encodings(), 2)
    view = cache.view(positions(9, 64) if copies == 1 else None, rope)
    shape = (1, 64, 2 * copies, 128)
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(3))
    assert mosaic.unsupported(view, q, fp8) is None
    _agrees_with_xla(view, q, k, v, fp8)
    if copies == 2 and fp8:  # units from a pass over what was encoded
        view = cache.view(None, rope._replace(growth=None))
        _agrees_with_xla(view, q, k, v, fp8)


def test_devices_that_share_the_heads_read_by_kernels(references, monkeypatch):
    """Also a codec and a rope whose forms are first met there: probing them is not part of it."""
    monkeypatch.setattr(choice, "no_hopper", lambda: None)
    rope = axial_rope([frequency_ladder(44, 100.0), *[frequency_ladder(42, 100.0)] * 2])
    cache = filled_cache(presets.get("qvg", num_centroids=48), blocks=9, block=64)
    view = cache.view(positions(9, 64), rope)
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 64, 2, 128)), jnp.bfloat16) for _ in range(3))
    right = attend(q, view, k, v, layer=1, implementation="xla").astype(jnp.float32)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        read = functools.partial(attend_by_heads, axis="heads", implementation="mosaic_fp8")
        ours = jax.jit(read)(q, view, k, v, layer=1).astype(jnp.float32)
    assert float(jnp.linalg.norm(ours - right) / jnp.linalg.norm(right)) < 6e-2


# Layers with all heads, two, none, and two again that are others.
HISTORY = HeadHistory(
    [[True] * 4, [False, True, False, True], [False] * 4, [True, True, False, False]], 1
)


@pytest.mark.parametrize(
    "name, fp8, precompute, own_window",
    [
        ("dither", True, False, True),
        ("bf16", False, True, False),
        ("joined", False, False, True),
    ],
)
def test_heads_with_a_history_and_local_ones_read_by_kernels(
    references, name, fp8, precompute, own_window
):
    """All layers in a scan, two videos and two branches, a ring of slots that has turned; then an empty cache."""
    codec = (codecs() | ODD)[name]
    history = dataclasses.replace(HISTORY, own_window=own_window)
    sizes = dict(layers=4, heads=4, block=32, batch=2, keep_recent=2, history=history)
    cache = with_window_garbage(evict(filled_cache(codec, blocks=9, **sizes), spans=1))
    assert int(cache.first_span) == 1 and int(cache.num_spans) > 0
    empty = dataclasses.replace(
        cache, dense_blocks=jnp.int32(0), num_spans=jnp.int32(0), seen_blocks=jnp.int32(0)
    )
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((4, 4, 32, 8, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((4, 4, 32, 4, 128)), jnp.bfloat16) for _ in range(2))
    at = jnp.concatenate([positions(9, 32)] * 2)

    def by_kernels(*call):
        return mosaic.attend_kernels(*call[:-1], fp8=fp8, return_lse=True)

    @jax.jit
    def both(cache, q, k, v):
        view = cache.view(at, INTERLEAVED, precompute=precompute)

        def layer(_, x):
            *x, l = x
            call = (x[0], view, *x[1:], l)
            scale, features = jnp.float32(128**-0.5), Features(return_lse=True)
            ours = by_head.attend_by_head(by_kernels, *call, scale, features)
            right = attend(*call[:4], layer=l, implementation="xla", return_lse=True)
            return None, (ours, right)

        return jax.lax.scan(layer, None, (q, k, v, jnp.arange(4)))[1]

    for which in (cache, empty):
        (ours, ours_lse), (right, lse) = both(which, q, k, v)
        np.testing.assert_allclose(ours_lse, lse, atol=0.1 if fp8 else 0.03)
        ours, right = (x.astype(jnp.float32) for x in (ours, right))
        error = jnp.linalg.norm((ours - right).reshape(4, -1), axis=1)
        bound = 6e-2 if fp8 else 1e-2
        assert (error / jnp.linalg.norm(right.reshape(4, -1), axis=1) < bound).all()


@pytest.mark.parametrize(
    "devices, implementation",
    [
        (dict(spans=2), "mosaic_fp8"),
        (dict(spans=2, split_tokens=True), None),
        (dict(ring=2), "mosaic"),
        (dict(heads=2, split_tokens=True), "mosaic_fp8"),
    ],
    ids=["spans", "spans, tokens apart", "ring", "heads, tokens apart"],
)
def test_every_plan_of_devices_reads_by_kernels(references, monkeypatch, devices, implementation):
    monkeypatch.setattr(choice, "no_hopper", lambda: None)
    found = []

    def chosen(*call, choose=api.choose):
        found.append(choose(*call))
        return found[-1]

    monkeypatch.setattr(api, "choose", chosen)
    cache = filled_cache(codecs()["midrise"], blocks=9, block=64, max_spans=4)
    cache = with_window_garbage(cache)
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((1, 64, 4, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((1, 64, 2, 128)), jnp.bfloat16) for _ in range(2))

    def read(cache, **names):
        view = cache.view(positions(9, 64), HALF)
        return attend(q, view, k, v, layer=1, **names).astype(jnp.float32)

    right = read(cache, implementation="xla")
    found.clear()
    apart = spread(cache, CachePlan(**devices))
    ours = jax.jit(functools.partial(read, implementation=implementation))(apart)
    assert {one.chosen.implementation for one in found} == {"mosaic"}
    bound = 1e-2 if implementation == "mosaic" else 6e-2  # two bits are read in fp8
    assert float(jnp.linalg.norm(ours - right) / jnp.linalg.norm(right)) < bound


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis, exchanged",
    [("spans", {"all_reduce": 1, "reduce_scatter": 1}), ("heads", {"all_to_all": 2})],
)
def test_kernels_and_exchanges_of_a_plan_are_lowered_for_gpus(monkeypatch, axis, exchanged):
    monkeypatch.setattr(choice, "no_hopper", lambda: None)
    cache = filled_cache(codecs()["midrise"], blocks=5, block=64, max_spans=2)
    cache = spread(cache, CachePlan(**{axis: 2}, split_tokens=True))
    q, k = (jnp.zeros((1, 64, heads, 128), jnp.bfloat16) for heads in (4, 2))

    @jax.jit
    def read(q, cache, k):
        view = cache.view(positions(5, 64), HALF)
        return attend(q, view, k, k, layer=1, implementation="mosaic_fp8")

    text = read.trace(q, cache, k).lower(lowering_platforms=("cuda",)).as_text()
    kinds = collections.Counter(
        re.findall(r"stablehlo\.(all_\w+|reduce_scatter|collective_\w+)", text)
    )
    assert text.count("mosaic_gpu") > 6 and kinds == exchanged


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "e4m3"])
def test_branches_share_a_cache_and_keep_their_own_block(references, fp8):
    """Three branches in one call are three calls of one branch."""
    cache = with_window_garbage(filled_cache(codecs()["midrise"], blocks=9, block=64))
    view = cache.view(positions(9, 64), INTERLEAVED)
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((3, 64, 4, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((3, 64, 2, 128)), jnp.bfloat16) for _ in range(2))
    _agrees_with_xla(view, q, k, v, fp8)
    together = attend(q, view, k, v, layer=1, implementation="xla")
    for i in range(3):
        own = slice(i, i + 1)
        alone = attend(q[own], view, k[own], v[own], layer=1, implementation="xla")
        np.testing.assert_array_equal(together[own], alone)
    with pytest.raises(ValueError, match=r"k has shape \(2, 64, 2, 128\)"):
        attend(q, view, k[:2], v[:2], layer=1)


PLANS = {
    "looped": Plan(even=True, workspace=2 * 2 * 2 * 128 * 128 * 2),  # two bf16 spans of 128 tokens
    "looped, joined": Plan(workspace=2 * 2 * 2 * 128 * 128, joined=True),  # one of bf16
    "straight": Plan(even=True, workspace=2**18, unrolled=2, cut=True, joined=True),
    "straight, one by one": Plan(unrolled=4),
}


@pytest.mark.parametrize(
    "name, fp8, plan, precompute",
    [
        ("qvg", False, "looped", True),
        ("midrise", True, "looped", False),
        ("midrise, int8 tables", True, "straight", True),
        ("bf16", False, "straight", False),
        ("qvg", True, "straight, one by one", True),
        ("qvg", False, "looped, joined", False),
        ("midrise-k1v3", True, "looped, joined", True),
    ],
)
def test_plans_change_nothing_but_rounding(references, monkeypatch, name, fp8, plan, precompute):
    """Spans behind each other, the last group not full, a slot that is not valid; cut windows."""
    monkeypatch.setattr(kernel_plan, "_LEAST_BYTES", 1)
    cache = filled_cache(codecs()[name], blocks=9, block=64, max_spans=4)
    cache = with_window_garbage(evict(cache, spans=1))
    assert int(cache.first_span) == 1 and int(cache.num_spans) == 2
    relative = None if precompute else RelativeTime(9)
    view = cache.view(positions(9, 64), HALF, precompute=precompute, relative=relative)
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((1, 64, 4, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((1, 64, 2, 128)), jnp.bfloat16) for _ in range(2))
    parts = PLANS[plan].dense_parts(cache.layout, 2, E4M3 if fp8 else jnp.bfloat16)
    assert (len(parts) > 1) == (plan == "straight")
    _agrees_with_xla(view, q, k, v, fp8, PLANS[plan])


def _agrees_with_xla(view, q, k, v, fp8, plan=kernel_plan.MEASURED):
    right, lse = attend(q, view, k, v, layer=1, implementation="xla", return_lse=True)
    read = functools.partial(mosaic.attend_kernels, fp8=fp8, plan=plan, return_lse=True)
    ours, ours_lse = jax.jit(read)(q, view, k, v, jnp.int32(1), jnp.float32(q.shape[3] ** -0.5))
    np.testing.assert_allclose(ours_lse, lse, rtol=0, atol=0.1 if fp8 else 1e-2)
    assert ours.shape == right.shape and ours.dtype == right.dtype
    error = jnp.linalg.norm((ours - right).astype(jnp.float32))
    bound = 6e-2 if fp8 else 1e-2
    assert float(error / jnp.linalg.norm(right.astype(jnp.float32))) < bound
