"""Arguments of another kind or size are named with what is accepted, in place of an error of our own code."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import pytest

import qvg_jax as qvg
from qvg_jax.cache.operations import KVCache, append, evict
from qvg_jax.codecs.base import identity
from tests.support.cache_model import SIZES, block, coarse

CODEC = qvg.presets.get("rtn", group=8)
Q = jnp.zeros((1, 4, 2, 8))


@pytest.fixture(scope="module")
def cache():
    return qvg.KVCache.create(heads=2, head_dim=8, block_tokens=4, pos_dims=0, max_spans=0)


WRONG = {
    "cache=None": lambda c: qvg.attend(Q, None, Q, Q),
    "q=None": lambda c: qvg.attend(None, c, Q, Q),
    "k=a list": lambda c: qvg.attend(Q, c, [1.0], Q),
    "v='values'": lambda c: qvg.attend(Q, c, Q, "values"),
    "rope='axial'": lambda c: qvg.attend(Q, c, Q, Q, rope="axial"),
    "cache=a Layout": lambda c: qvg.explain(c.layout, Q),
    "q=3.0": lambda c: qvg.explain(c, 3.0),
    "cache=7": lambda c: qvg.append(7, Q, Q),
    "k=None": lambda c: qvg.append(c, None, Q),
    "v=a list": lambda c: qvg.append(c, Q, [1.0]),
    "cache=a CacheView.*cache is view.cache": lambda c: qvg.compress(c.view(rope=False)),
    "cache=a dict": lambda c: qvg.evict({}),
    "cache=a tuple": lambda c: qvg.reset(()),
    "cache='cache'": lambda c: qvg.truncate("cache", 1),
    "tokens=None": lambda c: qvg.truncate(c, None),
    "cache=1": lambda c: qvg.take_rows(1, jnp.array([0])),
    "rows=None": lambda c: qvg.take_rows(c, None),
    "cache=2": lambda c: qvg.summary(2),
    "cache=a list": lambda c: qvg.cache_bytes([c]),
    "cache=3": lambda c: qvg.to_saved(3),
    "like=None": lambda c: qvg.from_saved(qvg.to_saved(c), None),
    "cache=4": lambda c: qvg.spread(4, None),
    "plan='spans'": lambda c: qvg.spread(c, "spans"),
    "sharding='heads'": lambda c: qvg.KVCache.create(
        heads=1, head_dim=8, block_tokens=1, sharding="heads"
    ),
    "cache=5": lambda c: qvg.recode(5, CODEC, CODEC),
    "value_codec='qvg'": lambda c: qvg.recode(c, CODEC, "qvg"),
    "codec='rtn'": lambda c: qvg.bits_per_element("rtn", (1, 2, 8, 8)),
    "codec=None": lambda c: qvg.compression_ratio(None, (8, 8)),
}


@pytest.mark.parametrize("message", WRONG)
def test_another_kind_is_named(message, cache):
    with pytest.raises(TypeError, match=f"^{message}") as caught:
        WRONG[message](cache)
    assert " is not accepted: give " in str(caught.value)


def test_shapes_and_tracers_are_arrays(cache):
    shape = jax.ShapeDtypeStruct(Q.shape, Q.dtype)
    assert qvg.explain(cache, shape).implementation == "xla"
    assert jax.eval_shape(qvg.attend, shape, cache, shape, shape).shape == Q.shape
    with pytest.raises(ValueError, match="to_saved"):
        qvg.from_saved(None, cache)


def test_fields_of_a_cache_are_of_the_types_that_an_editor_shows(cache):
    rope = qvg.axial_rope([[1.0] * 4])
    padded = qvg.KVCache.create(
        heads=1, head_dim=8, block_tokens=1, pos_dims=1, blocks="padded", rope=rope
    )
    hints = typing.get_type_hints(qvg.KVCache)
    assert hints["layout"] is type(cache.layout)
    for each in (cache, padded):
        for field in dataclasses.fields(each):
            hint, value = hints[field.name], getattr(each, field.name)
            assert hint is not typing.Any, field.name
            if not isinstance(hint, typing.TypeAliasType):  # a tree of arrays
                assert isinstance(value, hint), field.name


COARSE = coarse()


def small(**sizes):
    defaults = dict(sink_blocks=1, span_blocks=2, max_spans=2, keep_recent=1)
    return KVCache.create(
        **(SIZES | defaults | dict(key_codec=COARSE, value_codec=identity()) | sizes)
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(layers=0), "layers=0 is not accepted: give an integer >= 1"),
        (dict(heads=2.0), "heads=2.0 is not accepted: give an integer >= 1"),
        (dict(block_tokens=-3), "block_tokens=-3 is not accepted"),
        (dict(sink_blocks=-1), "sink_blocks=-1 is not accepted: give an integer >= 0"),
        (dict(max_spans=True), "max_spans=True is not accepted"),
        (dict(span_blocks=0), "span_blocks=0 is not accepted: give an integer >= 1"),
        (dict(window_blocks=2), "window_blocks=2 is not accepted: .*keep_recent=1 blocks"),
        (dict(overflow="grow"), r"overflow='grow' is not accepted: give one of \('error', 'drop"),
        (dict(dtype=jnp.int8), "dtype=int8 is not accepted: give a floating point dtype"),
        (dict(key_codec="qvg"), "key_codec='qvg' is not a qvg_jax Codec"),
    ],
)
def test_create_says_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        small(**wrong)


def test_create_refuses_a_codec_whose_state_changes_shape():
    def grows(x_BHTD, state, *, key=None):
        packed, state = COARSE.encode(x_BHTD, state)
        return packed, jnp.concatenate([state, state])

    with pytest.raises(ValueError, match="coarse 3: encode changes the shape or dtype"):
        small(key_codec=dataclasses.replace(COARSE, encode=grows))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda k, v, p: (k[0], v, p), r"k has shape \(1, 3, 2, 8\); accepted: \(2, 1, 3, 2, 8\)"),
        (lambda k, v, p: (k, v[..., :4], p), r"v has shape \(2, 1, 3, 2, 4\)"),
        (lambda k, v, p: (k.astype(int), v, p), "k has dtype int32; accepted: floating point"),
        (lambda k, v, p: (k, v), r"positions=None; the cache has pos_dims=3: give \(1, 3, 3\)"),
        (lambda k, v, p: (k, v, p[..., :2]), r"positions have shape \(1, 3, 2\); accepted"),
    ],
)
def test_append_says_what_is_wrong(change, message):
    cache = small()
    with pytest.raises(ValueError, match=message):
        append(cache, *change(*block(0, cache.layout)))


def test_evict_says_what_is_wrong():
    with pytest.raises(ValueError, match="max_spans=0 and so no spans"):
        evict(small(max_spans=0, window_blocks=4))
    with pytest.raises(ValueError, match="spans=-1 is not accepted"):
        evict(small(), -1)
