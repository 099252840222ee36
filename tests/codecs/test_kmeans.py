"""K-means smoothing: the algorithm, its start, its state, its memory, and its edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_jax.codecs.base import EmptyState
from qvg_jax.codecs.smoothing import KMeansState, kmeans_smoothing
from qvg_jax.codecs.smoothing import lloyd as lloyd_module
from qvg_jax.codecs.smoothing.kmeans import start_tokens, subsample_tokens
from qvg_jax.codecs.smoothing.lloyd import assign, lloyd

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Level 0: each program runs once or twice here, so that compile time is what counts.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
run_lloyd = jit(lloyd, static_argnames="reseed")
run_assign = jit(assign)


def blobs(seed, shape=(1, 2, 96, 16), clusters=6, noise=0.1):
    """Tokens around a few centres, in random order; the centres differ per head."""
    b, h, t, d = shape
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 2, (b, h, clusters, d))
    which = rng.integers(0, clusters, (b, h, t))
    x = np.take_along_axis(centres, which[..., None], axis=2) + rng.normal(0, noise, shape)
    return jnp.asarray(x, jnp.float32)


def objective(x_BHTD, c_BHKD):
    """Sum of squared distances to the nearest centroid, in float64."""
    x, c = np.asarray(x_BHTD, np.float64), np.asarray(c_BHKD, np.float64)
    return ((x[:, :, :, None] - c[:, :, None]) ** 2).sum(-1).min(-1).sum()


def numpy_lloyd(x, c, iters):
    x, c = np.asarray(x, np.float64), np.array(c, np.float64)
    for _ in range(iters):
        ids = ((x[:, None] - c[None]) ** 2).sum(-1).argmin(1)
        for k in range(len(c)):
            if (ids == k).any():
                c[k] = x[ids == k].mean(0)
    return c


@pytest.mark.parametrize("iters", [1, 3])
def test_lloyd_against_numpy(iters):
    x = blobs(0)
    c = x[:, :, :8]
    got = run_lloyd(x, c, iters)
    for h in range(2):
        want = numpy_lloyd(x[0, h], c[0, h], iters)
        np.testing.assert_allclose(got[0, h], want, atol=1e-5)  # float32 sums of 96 tokens


def test_all_iterations_but_the_last_look_at_some_tokens():
    """Against numpy, and with data for the number of iterations, of which one may be all."""
    x, some_t = blobs(0), np.arange(0, 96, 3)
    c, few = x[:, :, :8], x[:, :, some_t]
    run = jit(lambda n: lloyd(x, c, n, some_t=some_t))
    for iters in (1, 3):
        for h in range(2):
            want = numpy_lloyd(few[0, h], c[0, h], iters - 1)
            want = numpy_lloyd(x[0, h], want, 1)
            np.testing.assert_allclose(run(iters)[0, h], want, atol=1e-5)
    again = jit(lambda n: lloyd(x, c, n, some_t=some_t, reseed=True))(1)
    np.testing.assert_array_equal(again, run(1))  # one iteration restarts nothing


@given(st.integers(1, 5000), st.integers(1, 40), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_the_tokens_that_are_learned_from_are_one_of_every_few(tokens, clusters, subsample):
    some_t = subsample_tokens(tokens, clusters, subsample)
    n = min(subsample, tokens // (8 * clusters))
    if n <= 1:
        assert some_t is None
        return
    np.testing.assert_array_equal(some_t // n, np.arange(len(some_t)))
    assert len(some_t) == tokens // n // 8 * 8 >= clusters and some_t[-1] < tokens
    if len(some_t) > 64:  # every place of the n about as often
        share = np.bincount(some_t % n, minlength=n) / len(some_t)
        assert abs(share - 1 / n).max() < 0.1


def test_learning_from_some_tokens_costs_little():
    """Two spans, the second one warm: nearly the objective of learning from all."""
    x = blobs(5, (1, 2, 1600, 16), clusters=12, noise=0.5)
    left = {}
    for subsample in (1, 4):
        more = dict(reseed=True, equalize=True, centroid_dtype="f32")
        smoothing = kmeans_smoothing(20, 2, cold_iters=4, subsample=subsample, **more)
        state, encode = smoothing.init((1, 2, 800, 16), x.dtype), jit(smoothing.encode)
        left[subsample] = []
        for start in (0, 800):
            _, r, state = encode(x[:, :, start : start + 800], state)
            left[subsample].append(float(jnp.sum(jnp.square(r))))
    assert left[1] != left[4]
    assert all(b < 1.1 * a for a, b in zip(left[1], left[4], strict=True))


def test_an_empty_cluster_keeps_its_centroid():
    x = blobs(1)
    far = jnp.full((1, 2, 1, 16), 77.125)
    got = run_lloyd(x, jnp.concatenate([x[:, :, :4], far], axis=2), 5)
    np.testing.assert_array_equal(got[:, :, 4], far[:, :, 0])
    assert jnp.isfinite(got).all()


def test_ties_go_to_the_first_centroid():
    x = blobs(2)
    c = jnp.concatenate([x[:, :, :5], x[:, :, :5]], axis=2)
    assert run_assign(x, c)[0].max() < 5


def test_assign_is_exact_where_bfloat16_is_not():
    # Two centroids 1/64 apart, far from the origin: bfloat16 distances cannot tell them apart.
    c = jnp.stack([jnp.full((64,), 3.0), jnp.full((64,), 3.0 + 1 / 64)])[None, None]
    x = jnp.repeat(c, 8, axis=2).astype(jnp.bfloat16)
    ids, distance = run_assign(x, c.astype(jnp.bfloat16))
    np.testing.assert_array_equal(ids[0, 0], np.repeat([0, 1], 8))
    assert distance.max() < 1e-3


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_more_iterations_never_hurt(seed):
    x = blobs(seed, noise=1.0)
    start = x[:, :, ::8]
    values = [objective(x, run_lloyd(x, start, n)) for n in (0, 1, 2, 4)]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(values, values[1:], strict=False)), values


@pytest.mark.parametrize(("tokens", "k"), [(96, 96), (1536, 64), (37_440, 256), (5, 1)])
def test_start_tokens_are_different_and_spread(tokens, k):
    start = start_tokens(tokens, k)
    assert len(set(start)) == k and start.min() >= 0 and start.max() < tokens
    assert (np.diff(start) > 0).all()
    if k > 1:  # three gaps at most (three-gap theorem), the largest under three strides
        assert len(set(np.diff(start))) <= 3 and np.diff(start).max() <= 3 * tokens / k


@pytest.mark.parametrize(("k", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16")])
def test_id_width(k, dtype):
    smoothing = kmeans_smoothing(k, 1)
    x = jax.ShapeDtypeStruct((1, 1, 300, 4), jnp.bfloat16)
    node, _, _ = jax.eval_shape(smoothing.encode, x, smoothing.init(x.shape))
    assert node.ids_BHST.dtype == dtype and node.ids_BHST.shape == (1, 1, 1, 300)
    assert node.centroids_BHSKD.shape == (1, 1, 1, k, 4)


def test_uint16_ids_reach_the_last_centroid():
    x = jnp.arange(300, dtype=jnp.float32).reshape(1, 1, 300, 1) * jnp.ones((1, 1, 1, 4))
    smoothing = kmeans_smoothing(300, 1, centroid_dtype=jnp.float32)
    node, residual, _ = jit(smoothing.encode)(x, smoothing.init(x.shape))
    np.testing.assert_array_equal(node.ids_BHST[0, 0, 0], np.arange(300))
    assert (residual == 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_residual_is_relative_to_what_is_stored(dtype):
    smoothing = kmeans_smoothing(8, 2, stages=2, centroid_dtype=dtype)
    x = blobs(3).astype(jnp.bfloat16)
    node, residual, _ = jit(smoothing.encode)(x, smoothing.init(x.shape))
    assert node.centroids_BHSKD.dtype == dtype and residual.dtype == jnp.float32
    left = np.asarray(x, np.float32)
    for s in range(2):
        stored = np.asarray(node.centroids_BHSKD[:, :, s], np.float32)
        ids = np.asarray(node.ids_BHST[:, :, s])
        distance = ((left[:, :, :, None] - stored[:, :, None]) ** 2).sum(-1)
        chosen = np.take_along_axis(distance, ids[..., None], axis=-1)[..., 0]
        assert (chosen <= distance.min(-1) + 1e-4).all()  # float32 cancellation in c^2 - 2 x c
        left = left - np.take_along_axis(stored, ids[..., None].astype(int), axis=2)
    np.testing.assert_array_equal(residual, left)
    # Decoding adds what was subtracted: float32 rounding only.
    np.testing.assert_allclose(
        smoothing.decode(node, residual), np.asarray(x, np.float32), atol=2e-6
    )


def test_equal_channels_do_not_depend_on_their_size():
    x = blobs(5, noise=1.0)
    factor = np.ones(16, np.float32)
    factor[[2, 9]] = 16, 1 / 8
    smoothing = kmeans_smoothing(6, 2, stages=2, equalize=True, centroid_dtype="int8")
    plain = kmeans_smoothing(6, 2, stages=2, centroid_dtype="int8")
    encode = jit(smoothing.encode)
    first, residual, _ = encode(x, smoothing.init(x.shape))
    second, scaled, _ = encode(x * factor[None, None, None], smoothing.init(x.shape))
    np.testing.assert_array_equal(first.ids_BHST, second.ids_BHST)
    np.testing.assert_array_equal(np.asarray(residual) * factor, scaled)
    unequal, _, _ = jit(plain.encode)(x * factor[None, None, None], plain.init(x.shape))
    assert (np.asarray(unequal.ids_BHST) != first.ids_BHST).any()
    # A channel that is constant over the span has no deviation to divide by.
    still = x.at[..., 3].set(7.0)
    node, residual, _ = encode(still, smoothing.init(x.shape))
    assert np.isfinite(residual).all() and np.abs(residual[..., 3]).max() < 0.1
    np.testing.assert_allclose(smoothing.decode(node, residual), still, atol=1e-5)


def test_stages_shrink_the_residual():
    x = blobs(4, noise=1.0)
    norms = []
    for stages in (1, 2, 3):
        smoothing = kmeans_smoothing(8, 2, stages=stages)
        _, residual, _ = jit(smoothing.encode)(x, smoothing.init(x.shape))
        norms.append(float(jnp.sum(residual**2)))
    assert norms[0] > 1.05 * norms[1] > 1.05**2 * norms[2]


def test_one_program_for_cold_and_warm_and_warm_is_worth_iterations():
    smoothing = kmeans_smoothing(6, 1, cold_iters=4)
    encode = jit(smoothing.encode)
    x = blobs(5, (1, 2, 240, 16))
    cold_state = smoothing.init(x.shape)
    assert not cold_state.warm
    first, _, state = encode(x[:, :, ::-1], cold_state)
    assert state.warm
    np.testing.assert_array_equal(state.centroids_BHSKD, first.centroids_BHSKD)
    warm, _, state = encode(x, state)
    assert encode._cache_size() == 1
    # One warm iteration continues from the four cold ones; one cold iteration does not get there.
    short = kmeans_smoothing(6, 1)
    cold, _, _ = jit(short.encode)(x, short.init(x.shape))
    value = {n: objective(x, p.centroids_BHSKD[:, :, 0]) for n, p in [("w", warm), ("c", cold)]}
    assert value["w"] < 0.9 * value["c"], value


def test_cold_iterations_are_used_once():
    x = blobs(6, noise=1.0)
    many, one = kmeans_smoothing(6, 1, cold_iters=6), kmeans_smoothing(6, 6)
    a, _, _ = jit(many.encode)(x, many.init(x.shape))
    b, _, _ = jit(one.encode)(x, one.init(x.shape))
    np.testing.assert_array_equal(a.centroids_BHSKD, b.centroids_BHSKD)


def test_without_warm_start_there_is_no_state():
    smoothing = kmeans_smoothing(6, 2, warm_start=False)
    x = blobs(7)
    state = smoothing.init(x.shape)
    node, _, new = jit(smoothing.encode)(x, state)
    assert state == EmptyState() == new
    with_state = kmeans_smoothing(6, 2)
    same, _, _ = jit(with_state.encode)(x, with_state.init(x.shape))
    jax.tree.map(np.testing.assert_array_equal, node, same)


def test_reseed_revives_centroids_of_content_that_is_gone():
    x = blobs(8, clusters=6)
    stale = jnp.full((1, 2, 1, 6, 16), 500.0, jnp.bfloat16).at[:, :, :, 0].set(0)
    state = KMeansState(stale, jnp.ones((), bool))
    kept, _, _ = jit(kmeans_smoothing(6, 3).encode)(x, state)
    np.testing.assert_array_equal(kept.centroids_BHSKD[:, :, 0, 1:], stale[:, :, 0, 1:])
    moved, _, _ = jit(kmeans_smoothing(6, 3, reseed=True).encode)(x, state)
    assert (moved.centroids_BHSKD < 100).all()
    before, after = (objective(x, p.centroids_BHSKD[:, :, 0]) for p in (kept, moved))
    assert after < 0.7 * before, (before, after)


def test_the_farthest_tokens_come_first():
    """As numpy sorts, with ties, tiny numbers, and tokens that are not used, whose distance is -1."""
    distance = np.random.default_rng(0).exponential(1, (1, 2, 700)).astype(np.float32)
    distance[0, 0, ::7], distance[0, 0, 1::9], distance[0, 1, 5:400] = 0, -1, 1e-44
    want = np.argsort(-distance, axis=-1, kind="stable")
    np.testing.assert_array_equal(jit(lloyd_module._descending)(distance), want)


def test_chunks_and_both_sums_agree():
    rng = np.random.default_rng(9)
    # Small integers: every order of summation gives the same float32, so equality is exact.
    x = jnp.asarray(rng.integers(-4, 5, (2, 3, 200, 8)), jnp.bfloat16)
    c = x[:, :, :10]
    whole = lloyd_module._assign(x, c, 2**30)
    parts = lloyd_module._assign(x, c, 64 * 60)  # 64 tokens a step, the last step overlaps
    assert lloyd_module._chunk(x.shape, 10, 64 * 60) == 50 < 200
    assert lloyd_module._chunk((1, 1, 199, 8), 10, 640) == 50  # 4 steps, overlapping by one
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    odd = lloyd_module._assign(x[:, :, :199], c, 64 * 60)
    np.testing.assert_array_equal(odd[0], whole[0][:, :, :199])
    ids = whole[0].at[0, 0, :50].set(10)  # id K: in no cluster
    scatter = lloyd_module._sums_scatter(x, ids, 10)
    assert int(scatter[1].sum()) == 2 * 3 * 200 - 50
    for pairs in (2**30, 64 * 60):
        onehot = lloyd_module._sums_onehot(x, ids, 10, pairs)
        jax.tree.map(np.testing.assert_array_equal, scatter, onehot)
    odd_ids = ids[:, :, :199]
    jax.tree.map(
        np.testing.assert_array_equal,
        lloyd_module._sums_scatter(x[:, :, :199], odd_ids, 10),
        lloyd_module._sums_onehot(x[:, :, :199], odd_ids, 10, 64 * 60),
    )


def test_memory_does_not_grow_with_tokens_times_centroids():
    smoothing = kmeans_smoothing(256, 2)
    x = jax.ShapeDtypeStruct((1, 4, 16_384, 64), jnp.bfloat16)
    compiled = jax.jit(smoothing.encode).lower(x, smoothing.init(x.shape)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    scores = 4 * 4 * 16_384 * 256  # float32 distances of all pairs
    values = 4 * 4 * 16_384 * 64  # the tokens in float32
    assert temporary < 3 * values < scores, (temporary / 2**20, values / 2**20)


def test_tokens_that_are_not_finite_change_no_other():
    x = blobs(10, (1, 2, 97, 16))
    bad = x.at[0, 0, 5, 3].set(jnp.nan).at[0, 1, 7].set(jnp.inf).at[0, 1, 9, 0].set(-3e38)
    smoothing = kmeans_smoothing(6, 3, stages=2, reseed=True)
    node, residual, state = jit(smoothing.encode)(bad, smoothing.init(bad.shape))
    assert jnp.isfinite(node.centroids_BHSKD).all()
    assert jnp.abs(node.centroids_BHSKD).max() < 20
    good = np.ones((1, 2, 97), bool)
    good[0, 0, 5] = good[0, 1, 7] = good[0, 1, 9] = False
    assert np.isfinite(np.asarray(residual)[good]).all()
    # The clusters of the good tokens are as tight as without the bad ones.
    clean, clean_residual, _ = jit(smoothing.encode)(x, smoothing.init(x.shape))
    energy = [np.sum(np.asarray(r)[good] ** 2) for r in (residual, clean_residual)]
    assert energy[0] < 1.1 * energy[1]
    # The entry itself stays bad in the residual, for the quantizer and the cache to see.
    assert np.isnan(residual[0, 0, 5, 3]) and np.isposinf(residual[0, 1, 7]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_centroids=0), "num_centroids=0.*1 to 65536"),
        (dict(num_centroids=65_537), "num_centroids=65537"),
        (dict(iters=0), "iters=0.*1 or more"),
        (dict(cold_iters=0), "cold_iters=0"),
        (dict(subsample=0), "subsample=0"),
        (dict(stages=0), "stages=0.*1 or more"),
        (
            dict(centroid_dtype=jnp.int16),
            "centroid_dtype=int16.*bfloat16, float16, float32, int8 or e4m3",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        kmeans_smoothing(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 31, 8), "num_centroids=32 is more than the 31 tokens of the span"),
        ((1, 1, 0, 8), r"shape=\(1, 1, 0, 8\) has an empty axis"),
        ((1, 64, 8), r"shape=\(1, 64, 8\) has rank 3; accepted: \(B, H, T, D\)"),
    ],
)
def test_bad_spans(shape, message):
    smoothing = kmeans_smoothing(32)
    state = smoothing.init((1, 1, 32, 8))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: smoothing.encode(x, state), jnp.zeros(shape, jnp.bfloat16))
    for use in (smoothing.init, smoothing.nbytes):
        with pytest.raises(ValueError, match=message):
            use(shape)
