"""Decoding kernels on a Hopper GPU: `python -m pytest -m gpu tests/kernels/test_kernels_decode_gpu.py`.

References and bounds are those of test_kernels_gpu.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequant_attention import (
    prepare_tokens,
)
from pallas_kernels.dequantize import (
    Rotation,
    Spans,
    Tokens,
    Window,
    append_keys,
    append_values,
    decode_keys,
    decode_values,
)
from pallas_kernels.dequantize.reference import key_row_of_token
from qvg_jax.backends import is_hopper
from tests.support.kernel_cases import (
    E4M3,
    FORMATS,
    angles,
    difference,
    encoded,
    on_cpu,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_hopper(), reason="no Hopper GPU"),
]


def _floats(x) -> np.ndarray:
    return np.asarray(x, np.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 2e-3), (E4M3, 1.5e-2)])
def test_decoding_equals_the_reference(name, dtype, bound):
    tokens = 300  # partial tiles
    source, scheme = encoded(name, 12, tokens)
    if "int8" in FORMATS[name][1] and dtype == jnp.bfloat16:
        bound = 4e-3  # int8 tables times their steps are rounded before the residual is added
    here = dict(valid=tokens, dtype=dtype, scale_n=2.0 ** np.arange(-1.0, 5.0))

    def keys(source, cos_sin, implementation, pairing):
        rotation = Rotation(cos_sin, pairing, batch=2, first=2)
        spans = Spans(source, scheme, 4, 6)
        return decode_keys(spans, **here, rotation=rotation, implementation=implementation)

    def values(source, implementation):
        return decode_values(Spans(source, scheme, 4, 6), **here, implementation=implementation)

    for pairing in ("half", "interleaved"):
        args = source, angles(0, 6, tokens)
        ours = keys(*args, "mosaic", pairing)
        right = on_cpu(lambda s, x, p=pairing: keys(s, x, "reference", p), *args)
        assert ours.shape == right.shape and difference(ours, right) < bound
    ours = values(source, "mosaic")
    right = on_cpu(lambda s: values(s, "reference"), source)
    assert ours.shape == right.shape and difference(ours, right) < bound


@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 2e-3), (E4M3, 1.5e-2)])
@pytest.mark.parametrize("valid", [3, 1, 0])
def test_several_spans_are_decoded_behind_each_other(dtype, bound, valid):
    """Of four slots three, not in order, the first ones valid; 208 tokens are no whole block."""
    tokens, rows = 208, 2
    source, scheme = encoded("qvg", 4 * rows, tokens)
    slot = np.asarray([3, 0, 2])
    here = dict(valid=valid * tokens, dtype=dtype, scale_n=np.asarray([1.0, 4.0]))

    def decode(source, cos_sin, implementation):
        spans = Spans(source, scheme, slot * rows, rows)
        more = here | dict(implementation=implementation)
        rotation = Rotation(cos_sin, first=slot)
        return decode_keys(spans, rotation=rotation, **more), decode_values(spans, **more)

    args = source, angles(0, 4, tokens)
    ours = decode(*args, "mosaic")
    right = on_cpu(lambda s, x: decode(s, x, "reference"), *args)
    read = -(-valid * tokens // 256) * 256
    for a, b, axis in zip(ours, right, (1, 1 if dtype == jnp.bfloat16 else 2), strict=True):
        assert a.shape == b.shape
        a, b = (np.asarray(x, np.float32).take(range(read), axis) for x in (a, b))
        assert not valid or difference(a, b) < bound


@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 2e-3), (E4M3, 1.5e-2)])
@pytest.mark.parametrize("valid", [2, 1, 0])
@pytest.mark.parametrize("slots", [1, 2])
def test_new_tokens_are_laid_behind_spans(dtype, bound, valid, slots):
    """As (B, T, H, D), rotated; spans before them are as they were, and zeros follow."""
    tokens, new, valid = 208, 70, min(valid, slots)
    source, scheme = encoded("qvg", 8, tokens)
    first = np.asarray([4, 0])[:slots] if slots > 1 else np.int32(4)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, new, 2, 128)), jnp.bfloat16)

    def decode(source, x, cos_sin, implementation):
        here = dict(scale_n=np.asarray([1.0, 4.0, 0.5, 2.0]), implementation=implementation)
        spans, more = Spans(source, scheme, first, 4), dict(valid=valid * tokens, dtype=dtype)
        k, v = (f(spans, room=new, **more, **here) for f in (decode_keys, decode_values))
        at, x = jnp.int32(valid * tokens), Tokens(x, 0, 4)
        rotation = Rotation(cos_sin, "interleaved", batch=2)
        return (
            append_keys(k, at, x, valid=new, rotation=rotation, **here),
            append_values(v, at, x, valid=new, **here),
        )

    args = source, x, angles(0, 2, new)
    ours = jax.jit(lambda *a: decode(*a, "mosaic"))(*args)
    right = on_cpu(lambda *a: decode(*a, "reference"), *args)
    read = -(-(valid * tokens + new) // 256) * 256
    for a, b, axis in zip(ours, right, (1, 1 if dtype == jnp.bfloat16 else 2), strict=True):
        assert a.shape == b.shape
        a, b = (np.asarray(x, np.float32).take(range(read), axis) for x in (a, b))
        assert difference(a, b) < bound
        behind = range(valid * tokens + new, read)
        rows = np.asarray(key_row_of_token(read))[behind] if axis == 1 and dtype == E4M3 else behind
        assert not a.take(rows, axis).any()


@pytest.mark.parametrize("pairing", ["half", "interleaved", None])
@pytest.mark.parametrize("heads, branches", [(2, 1), (3, 2)])
def test_queries_are_rotated_and_grouped_in_one_pass(pairing, heads, branches):
    """Two query heads for each, two videos; a row of zeros, and magnitudes far apart."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2 * branches, 75, 2 * heads, 128))
    q *= 10.0 ** rng.integers(-4, 5, (*q.shape[:3], 1))
    q[0, 3, 1] = 0
    q = jnp.asarray(q, jnp.bfloat16)
    cos_sin = angles(0, 2, 75) if pairing else None

    def prepared(q, cos_sin, implementation):
        rotation = pairing and Rotation(cos_sin, pairing, batch=2)
        here = dict(batch=2, heads=heads, rotation=rotation, fp8=True)
        return prepare_tokens(q, jnp.float32(0.1), implementation=implementation, **here)

    ours = jax.jit(lambda q, x: prepared(q, x, "mosaic"))(q, cos_sin)
    right = on_cpu(lambda q, x: prepared(q, x, "reference"), q, cos_sin)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), ours) == jax.tree.map(
        lambda x: (x.shape, x.dtype), right
    )

    def logits(x):
        return (_floats(x.q_nQD) * _floats(x.logits_scale_nQ)[..., None])[:, : branches * 2 * 75]

    exact, norms = logits(right[0]), np.linalg.norm(logits(right[0]), axis=-1)
    for x, bound in zip(ours, (4e-3, 4e-2), strict=True):  # of every row
        assert np.all(np.linalg.norm(logits(x) - exact, axis=-1) <= bound * norms)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, E4M3], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("one_after_another", [True, False], ids=["rows", "listed rows"])
