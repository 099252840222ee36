"""Numbers of the kernels that read, without a GPU, for all head_dims.

Of decoding and of grouping queries every thread, in numpy; of attention all but the products, in Pallas's
interpreter.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequant_attention import (
    Schedule,
    combine_splits,
    prepare,
    prepare_tokens,
    visit,
)
from pallas_kernels.dequant_attention import reference as attention_reference
from pallas_kernels.dequant_attention.tuning import TUNING
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
from tests.support.kernel_cases import E4M3, FORMATS, angles, encoded
from tests.support.lane_machine import Machine
from tests.support.pallas_interpreter import interpreted_attention

DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, E4M3], ids=["bf16", "e4m3"])
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 128, 256])


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    machine.install(monkeypatch)
    return machine


def _agree(ours, right, dtype, read, axis=1):
    """As test_kernels_gpu.py bounds it, of what attention reads."""
    assert ours.shape == right.shape and ours.dtype == right.dtype
    ours, right = (np.asarray(x, np.float32).take(range(read), axis) for x in (ours, right))
    bound = 4e-3 if dtype == jnp.bfloat16 else 1.5e-2
    assert np.linalg.norm(ours - right) <= bound * np.linalg.norm(right)


AFFINE = [name for name, (scheme, _) in FORMATS.items() if scheme.affine]


@pytest.mark.parametrize(
    "name, head_dim",
    [(name, d) for name in FORMATS for d in (64, 128, 256) if name not in AFFINE]
    + [("qvg-asym", 64), ("dither", 64), ("dither", 128), ("dither", 256)]
    + [("dither-asym, 3 bits, no stage", 128), ("dither, 4 bits", 64)],
)
@DTYPES
def test_decoding_equals_the_reference(machine, name, dtype, head_dim):
    source, scheme = encoded(name, 5, 150, head_dim=head_dim)
    spans = Spans(source, scheme, 1, 2)
    here = dict(valid=140, dtype=dtype, scale_n=jnp.asarray([0.5, 4.0]))
    for pairing in ("half", "interleaved"):
        rotation = Rotation(angles(0, 4, 150, head_dim), pairing, batch=2, first=1)
        ours, right = (
            decode_keys(spans, **here, rotation=rotation, implementation=i)
            for i in ("mosaic", "reference")
        )
        _agree(ours, right, dtype, 256)
    ours, right = (decode_values(spans, **here, implementation=i) for i in ("mosaic", "reference"))
    _agree(ours, right, dtype, 256, 2 if dtype == E4M3 else 1)
    if dtype == E4M3:  # a warp meets every bank of shared memory once
        assert machine.reads == machine.writes == 1


@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("valid", [3, 1, 0])
def test_several_spans_are_decoded_behind_each_other(machine, valid, dtype, head_dim):
    tokens, slot = 112, jnp.asarray([3, 0, 2])
    source, scheme = encoded("qvg", 8, tokens, head_dim=head_dim)
    spans = Spans(source, scheme, slot * 2, 2)
    here = dict(valid=valid * tokens, dtype=dtype, scale_n=jnp.asarray([1.0, 4.0]))
    rotation = Rotation(angles(0, 4, tokens, head_dim), first=slot)
    read = -(-valid * tokens // 256) * 256
    keys, right = (
        decode_keys(spans, **here, rotation=rotation, implementation=i)
        for i in ("mosaic", "reference")
    )
    _agree(keys, right, dtype, read)
    values, right = (
        decode_values(spans, **here, implementation=i) for i in ("mosaic", "reference")
    )
    _agree(values, right, dtype, read, 2 if dtype == E4M3 else 1)


@DTYPES
@HEAD_DIMS
def test_a_window_of_plain_tokens_is_decoded(machine, dtype, head_dim):
    x = np.random.default_rng(0).standard_normal((4, 300, head_dim))
    x = jnp.asarray(x, jnp.bfloat16).at[:, 240:].set(jnp.nan)
    here = dict(valid=140, dtype=dtype, scale_n=jnp.ones(2))
    listed = Tokens(x, 0, 2, jnp.asarray([3, 1]))  # rows that do not follow one another
    turn = Rotation(angles(0, 1, 300, head_dim))
    for tokens in (Tokens(x, 1, 2), listed):
        window = Window(tokens, 100, 200)
        for decode in (decode_keys, decode_values):
            more = here | (dict(rotation=turn) if decode is decode_keys else {})
            ours, right = (
                decode(window, **more, implementation=i) for i in ("mosaic", "reference")
            )
            transposed = dtype == E4M3 and decode is decode_values
            _agree(ours, right, dtype, 256, 2 if transposed else 1)
    for rows, first in (([3, 1], listed), ([1, 2], Tokens(x, 1, 2))):
        ours, right = (
            decode_values(y, valid=140, dtype=jnp.bfloat16, implementation="reference")
            for y in (first, Tokens(x[jnp.asarray(rows)], 0, 2))
        )
        np.testing.assert_array_equal(ours[:, :140], right[:, :140])


@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("slots, valid", [(1, 1), (2, 0), (2, 1), (2, 2)])
def test_new_tokens_are_laid_behind_spans(machine, slots, valid, dtype, head_dim):
    """As (B, T, H, D), rotated, not all of them valid; what is before them stays, and zeros follow."""
    tokens, stored, new = 208, 75, 70
    source, scheme = encoded("qvg", 8, tokens, head_dim=head_dim)
    x = np.random.default_rng(1).standard_normal((2, stored, 2, head_dim))
    x = jnp.asarray(x, jnp.bfloat16).at[:, new:].set(jnp.nan)
    here = dict(scale_n=jnp.asarray([1.0, 4.0, 0.5, 2.0]))
    spans = Spans(source, scheme, jnp.asarray([4, 0]) if slots > 1 else 4, 4)
    more = dict(valid=valid * tokens, room=stored, dtype=dtype)
    at, read = valid * tokens, -(-(valid * tokens + new) // 256) * 256
    rotated = dict(rotation=Rotation(angles(0, 2, stored, head_dim), "interleaved", batch=2))
    for decode, append, rotation in (
        (decode_keys, append_keys, rotated),
        (decode_values, append_values, {}),
    ):
        axis = 2 if dtype == E4M3 and decode is decode_values else 1
        before, ours, right = [], [], []
        for implementation, after in (("mosaic", ours), ("reference", right)):
            how = dict(implementation=implementation)
            before.append(decode(spans, **here, **more, **how))
            call = here | rotation | how
            after.append(append(before[-1], jnp.int32(at), Tokens(x, 0, 4), valid=new, **call))
        _agree(ours[0], right[0], dtype, read, axis)
        ours, old = (np.asarray(y, np.float32) for y in (ours[0], before[0]))
        kept = [*range(at), *range(read, ours.shape[axis])]
        np.testing.assert_array_equal(ours.take(kept, axis), old.take(kept, axis))
        behind = np.arange(at + new, read)
        if dtype == E4M3 and decode is decode_keys:
            behind = np.asarray(key_row_of_token(read))[behind]
        assert not ours.take(behind, axis).any()


@HEAD_DIMS
@pytest.mark.parametrize("pairing", ["half", "interleaved", None])
@pytest.mark.parametrize("heads, branches, fp8", [(2, 1, True), (3, 2, True), (2, 2, False)])
def test_queries_are_rotated_and_grouped(machine, pairing, heads, branches, fp8, head_dim):
    """Two query heads for each, two videos; a row of zeros, and magnitudes far apart."""
    rng, tokens = np.random.default_rng(0), 75
    q = rng.standard_normal((2 * branches, tokens, 2 * heads, head_dim))
    q *= 10.0 ** rng.integers(-4, 5, (*q.shape[:3], 1))
    q[0, 3, 1] = 0
    rotation = pairing and Rotation(angles(0, 2, tokens, head_dim), pairing, batch=2)
    here = dict(batch=2, heads=heads, rotation=rotation, fp8=fp8)
    q, scale = jnp.asarray(q, jnp.bfloat16), jnp.float32(0.1)
    ours, right = (
        prepare_tokens(q, scale, **here, implementation=i) for i in ("mosaic", "reference")
    )
    forms = [jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (ours, right)]
    assert forms[0] == forms[1]

    def logits(x):
        q_nQD, scale_nQ = (np.asarray(y, np.float32) for y in x)
        assert np.isfinite(scale_nQ).all() and (scale_nQ > 0).all()
        return q_nQD * scale_nQ[..., None]

    exact = logits(right[0])
    norms = np.linalg.norm(exact, axis=-1)
    for x, bound in zip(ours, (4e-3, 4e-2 if fp8 else 4e-3), strict=True):  # of every row
        assert np.all(np.linalg.norm(logits(x) - exact, axis=-1) <= bound * norms)


def _attended(monkeypatch, dtype, head_dim, rows, queries, segments, splits, peeled=True):
    """The state that the kernel leaves after segments of one workspace, and the reference's output."""
    rng, tokens = np.random.default_rng(2), 512
    q = jnp.asarray(rng.standard_normal((rows, queries, head_dim)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((rows, tokens, head_dim)) + m) for m in (0, 1))
    scale = jnp.asarray([0.5, 2.0])[:rows]
    here = dict(valid=tokens, dtype=dtype, scale_n=scale, implementation="reference")
    workspace = [
        decode(Tokens(x, 0, rows), **here) for decode, x in ((decode_keys, k), (decode_values, v))
    ]
    scales = scale if dtype == E4M3 else jnp.ones(rows)
    prepared = prepare(q, jnp.float32(head_dim**-0.5), dtype)
    right = attention_reference.empty(1, *prepared.q_nQD.shape)
    for valid in segments:
        right = attention_reference.segment(*prepared, *workspace, valid, scales, scales, right)
    tuning = dataclasses.replace(TUNING[jnp.dtype(dtype).name][head_dim], peeled=peeled)
    two = dict(k_scale_n=scales, v_scale_n=scales, splits=splits, tuning=tuning)
    with interpreted_attention(monkeypatch):
        refs = [jax.new_ref(x) for x in visit(prepared, *workspace, segments[0], **two)]
        for valid in segments[1:]:
            visit(prepared, *workspace, valid, state=refs, **two)
    return [r[...] for r in refs], combine_splits(right, queries)


