"""Encoding kernels on a Hopper GPU: `python -m pytest -m gpu tests/kernels/test_kernels_encode_gpu.py`.

Tokens nearly as near to two centroids may go to either, so what depends on which is compared by
what it is for: the distance to the chosen centroid, the error of a round trip.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kmeans import Metric, Tuning, kmeans_sums
from pallas_kernels.quantize_pack import (
    Dithered,
    Integers,
    Midrise,
    assign_and_pack,
    assign_and_subtract,
    pack_dithered,
)
from qvg_jax.backends import is_hopper
from tests.support.kernel_cases import ENCODERS, clustered, encoded_twice, on_cpu, round_trip_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_hopper(), reason="no Hopper GPU"),
]


def _picked(c, ids):
    return np.take_along_axis(np.asarray(c, np.float32), np.asarray(ids, int)[..., None], 1)


def _distances(x, c, ids):
    return np.square(np.asarray(x, np.float32) - _picked(c, ids)).sum(-1)


FORMS = {
    "stages 3": Tuning(stages=3),
    "columns 64": Tuning(columns=64),
}  # which give the same bytes


@pytest.mark.parametrize("tuning", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "tokens, clusters, parts", [(1000, 256, 3), (5003, 100, 1), (1, 1, 1), (4096, 129, None)]
)
def test_sums_are_those_of_the_nearest_centroids(tokens, clusters, parts, tuning):
    x, c = clustered(3, tokens, clusters)
    ours = kmeans_sums(x, c, scores=True, parts=parts)
    xla = functools.partial(kmeans_sums, scores=True, implementation="xla")
    right = on_cpu(xla, x, c)
    near, nearest = (_distances(x, c, s.ids_RT) for s in (ours, right))
    assert (np.asarray(ours.ids_RT) == np.asarray(right.ids_RT)).mean() > 0.999
    assert np.all(near <= nearest + 1e-3 * (nearest + 1))
    hot = np.asarray(ours.ids_RT)[..., None] == np.arange(clusters)
    np.testing.assert_array_equal(ours.number_RK, hot.sum(1))
    total = np.einsum("rtk,rtd->rkd", hot.astype(np.float32), np.asarray(x, np.float32))
    np.testing.assert_allclose(ours.total_RKD, total, rtol=1e-4, atol=1e-3)
    score = np.asarray(right.score_RT)
    np.testing.assert_allclose(ours.score_RT, score, rtol=2**-13, atol=1e-3)
    again = kmeans_sums(x, c, scores=True, parts=parts, tuning=tuning)
    for other, first in zip(again, ours, strict=True):
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize(
    "form",
    [Integers(2, 64), Integers(2, 16), Integers(4, 64), Integers(2, 128, True),
     Integers(4, 16, True), Midrise(2, 0.9957, 2, recode=True),
     Midrise(1, 1.5958, 2, recode=False), Midrise(4, 0.3352, 2, recode=False)],
    ids=str,
)  # fmt: skip
def test_packing_equals_the_reference(form):
    """On tokens whose centroid is the same; codes of ties may differ."""
    x, c = clustered(3, 2005, 256)
    x = x.at[0, 9].set(c[0, 3]).at[0, 10].set(c[0, 4] + 2.0**-9)
    ours = [np.asarray(y) for y in assign_and_pack(x, c, form)]
    xla = functools.partial(assign_and_pack, form=form, implementation="xla")
    right = [np.asarray(y) for y in on_cpu(xla, x, c)]
    same = ours[0] == right[0]
    assert same.mean() > 0.999
    assert (ours[1][same] != right[1][same]).mean() < 2e-3
    a, b = (y[2] if isinstance(form, Integers) else y[2].swapaxes(1, 2) for y in (ours, right))
    if isinstance(form, Integers):
        for mine, want in zip(ours[2:], right[2:], strict=True):
            assert (mine[same] != want[same]).mean() < 1e-3
    else:
        np.testing.assert_allclose(a[same], b[same], rtol=2e-3, atol=1e-6)
    again = assign_and_pack(x, c, form, tuning=Tuning(columns=64))
    for other, first in zip(again, ours, strict=True):
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize(
    "form",
    [Dithered(2, 3.75, False), Dithered(2, 3.5, True), Dithered(4, 15.75, False)],
    ids=str,
)
def test_packing_on_dithered_levels_equals_the_reference(form):
    """Codes of ties may differ; a token of zeros, a small one, channels of other sizes."""
    rng = np.random.default_rng(0)
    r = jnp.asarray(rng.standard_normal((3, 2005, 128)), jnp.bfloat16)
    r = r.at[1, 9].set(0).at[1, 10].multiply(2.0**-9)
    factor = jnp.asarray(rng.uniform(0.1, 10, (3, 128)), jnp.float32)
    ours = [np.asarray(y) for y in pack_dithered(r, factor, form)]
    xla = functools.partial(pack_dithered, form=form, implementation="xla")
    right = [np.asarray(y) for y in on_cpu(xla, r, factor)]
    assert (ours[0] != right[0]).mean() < 2e-3
    np.testing.assert_allclose(ours[1], right[1], rtol=2e-3, atol=1e-6)
    for again, first in zip(pack_dithered(r, factor, form), ours, strict=True):
        np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("equal", [False, True], ids=["plain", "by a metric"])
def test_the_residual_belongs_to_the_ids(equal):
    x, c = clustered(3, 2005, 200)
    metric = None
    if equal:
        size = jnp.asarray(np.random.default_rng(0).uniform(0.3, 3, (3, 128)), jnp.float32)
        metric = Metric(jnp.mean(x.astype(jnp.float32), axis=1), size)
    ids, r = assign_and_subtract(x, c, metric=metric)
    right = jnp.asarray(np.asarray(x, np.float32) - _picked(c, ids)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(r, np.float32), np.asarray(right, np.float32))
    want = on_cpu(
        lambda *a: kmeans_sums(*a, scores=True, metric=metric, implementation="xla"), x, c
    ).ids_RT
    assert (np.asarray(ids) == np.asarray(want)).mean() > 0.995


@pytest.mark.parametrize("name", ENCODERS)
def test_codecs_encode_as_well_on_the_kernels(name):
    codec = ENCODERS[name]()
    ours = encoded_twice(codec, "mosaic", tokens=1000)
    right = on_cpu(lambda: encoded_twice(codec, "xla", tokens=1000))
    error = functools.partial(on_cpu, functools.partial(round_trip_error, codec))
    for a, b in zip(ours, right, strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert error(a) < 1.03 * error(b)
    for a, b in zip(ours, encoded_twice(codec, "mosaic", tokens=1000), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_bad_tokens_and_mapped_layers():
    codec = ENCODERS["qvg"]()
    x = jnp.stack([clustered(2, 300, 64)[0][None]] * 2)
    state = jax.vmap(lambda x: codec.init(x.shape, x.dtype))(x)
    mapped = jax.vmap(lambda x, s: codec.encode(x, s, implementation="mosaic"))(x, state)
    alone = codec.encode(x[1], jax.tree.map(lambda s: s[1], state), implementation="mosaic")
    jax.tree.map(lambda m, a: np.testing.assert_array_equal(m[1], a), mapped, alone)
    bad = x[0].at[0, 1, 3, 4].set(jnp.nan)
    state = codec.init(bad.shape, bad.dtype)
    ours = codec.encode(bad, state, implementation="mosaic")
    right = codec.encode(bad.at[0, 1, 3, 4].set(0), state, implementation="mosaic")
    jax.tree.map(np.testing.assert_array_equal, ours, right)
    assert bool(jnp.isfinite(codec.decode(ours[0])).all())