def test_a_window_of_plain_tokens_is_that_part(dtype, one_after_another):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 700, 128)), jnp.bfloat16)
    x = x.at[:, 600:].set(jnp.nan)
    here = dict(valid=240, dtype=dtype, scale_n=jnp.ones(2))
    cos_sin, part = angles(0, 1, 700), slice(360, 660)
    rows = (1, 2) if one_after_another else (0, 2, jnp.asarray([3, 1]))
    window, tokens = Window(Tokens(x, *rows), 360, 300), Tokens(x[:, part], *rows[:2])
    if not one_after_another:
        tokens = Tokens(x[rows[2]][:, part], 0, 2)
    ours = decode_keys(window, **here, rotation=Rotation(cos_sin, "interleaved"))
    cut = tuple(x[:, part] for x in cos_sin)
    right = decode_keys(tokens, **here, rotation=Rotation(cut, "interleaved"))
    np.testing.assert_array_equal(np.asarray(ours, np.float32)[:, :256], _floats(right)[:, :256])
    ours, right = decode_values(window, **here), decode_values(tokens, **here)
    axis = 2 if dtype == E4M3 else 1  # attention reads no further than a tile of 256 tokens
    ours, right = (_floats(y).take(range(256), axis) for y in (ours, right))
    np.testing.assert_array_equal(ours, right)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, E4M3], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("tokens, valid", [(1, 1), (300, 257), (300, 0), (256, 256)])
def test_decoding_plain_tokens_hides_what_is_not_valid(dtype, tokens, valid):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, tokens, 128)), jnp.bfloat16)
    x = x.at[:, valid:].set(jnp.nan)
    here = dict(valid=valid, dtype=dtype, scale_n=np.ones(3))
    for decode in (decode_keys, decode_values):
        ours = decode(Tokens(x, 1, 3), **here)
        right = on_cpu(
            lambda x, f=decode: f(Tokens(x, 1, 3), **here, implementation="reference"), x
        )
        read = -(-valid // 256) * 256  # attention reads no further
        axis = 2 if ours.shape[1] == 128 and decode is decode_values and dtype == E4M3 else 1
        ours, right = (np.asarray(y, np.float32).take(range(read), axis) for y in (ours, right))
        np.testing.assert_array_equal(ours, right)