def _attends(ours, right, dtype):
    bound = 1e-3 if dtype == jnp.bfloat16 else 1e-2
    assert np.linalg.norm(ours - right) < bound * np.linalg.norm(right)


@DTYPES
@HEAD_DIMS
def test_attention_equals_the_reference(monkeypatch, dtype, head_dim):
    """A partial tile, a part without keys, and a second segment in the state of the first."""
    state, right = _attended(monkeypatch, dtype, head_dim, 1, 100, (300, 1), 2)
    _attends(combine_splits(state, 100), right, dtype)


# Warpgroups that miss each other at a barrier either raise an error or wait for ever.
@pytest.mark.timeout(300, method="thread")
@pytest.mark.parametrize(
    "schedule, dtype, head_dim, peeled",
    [
        (Schedule(4, 3, 2, num_sms=2), jnp.bfloat16, 64, True),
        (Schedule(4, 2, 3, num_sms=3), jnp.bfloat16, 128, True),
        (Schedule(4, 0, 3, num_sms=1), jnp.bfloat16, 256, True),
        (Schedule(4, 3, 2, num_sms=2), E4M3, 128, True),
        (Schedule(4, 2, 3, num_sms=3), jnp.bfloat16, 64, False),
        (Schedule(4, 3, 2, num_sms=2), E4M3, 256, False),
    ],
    ids=[
        "3 and 2 parts, bf16",
        "2 and 6 parts, bf16",
        "12 parts, bf16",
        "3 and 2 parts, e4m3",
        "2 and 6 parts, bf16, nothing peeled",
        "3 and 2 parts, e4m3, nothing peeled",
    ],
)
def test_pieces_one_after_another_equal_the_reference(
    monkeypatch, schedule, dtype, head_dim, peeled
):
    """First one tile, so that some pieces have none; no keys at all; odd and even numbers of tiles.

    In e4m3 every piece is a CTA of its own, and the state between visits is bf16.
    """
    assert schedule.ctas < schedule.pieces
    segments = (50, 0, 300, 512)
    state, right = _attended(monkeypatch, dtype, head_dim, 2, 200, segments, schedule, peeled)
    assert state[0].dtype == (jnp.float32 if dtype == jnp.bfloat16 else jnp.bfloat16)
    _attends(combine_splits(state, 200, schedule), right, dtype)
