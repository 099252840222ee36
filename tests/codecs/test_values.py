"""Codecs are values: equal settings make equal codecs, which print, parse, pickle and compile once."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvg_jax.cache.operations import KVCache, append
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import Codec, EmptyState, Smoothing, identity
from qvg_jax.codecs.compose import chain, encoded_by
from qvg_jax.codecs.quantize import by_energy, grid_quantize, heads_as_tokens, residual_quantize
from qvg_jax.codecs.smoothing import klt_rotation, kmeans_smoothing, rotation

ALL = [*presets.PRESETS, *presets.PAIRS]
OVERRIDES = [
    ("qvg", dict(group=32)),
    ("qvg", dict(num_centroids=64, scale_dtype=jnp.bfloat16, reseed=False, encoder="triton")),
    ("bf16", dict(dtype=jnp.float32)),
    ("kivi", dict(bits=4, value_group=64, clip=0.9)),
    ("midrise", dict(key_gain="none", centroid_dtype=jnp.dtype("float32"))),
    ("klt", dict(budget=1.6, value_share=0.75, rank=None)),
    ("auto", dict(model="pocket-world")),
]
COMPOSED = {
    "kmeans_smoothing(num_centroids=64) > residual_quantize(bits=4)": lambda: chain(
        kmeans_smoothing(64), residual_quantize(4)
    ),
    "chain(residual_quantize())": lambda: chain(residual_quantize()),
    "rotation(signs='token') > (klt_rotation(rank=4) > grid_quantize(grid=(-1.0, 0.0, 2.0)))": (
        lambda: chain(
            rotation(signs="token"), chain(klt_rotation(4), grid_quantize(grid=[-1.0, 0.0, 2.0]))
        )
    ),
    "heads_as_tokens(by_energy(grid_quantize(bits=3), rotation() > grid_quantize(), share=0.25))": (
        lambda: heads_as_tokens(
            by_energy(grid_quantize(3), chain(rotation(), grid_quantize()), 0.25)
        )
    ),
    "chain(kmeans_smoothing(), residual_quantize(), encoder='triton')": lambda: encoded_by(
        chain(kmeans_smoothing(), residual_quantize()), "triton"
    ),
    "rotation() > preset('rtn:group=32')": lambda: chain(rotation(), presets.get("rtn", group=32)),
    "identity(dtype='f32')": lambda: identity(np.float32),
}


def hand_made(name="doubled") -> Codec:
    def encode(x_BHTD, state, *, key=None):
        return x_BHTD * 2, state

    def decode(packed, dtype=jnp.bfloat16):
        return (packed / 2).astype(dtype)

    return Codec(
        lambda *_: EmptyState(), encode, decode, lambda s: 32.0, name, lambda s: 4 * int(np.prod(s))
    )


def check_value(codec):
    for other in (
        presets.parse(str(codec)), pickle.loads(pickle.dumps(codec)), copy.copy(codec),
        copy.deepcopy(codec),
    ):  # fmt: skip
        assert other is not codec and other == codec and hash(other) == hash(codec)
        assert (other.name, str(other), other.spec) == (codec.name, str(codec), codec.spec)
    assert repr(codec) == f"Codec({str(codec)!r})"


@pytest.mark.parametrize("name", ALL)
def test_presets_are_values(name):
    for codec, part in zip(presets.pair(name), ("key", "value"), strict=True):
        assert str(codec) == (name if name in presets.PRESETS else f"{name}.{part}")
        check_value(codec)
        check_value(codec.spec["codec"])  # what the recipe is made of
    assert presets.parse_pair(name) == presets.pair(name)


@pytest.mark.parametrize(("name", "settings"), OVERRIDES)
def test_presets_with_overrides_are_values(name, settings):
    pair = presets.pair(name, **settings)
    for codec in pair:
        check_value(codec)
    text = str(pair[0]).replace(".key", "")
    assert presets.parse_pair(text) == pair != presets.pair(name)
    assert presets.parse_pair(str(pair[1])) == (pair[1], pair[1])


@pytest.mark.parametrize("text", COMPOSED)
def test_what_is_composed_by_hand_is_a_value(text):
    codec = COMPOSED[text]()
    assert str(codec) == text and codec == COMPOSED[text]()
    check_value(codec)


def test_equal_settings_are_equal_however_they_were_given():
    assert presets.get("qvg", group=64) == presets.get("qvg")
    assert kmeans_smoothing(np.int64(8)) == kmeans_smoothing(num_centroids=8, stages=1)
    assert residual_quantize(scale_dtype=jnp.float8_e4m3fn) == residual_quantize(2, 64, "symmetric")
    assert grid_quantize(grid=np.array([0.0, 1.0])) == grid_quantize(grid=(0.0, 1.0))
    assert identity() == identity(jnp.bfloat16) != identity("f32")
    assert len({residual_quantize(4), residual_quantize(bits=4), residual_quantize(3)}) == 2


def test_different_settings_names_and_nestings_differ():
    a, b = kmeans_smoothing(4), kmeans_smoothing(3)
    last = residual_quantize()
    codecs = [
        chain(a, b, last), chain(b, a, last), chain(a, chain(b, last)), chain(a, last), last,
        chain(last), encoded_by(chain(a, last), "xla"), presets.get("qvg"), presets.qvg(),
        presets.get("qvg", encoder="xla"), presets.pair("auto")[0], presets.pair("midrise")[0],
    ]  # fmt: skip
    assert len(set(codecs)) == len(codecs)
    assert last != a and last != "residual_quantize()"


def test_the_encoder_is_a_setting():
    plain = presets.get("qvg")
    assert encoded_by(plain, "xla") == presets.get("qvg", encoder="xla")
    assert encoded_by(encoded_by(plain, "triton"), "xla") == presets.get("qvg", encoder="xla")
    assert presets.parse("qvg:encoder=xla") == presets.get("qvg", encoder="xla")
    with pytest.raises(ValueError, match="encoder='cuda'|implementation='cuda'"):
        chain(residual_quantize(), encoder="cuda")
    with pytest.raises(ValueError, match="'doubled' has no encoders"):
        encoded_by(hand_made(), "xla")


def test_codecs_made_by_hand_are_equal_by_their_functions():
    codec = hand_made()
    fields = {f.name: getattr(codec, f.name) for f in dataclasses.fields(codec) if f.init}
    assert Codec(**fields) == codec == copy.copy(codec) and hash(Codec(**fields)) == hash(codec)
    assert codec != hand_made() and codec.spec is None and repr(codec) == "Codec('doubled')"
    inside = chain(rotation(), codec)
    assert inside == chain(rotation(), codec) != chain(rotation(), hand_made())
    assert str(inside) == "rotation() > <doubled>"
    with pytest.raises(ValueError, match="is not understood"):
        presets.parse(str(inside))


def test_a_changed_copy_is_made_by_hand():
    codec = residual_quantize()
    changed = dataclasses.replace(codec, encode=identity().encode)
    assert changed.spec is None and changed != codec and changed.decode is codec.decode


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kmeans_smoothing(1.5), "num_centroids=1.5 is not accepted: give an integer"),
        (lambda: kmeans_smoothing(True), "num_centroids=True is not accepted: give an integer"),
        (lambda: kmeans_smoothing("many"), "num_centroids='many' is not accepted: give an integer"),
        (lambda: kmeans_smoothing(8, cold_iters=2.0), "cold_iters=2.0.*give an integer or None"),
        (lambda: kmeans_smoothing(8, reseed=2), "reseed=2 is not accepted: give True or False"),
        (lambda: by_energy(identity(), identity(), "half"), "share='half'.*give a number"),
        (lambda: presets.parse("qvg:num_centroids=1.5"), "num_centroids=1.5.*give an integer"),
        (lambda: presets.parse("qvg:reseed=no"), "reseed='no'.*give True or False"),
    ],
)
def test_numbers_are_typed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip", "codec='zip' is not known"),
        ("kivi", "'kivi' has one codec for K and one for V"),
        ("kivi.query", "accepted: NAME.key or NAME.value"),
        ("qvg.key", "accepted: NAME.key or NAME.value"),
        ("qvg:group", "not understood at 'group'"),
        ("kmeans_smoothing(", "is not understood"),
        ("zip()", "'zip' is not known; accepted: .*kmeans_smoothing"),
        ("kmeans_smoothing()", "is a smoothing"),
        ("kmeans_smoothing() < residual_quantize()", "is not understood"),
        ("kmeans_smoothing() > residual_quantize(size=2)", "'residual_quantize'.*size"),
        ("__import__('os').system('true')", "is not understood"),
    ],
)
def test_text_that_is_no_codec(text, message):
    with pytest.raises(ValueError, match=message):
        presets.parse(text)


def test_equal_codecs_compile_once():
    traced = []

    def there_and_back(codec, x):
        traced.append(str(codec))
        packed, _ = codec.encode(x, codec.init(x.shape, x.dtype))
        return codec.decode(packed)

    run, x = jax.jit(there_and_back, static_argnums=0), jnp.ones((1, 1, 16, 64), jnp.bfloat16)
    for _ in range(3):
        run(presets.get("qvg", num_centroids=4), x)
    assert len(traced) == 1 and run._cache_size() == 1
    run(presets.get("qvg", num_centroids=2), x)
    assert len(traced) == 2


def test_caches_of_equal_codecs_share_their_programs():
    traced = []

    @jax.jit
    def step(cache, k):
        traced.append(1)
        return append(cache, k, k)

    for _ in range(2):
        key_codec, value_codec = presets.pair("midrise", num_centroids=4)
        cache = KVCache.create(
            heads=1, head_dim=64, block_tokens=4, span_blocks=2, max_spans=1, keep_recent=0, pos_dims=0,
            key_codec=key_codec, value_codec=value_codec,
        )  # fmt: skip
        cache = step(cache, jnp.ones((1, 4, 1, 64), jnp.bfloat16))
        assert cache.layout.key_codec == key_codec
    assert len(traced) == 1
    assert "key_codec=Codec('midrise.key:num_centroids=4')" in repr(cache.layout)


def test_smoothings_are_values_too():
    smoothing = kmeans_smoothing(8, cold_iters=5)
    assert repr(smoothing) == "Smoothing('kmeans_smoothing(num_centroids=8, cold_iters=5)')"
    assert pickle.loads(pickle.dumps(smoothing)) == smoothing == copy.deepcopy(smoothing)
    assert isinstance(smoothing, Smoothing) and smoothing != kmeans_smoothing(8)
