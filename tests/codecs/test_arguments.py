"""Codecs name what they cannot encode or decode; a gradient is refused where it would be wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvg_jax.codecs import presets
from qvg_jax.codecs.base import identity
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.smoothing import kmeans_smoothing, rotation

X = jnp.linspace(-1, 1, 2 * 16 * 8).reshape(1, 2, 16, 8)
CODEC = presets.qvg(num_centroids=4, group=8, iters=1, cold_iters=1)
KIVI = presets.pair("kivi", group=8)[0]


def encoded(codec, x=X):
    return codec.encode(x, codec.init(x.shape, x.dtype))


@pytest.fixture(scope="module")
def packed():
    return encoded(CODEC)[0]


X16 = X.reshape(1, 2, 8, 16)
STATE = CODEC.init(X.shape, X.dtype)
FIRST = ", what encode returns first"
WRONG_KINDS = {
    "packed=an array (1, 2, 16, 8) of float32": lambda p: CODEC.decode(X),
    "packed=None": lambda p: CODEC.decode(None),
    f"packed=a tuple is not accepted: give a tuple of 2, not of 3{FIRST}": lambda p: CODEC.decode((*p, STATE)),
    f"packed=a tuple is not accepted: give an IntegerPacked{FIRST}": lambda p: CODEC.decode((p, STATE)),
    f"packed=a KMeansPacked is not accepted: give an IntegerPacked{FIRST}": lambda p: CODEC.decode(p[::-1]),
    f"packed=a tuple is not accepted: give a MinMaxPacked{FIRST}": lambda p: KIVI.decode(p),
    f"packed=an array (1, 2, 16, 8) of float32 is not accepted: give an IdentityPacked{FIRST}": lambda p: (
        identity().decode(X)
    ),
    f"packed=an IdentityPacked is not accepted: give a KMeansPacked{FIRST}": lambda p: (
        kmeans_smoothing(4).decode(encoded(identity())[0], X)
    ),
    "x=5 is not accepted: give an array (B, H, T, D)": lambda p: CODEC.encode(5, STATE),
    "x=a list is": lambda p: identity().encode([X], None),
    "x=a tuple is": lambda p: CODEC.encode(p, STATE),
    "x='K'": lambda p: rotation().encode("K", ()),
    "key=5 is not accepted: give a key": lambda p: CODEC.encode(X, STATE, key=5),
    "shape=an array (1, 2, 16, 8) of float32": lambda p: CODEC.init(X),
    "shape=5 is not accepted: give (B, H, T, D)": lambda p: CODEC.nbytes(5),
    "shape=a tuple is": lambda p: KIVI.init((1, 2, 16.0, 8)),
}  # fmt: skip
WRONG_VALUES = {
    "dtype=int32 is not accepted: give floating point": lambda p: CODEC.encode(
        X.astype(int), STATE
    ),
    "dtype=int8 is not accepted: give floating point": lambda p: CODEC.decode(p, jnp.int8),
    "state has centroids of shape (1, 2, 1, 4, 8)": lambda p: CODEC.encode(X[:, :1], STATE),
    "packed has 80 bytes, as another codec made it: a span of shape (1, 2, 8, 8)": lambda p: (
        presets.rtn(group=4, bits=4).decode(encoded(presets.rtn(group=16, bits=2), X16)[0])
    ),
    "packed does not fit this codec (cannot reshape array": lambda p: presets.rtn(
        group=8, bits=4
    ).decode(encoded(presets.rtn(group=8, bits=2))[0]),
}


@pytest.mark.parametrize("message", WRONG_KINDS)
def test_another_kind_is_named(message, packed):
    with pytest.raises(TypeError) as caught:
        WRONG_KINDS[message](packed)
    assert str(caught.value).startswith(message) and " is not accepted: give " in str(caught.value)


@pytest.mark.parametrize("message", WRONG_VALUES)
def test_another_value_is_named(message, packed):
    with pytest.raises(ValueError) as caught:
        WRONG_VALUES[message](packed)
    assert str(caught.value).startswith(message)


def test_arrays_of_numpy_and_64_bits_are_encoded_alike(packed):
    for x in (np.asarray(X), np.asarray(X, np.float64)):
        again, _ = encoded(CODEC, x)
        assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(packed)))


def test_gradients_through_a_codec_say_why_not():
    def there_and_back(codec, x):
        return codec.decode(encoded(codec, x)[0], jnp.float32).sum()

    quantizers = (presets.rtn(group=8), chain(rotation(), presets.rtn(group=8)))
    for codec in (CODEC, KIVI, *quantizers, chain(kmeans_smoothing(4), identity("f32"))):
        with pytest.raises(ValueError, match="encode has no gradient: its codes are integers"):
            jax.eval_shape(jax.grad(lambda x, codec=codec: there_and_back(codec, x)), X)
    # No codes, no reason: what only stores or turns is as smooth as it is without a codec.
    for codec in (identity("f32"), chain(rotation(), identity("f32"))):
        slope = jax.grad(lambda x, codec=codec: there_and_back(codec, x))(X)
        np.testing.assert_allclose(slope, jnp.ones_like(X), atol=1e-6)
    # Scales may be learned: decoding alone is smooth in them.
    codec = presets.rtn(group=8)
    codes, state = encoded(codec)
    slope = jax.grad(lambda s: codec.decode((codes[0]._replace(scales_BHTG=s),), jnp.float32).sum())
    assert np.isfinite(slope(codes[0].scales_BHTG).astype(jnp.float32)).all()
