"""Low rank, rotation, principal axes, small centroids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvg_jax.codecs.accounting import packed_bytes
from qvg_jax.codecs.base import EmptyState, identity
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.smoothing import (
    klt_rotation,
    kmeans_smoothing,
    low_rank_smoothing,
    rotation,
)
from qvg_jax.codecs.smoothing.centred import centred
from qvg_jax.codecs.smoothing.low_rank import principal_axes
from qvg_jax.codecs.smoothing.reflections import reflections_nbytes, reflections_of, rotation_of
from qvg_jax.codecs.smoothing.rotation import hadamard

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Level 0: each program runs once or twice here, so that compile time is what counts.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SMOOTHINGS = {
    "low rank": low_rank_smoothing(3, 3, 4),
    "rotation": rotation(),
    "klt": klt_rotation(),
    "klt 5": klt_rotation(5, 4),
    "int8 centroids": kmeans_smoothing(4, 2, centroid_dtype="int8"),
    "e4m3 centroids": kmeans_smoothing(4, 2, 2, centroid_dtype="e4m3"),
}
every = pytest.mark.parametrize("name", SMOOTHINGS)


def tokens(seed, shape=(1, 2, 40, 16), offset=3.0):
    """Correlated channels around a mean, float32."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(0, 1, (shape[3], shape[3])) * np.geomspace(2, 0.02, shape[3])[:, None]
    x = rng.normal(0, 1, shape) @ mix + offset * rng.normal(0, 1, (1, shape[1], 1, shape[3]))
    return jnp.asarray(x, jnp.float32)


def encode(smoothing, x):
    state = smoothing.init(x.shape, x.dtype)
    node, residual, _ = jit(smoothing.encode)(x, state)
    assert packed_bytes(node) == smoothing.nbytes(x.shape)
    assert residual.dtype == jnp.float32 and residual.shape == x.shape
    return node, residual


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decoding_undoes_encoding(name, dtype):
    smoothing, x = SMOOTHINGS[name], tokens(0).astype(dtype)
    node, residual = encode(smoothing, x)
    back = np.asarray(jit(smoothing.decode)(node, residual))
    x = np.asarray(x, np.float32)
    np.testing.assert_allclose(back, x, atol=3e-6 * np.abs(x).max())  # float32 sums of 16


@every
@pytest.mark.parametrize("power", [-40, 100])
def test_large_and_small_numbers(name, power):
    if "centroids" in name:
        power = min(power, 40)  # k-means leaves tokens beyond 1e15 out, see test_kmeans
    smoothing, x = SMOOTHINGS[name], tokens(1)
    _, small = encode(smoothing, x)
    node, large = encode(smoothing, x * jnp.float32(2.0**power))
    size = np.float32(2.0**power) if name != "channel scale" else 1
    np.testing.assert_allclose(np.asarray(large) / size, small, rtol=1e-4, atol=1e-4)
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(node))


@every
def test_constant_and_single_tokens(name):
    smoothing = SMOOTHINGS[name]
    for x in (
        jnp.full((1, 2, 40, 16), 2.5, jnp.float32),
        jnp.zeros((1, 2, 40, 16), jnp.float32),
        tokens(2, (1, 1, 1, 16)) if "centroids" not in name else tokens(2, (1, 1, 4, 16)),
    ):
        node, residual = encode(smoothing, x)
        back = jit(smoothing.decode)(node, residual)
        assert np.isfinite(back).all()
        np.testing.assert_allclose(back, x, atol=2e-5)


@every
def test_bad_entries_stay_in_their_token(name):
    smoothing, x = SMOOTHINGS[name], tokens(3)
    bad = x.at[0, 0, 7, 3].set(jnp.nan).at[0, 0, 9, 5].set(jnp.inf)
    node, residual = encode(smoothing, bad)
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(node))
    good = np.ones(40, bool)
    good[[7, 9]] = False
    back = np.asarray(jit(smoothing.decode)(node, residual))
    np.testing.assert_allclose(back[0, 0, good], np.asarray(x)[0, 0, good], atol=2e-5)
    clean_node, clean = encode(smoothing, x)
    np.testing.assert_array_equal(residual[0, 1], clean[0, 1])


