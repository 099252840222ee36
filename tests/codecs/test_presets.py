"""Every recipe: bytes, one program, determinism, edges, and a cache that holds it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_jax.attention.api import attend
from qvg_jax.cache.operations import KVCache, append, compress
from qvg_jax.codecs import presets
from qvg_jax.codecs.accounting import packed_bytes
from tests.support.spans import correlated_tokens as span
from tests.support.spans import jit, round_trip
from tests.support.spans import relative_error as error

pytestmark = pytest.mark.usefixtures("strict_dtypes")


SHAPE = (1, 2, 64, 128)
CENTROIDS = dict(num_centroids=4)
# QVG's own recipes are in test_codec; the ones left out differ in a number only (so does trellis K).
NAMES = [
    "quarot",
    "turboquant",
    "pca",
    "nvfp4",
    "kivi",
    "midrise",
    "dither",
    "dither-asym",
    "kmeans-e8",
    "klt",
    "klt-kmeans",
    "trellis",
]
SMALL = {
    name: CENTROIDS for name in NAMES if name.startswith(("midrise", "kmeans", "trellis", "dither"))
}
SMALL["klt-kmeans"] = CENTROIDS
SMALL["trellis"] = CENTROIDS | dict(key_budget=2.0)
CODECS = {
    f"{name} {part}": codec
    for name in NAMES
    for part, codec in zip(("K", "V"), presets.pair(name, **SMALL.get(name, {})), strict=True)
    if part == ("V" if name == "trellis" else "K") or name in ("kivi", "midrise", "kmeans-e8")
}
every_codec = pytest.mark.parametrize("name", CODECS)


@every_codec
def test_bits_are_the_bytes_on_the_device(name):
    codec = CODECS[name]
    for shape in (SHAPE, (2, 1, 77, 256)):
        packed, _ = jax.eval_shape(codec.encode, jnp.zeros(shape, jnp.bfloat16), codec.init(shape))
        assert packed_bytes(packed) == codec.nbytes(shape), shape
        assert codec.bits_per_element(shape) == 8 * codec.nbytes(shape) / np.prod(shape)
    packed, _, _ = round_trip(codec, span(0))
    leaves = jax.tree.leaves(packed)
    assert sum(a.on_device_size_in_bytes() for a in leaves) == codec.nbytes(SHAPE)


@every_codec
def test_same_input_same_bytes_whatever_the_key(name):
    codec, x = CODECS[name], span(1)
    state = codec.init(SHAPE, x.dtype)
    encode = jit(codec.encode)
    first, _ = encode(x, state)
    for again in (encode(x, state), jit(codec.encode)(x, state, key=jax.random.key(7))):
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again[0]), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@every_codec
def test_spans_scan_stack_and_vmap(name):
    codec = CODECS[name]
    x_N = jnp.stack([span(2), span(3)])

    @jit
    def scanned(x_N, state):
        def body(state, x):
            packed, state = codec.encode(x, state)
            return state, packed

        return jax.lax.scan(body, state, x_N)

    state = codec.init(SHAPE, x_N.dtype)
    last, stacked = scanned(x_N, state)
    assert jax.tree.structure(last) == jax.tree.structure(state)
    slots = jax.tree.map(lambda a: a[1], stacked)
    decoded = jit(jax.vmap(lambda p: codec.decode(p, jnp.float32)))(stacked)
    decode = jit(codec.decode, static_argnums=1)
    want = decode(slots, jnp.float32)
    # A batched product sums in another order.
    np.testing.assert_allclose(decoded[1], want, atol=2e-5 * float(jnp.abs(want).max()))
    assert error(x_N[1], decoded[1]) < 0.6
    zeros = decode(jax.tree.map(jnp.zeros_like, slots), jnp.float32)  # a slot nobody wrote
    assert zeros.shape == SHAPE and jnp.isfinite(zeros).all()
    assert jax.eval_shape(codec.decode, slots).dtype == jnp.bfloat16


@every_codec
def test_bad_entries_do_not_leave_their_head(name):
    codec, x = CODECS[name], span(4)
    bad = x.at[0, 1, 4, 5].set(jnp.nan).at[0, 1, 30, 20].set(jnp.inf).at[0, 1, 31].set(-jnp.inf)
    _, state, hat = round_trip(codec, bad)
    _, _, want = round_trip(codec, x)
    assert np.isfinite(hat).all()
    assert all(jnp.isfinite(a.astype(jnp.float32)).all() for a in jax.tree.leaves(state))
    if "trellis" in name:  # heads share a budget: what is bad in one may give another some bits
        assert error(x[:, 0], hat[:, 0]) < 1.1 * error(x[:, 0], want[:, 0])
    else:
        np.testing.assert_array_equal(hat[:, 0], want[:, 0])
    good = np.ones(64, bool)
    good[[4, 30, 31]] = False
    assert error(x[0, 1, good], hat[0, 1, good]) < 1.5 * error(x[0, 1, good], want[0, 1, good])


@pytest.mark.parametrize("name", ["kivi V", "quarot K", "pca K", "midrise V", "klt K", "nvfp4 K"])
@given(
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-30, 1e-3, 700.0, 1e30]),
    kind=st.sampled_from(["any", "constant", "one token differs", "zero"]),
)
@settings(max_examples=5, deadline=None, derandomize=True)
def test_any_span(name, seed, size, kind):
    if "midrise" in name or "quarot" in name:  # k-means stops at 1e15; QuaRot's e4m3 at 448 * 3
        size = {1e30: 300.0, 700.0: 90.0, 1e-30: 0.5}.get(size, size)
    codec, x = CODECS[name], np.asarray(span(seed), np.float32)
    if kind != "any":
        x = np.broadcast_to(x[:, :, :1], x.shape).copy()
    if kind == "one token differs":
        x[:, :, 17] *= -3
    x = jnp.asarray(x * (0 if kind == "zero" else size), jnp.bfloat16)
    _, _, hat = round_trip(codec, x)
    assert np.isfinite(hat).all()
    if kind == "zero":
        np.testing.assert_array_equal(hat, 0)
    elif not ("quarot" in name and size < 0.1):  # below e4m3's least scale
        assert error(np.asarray(x, np.float64) / size, hat / np.float64(size)) < 0.75


@pytest.mark.parametrize("name", ["kivi", "midrise", "klt"])
def test_a_cache_attends_to_spans_of_two_codecs(name):
    """Through slots, compress and attend: what is read is what decoding gives."""
    key_codec, value_codec = presets.pair(name, **SMALL.get(name, {}))
    b, h, n, blocks = 1, 2, 16, 4
    shape = dict(batch=b, heads=h, head_dim=128, block_tokens=n, span_blocks=blocks, max_spans=1)
    cache = KVCache.create(
        **shape, sink_blocks=0, keep_recent=0, pos_dims=0, window_blocks=blocks,
        key_codec=key_codec, value_codec=value_codec,
    )  # fmt: skip
    k, v = (jnp.swapaxes(span(seed, (b, h, blocks * n, 128)), 1, 2) for seed in (20, 21))
    for i in range(blocks):
        block = slice(i * n, (i + 1) * n)
        cache = append(cache, k[:, block], v[:, block])
    cache = compress(cache)
    assert int(cache.num_spans) == 1 and int(cache.dense_blocks) == 0
    q, new_k, new_v = (jnp.swapaxes(span(s, (b, h, 4, 128)), 1, 2) for s in (22, 23, 24))
    got = attend(q.astype(jnp.float32), cache, new_k, new_v)
    hats = []
    for codec, x in ((key_codec, k), (value_codec, v)):
        x_BHTD = jnp.swapaxes(x, 1, 2)
        hats.append(np.swapaxes(round_trip(codec, x_BHTD)[2], 1, 2))
    all_k, all_v = (
        np.concatenate([hat, new.astype(jnp.float32)], axis=1)
        for hat, new in zip(hats, (new_k, new_v), strict=True)
    )
    logits = np.einsum("bqhd,bthd->bhqt", np.asarray(q, np.float32), all_k) / np.sqrt(128)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    want = np.einsum("bhqt,bthd->bqhd", p / p.sum(-1, keepdims=True), all_v)
    # Two programs: an e4m3 scale or a code may round the other way.
    assert np.linalg.norm(np.asarray(got) - want) < 0.02 * np.linalg.norm(want)