@every
def test_same_bytes_and_vmap(name):
    smoothing = SMOOTHINGS[name]
    x_N = jnp.stack([tokens(4), tokens(5)])
    state = smoothing.init(x_N.shape[1:], x_N.dtype)
    states = jax.tree.map(lambda a: jnp.stack([a] * 2), state)
    together = jit(jax.vmap(lambda x, s: smoothing.encode(x, s)[:2]))(x_N, states)
    for i in range(2):
        alone = encode(smoothing, x_N[i])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            a, b = np.asarray(a[i], np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        again = encode(smoothing, x_N[i])
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(alone), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_mean_by_hand():
    x = jnp.asarray([[[[1, 2], [3, jnp.nan], [5, 4]]]], jnp.float32)
    mean_BHD, y_BHTD, exponent_BH = centred(x)
    assert mean_BHD.dtype == jnp.bfloat16 and int(exponent_BH[0, 0]) == 3  # 5 < 2^3
    np.testing.assert_array_equal(mean_BHD.astype(jnp.float32), [[[3, 3]]])
    np.testing.assert_array_equal(8 * y_BHTD, [[[[-2, -1], [0, 0], [2, 1]]]])


# Rotation.


def test_hadamard_by_hand():
    signs = hadamard(4, 0)[:, 0] * 2
    sylvester = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    np.testing.assert_allclose(hadamard(4, 0), signs[:, None] * sylvester / 2)
    for size in (1, 2, 64, 128):
        h = hadamard(size, 3)
        np.testing.assert_allclose(h @ h.T, np.eye(size), atol=1e-6)
    assert (hadamard(64, 0) != hadamard(64, 1)).any()


def test_rotation_spreads_a_loud_channel():
    x = tokens(6).at[..., 3].add(100)
    _, residual = encode(rotation(), x)
    rms = np.sqrt(np.mean(np.asarray(residual) ** 2, axis=(0, 1, 2)))
    assert rms.max() < 1.5 * rms.min()
    np.testing.assert_allclose(
        np.linalg.norm(residual, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


@pytest.mark.parametrize("size", [24, 96])
def test_head_dims_that_are_not_powers_of_two(size):
    with pytest.raises(ValueError, match=f"head_dim={size} is not a power of two; accepted"):
        rotation().init((1, 1, 4, size))


# Low rank.


def test_principal_axes_are_the_leading_eigenvectors():
    x = np.asarray(tokens(7, (2, 2, 60, 12), offset=0))
    c = np.einsum("bhtd,bhte->bhde", x, x)
    got = np.asarray(jit(principal_axes, static_argnums=(1, 2))(jnp.asarray(c), 3, 12))
    _, want = np.linalg.eigh(c)
    overlap = np.abs(np.einsum("bhdr,bhdr->bhr", got, want[..., ::-1][..., :3]))
    assert (overlap > 0.99).all(), overlap
    np.testing.assert_allclose(
        np.einsum("bhdr,bhds->bhrs", got, got), np.broadcast_to(np.eye(3), (2, 2, 3, 3)), atol=1e-5
    )


def test_low_rank_takes_low_rank_tokens_whole():
    rng = np.random.default_rng(8)
    x = rng.normal(0, 1, (1, 1, 50, 2)) @ rng.normal(0, 1, (2, 16)) + rng.normal(0, 5, 16)
    x = jnp.asarray(x, jnp.float32)
    _, residual = encode(low_rank_smoothing(2, 3, 8), x)
    centred = np.asarray(x) - np.asarray(x).mean(2, keepdims=True)
    assert np.linalg.norm(residual) < 0.03 * np.linalg.norm(centred)  # 8 bits, bfloat16 axes
    energy = [np.linalg.norm(encode(low_rank_smoothing(2, 3, bits), x)[1]) for bits in (1, 2, 4, 6)]
    assert all(b < 0.8 * a for a, b in zip(energy, energy[1:], strict=False)), energy


def test_ranks_beyond_the_span():
    x = jnp.broadcast_to(tokens(9, (1, 2, 2, 16)), (1, 2, 2, 16))  # two tokens: rank 1
    for smoothing in (low_rank_smoothing(16, 2, 4), klt_rotation(16), klt_rotation(6)):
        node, residual = encode(smoothing, x)
        back = jit(smoothing.decode)(node, residual)
        np.testing.assert_allclose(back, x, atol=1e-5)
    for make in (low_rank_smoothing, klt_rotation):
        with pytest.raises(ValueError, match="rank=17 is more than head_dim=16"):
            make(17).init((1, 1, 40, 16))


# Principal axes.


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("r", [1, 5, 15])
def test_reflections_are_orthogonal_whatever_their_rounding(bits, r):
    a, _ = np.linalg.qr(np.random.default_rng(r).normal(0, 1, (1, 3, 16, 16)))
    stored = jit(reflections_of, static_argnums=1)(jnp.asarray(a[..., :r], jnp.float32), bits)
    q = np.asarray(jit(rotation_of, static_argnums=(1, 2))(stored, 16, bits))
    eye = np.broadcast_to(np.eye(16), q.shape)
    np.testing.assert_allclose(np.swapaxes(q, 2, 3) @ q, eye, atol=3e-6)
    overlap = np.abs((q[..., :r] * a[..., :r]).sum(2))
    assert overlap.min() > {2: 0.1, 4: 0.9, 6: 0.99, 8: 0.999}[bits]
    assert packed_bytes(stored) == 3 * reflections_nbytes(16, r, bits)


def test_reflection_bytes_by_hand():
    # 127 reflections of 128 channels: 127 + 126 + ... + 1 entries of 6 bits, and 127 bfloat16.
    assert reflections_nbytes(128, 127, 6) == 8128 * 6 // 8 + 2 * 127
    assert reflections_nbytes(4, 2, 8) == (3 + 2) + 2 * 2


def test_klt_decorrelates_and_orders():
    x = tokens(10, (1, 2, 200, 16))
    for smoothing, kept in ((klt_rotation(None, 8), 16), (klt_rotation(5, 8), 5)):
        node, residual = encode(smoothing, x)
        y = np.asarray(residual)
        c = np.einsum("bhtd,bhte->bhde", y, y)
        sizes = np.diagonal(c, axis1=2, axis2=3)
        relative = np.abs(c) / np.sqrt(sizes[..., None] * sizes[:, :, None])
        off = relative[..., :4, :4] * (1 - np.eye(4))
        assert off.max() < 0.05, off.max()
        assert (np.diff(sizes[..., :kept]) <= 0.01 * sizes[..., :1]).all()
        rest = sizes[..., kept:].sum() / sizes.sum()
        w = np.linalg.eigvalsh(np.cov(np.asarray(x)[0, 0].T))[::-1]
        assert rest < 2 * w[kept:].sum() / w.sum() + 1e-6
        np.testing.assert_allclose(y.mean(2), 0, atol=0.02)


def test_decoding_of_a_slot_nobody_wrote():
    for smoothing in SMOOTHINGS.values():
        x = tokens(11)
        node, _, _ = jax.eval_shape(smoothing.encode, x, smoothing.init(x.shape, x.dtype))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), node)
        assert jnp.isfinite(jit(smoothing.decode)(zeros, jnp.zeros(x.shape, jnp.float32))).all()


# Centroids.


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_small_centroids(form):
    x = tokens(12, (1, 2, 96, 16))
    smoothing = kmeans_smoothing(8, 3, 2, centroid_dtype=form)
    state = smoothing.init(x.shape, x.dtype)
    node, residual, state = jit(smoothing.encode)(x, state)
    assert node.centroids_BHSKD.dtype.itemsize == 1 and node.centroids_BHSKD.shape[2:] == (2, 8, 16)
    per_head = 2 * (96 + 8 * 16 + (2 * 16 if form == "int8" else 1))
    assert packed_bytes(node) == smoothing.nbytes(x.shape) == 2 * per_head
    # Nearly as good as bfloat16, and the next span starts from what was stored.
    plain = kmeans_smoothing(8, 3, 2)
    _, reference, _ = jit(plain.encode)(x, plain.init(x.shape, x.dtype))
    assert np.linalg.norm(residual) < 1.03 * np.linalg.norm(reference)
    node, again, _ = jit(smoothing.encode)(x, state)
    assert np.linalg.norm(again) <= 1.01 * np.linalg.norm(residual)


# Errors, and composition.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rotation("fourier"), "kind='fourier'"),
        (lambda: klt_rotation(0), "rank=0"),
        (lambda: klt_rotation(4, 1), "vector_bits=1"),
        (lambda: klt_rotation(4, 9), "vector_bits=9"),
        (lambda: low_rank_smoothing(0), "rank=0"),
        (lambda: low_rank_smoothing(2, 0), "iters=0"),
        (lambda: low_rank_smoothing(2, 2, 9), "bits=9"),
        (lambda: kmeans_smoothing(4, centroid_dtype="int4"), "centroid_dtype=int4.*int8 or e4m3"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every
def test_bad_shapes(name):
    with pytest.raises(ValueError, match=r"rank 3; accepted: \(B, H, T, D\)"):
        SMOOTHINGS[name].init((2, 40, 16))
    with pytest.raises(ValueError, match="dtype=int32"):
        SMOOTHINGS[name].init((1, 2, 40, 16), jnp.int32)


def test_everything_in_one_chain():
    codec = chain(*SMOOTHINGS.values(), identity(jnp.float32))
    x = tokens(13)
    packed, state = jit(codec.encode)(x, codec.init(x.shape, x.dtype))
    np.testing.assert_allclose(codec.decode(packed, jnp.float32), x, atol=2e-4)
    assert packed_bytes(packed) == codec.nbytes(x.shape)
    assert any(not isinstance(s, EmptyState) for s in state)
