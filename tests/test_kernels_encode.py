"""Encoding kernels without a GPU: in Pallas' interpreter against their references, and compiled.

The interpreter has no products with an operand in registers: `multiply_into` is replaced by the
same product written down. Numbers on a GPU are in test_kernels_encode_gpu.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kmeans import kmeans_sums, mosaic_gpu
from pallas_kernels.kmeans.api import parts_for
from pallas_kernels.kmeans.mosaic_gpu import Tuning
from pallas_kernels.quantize_pack import Integers, Midrise, assign_and_pack, assign_and_subtract
from tests.kernel_cases import clustered


@pytest.fixture
def interpreted(monkeypatch):
    def product(acc, left, right):
        return acc + jnp.dot(left.astype(jnp.float32), right[...].astype(jnp.float32))

    monkeypatch.setattr(mosaic_gpu, "multiply_into", product)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def _lowered(f, *args) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


# -- k-means


@pytest.mark.parametrize(
    "tokens, clusters, parts, late", [(300, 256, 2, True), (100, 40, 1, False)]
)
def test_sums_equal_the_reference(interpreted, tokens, clusters, parts, late):
    """A partial last tile, fewer centroids than the table holds, several blocks per row."""
    x, c = clustered(2, tokens, clusters)
    right = kmeans_sums(x, c, scores=True, implementation="xla")
    ours = kmeans_sums(x, c, scores=True, parts=parts, tuning=Tuning(late=late))
    np.testing.assert_array_equal(ours.ids_RT, right.ids_RT)
    np.testing.assert_array_equal(ours.number_RK, right.number_RK)
    np.testing.assert_allclose(ours.total_RKD, right.total_RKD, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.score_RT, right.score_RT, rtol=2**-14, atol=1e-6)
    assert int(right.number_RK.sum()) == 2 * tokens


def test_a_token_of_zeros_finds_the_centroid_at_zero(interpreted):
    """Its score is zero, which has no bits to spare for a centroid's number."""
    x, c = clustered(1, 64, 20)
    x, c = x.at[0, 5].set(0), c.at[0, 7].set(0)
    assert int(kmeans_sums(x, c, scores=True).ids_RT[0, 5]) == 7


def test_not_finite_tokens_show_in_the_sums():
    """What the codec relies on to find them without a pass of its own."""
    x, c = clustered(2, 100, 30)
    sums = kmeans_sums(x.at[1, 3, 4].set(jnp.nan), c, implementation="xla")
    np.testing.assert_array_equal(jnp.isfinite(sums.total_RKD).all((1, 2)), [True, False])


def test_blocks_fill_the_gpu():
    assert parts_for(32, 29_640) == 4 and parts_for(12, 37_440) == 11
    assert parts_for(1, 1) == 1 and parts_for(400, 128) == 1


# -- the last pass


@pytest.mark.parametrize(
    "form",
    [
        Integers(2, 64),
        Integers(4, 16),
        Midrise(2, 0.9957, 2, recode=True),
        Midrise(1, 1.5958, 1, recode=False),
    ],
    ids=str,
)
def test_packing_equals_the_reference(interpreted, form):
    x, c = clustered(1, 140, 256)
    x = x.at[0, 9].set(c[0, 3])  # nothing is left of it
    x = x.at[0, 10].set(c[0, 4] + 2.0**-9)  # a scale among e4m3's smallest
    right = assign_and_pack(x, c, form, implementation="xla")
    ours = assign_and_pack(x, c, form)
    np.testing.assert_array_equal(ours[0], right[0])
    assert (np.asarray(ours[1]) != np.asarray(right[1])).mean() < 1e-3  # ties
    if isinstance(form, Integers):
        np.testing.assert_array_equal(ours[2], right[2])
    else:
        np.testing.assert_allclose(ours[2], right[2], rtol=1e-5, atol=1e-7)


def test_the_residual_equals_the_reference(interpreted):
    x, c = clustered(1, 128, 100)
    for ours, right in zip(
        assign_and_subtract(x, c), assign_and_subtract(x, c, implementation="xla"), strict=True
    ):
        assert ours.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(right, np.float32))


def test_kernels_compile_to_gpu_code():
    x, c = clustered(2, 300, 256)
    assert "mosaic_gpu" in _lowered(lambda x, c: kmeans_sums(x, c, scores=True), x, c)
    assert "mosaic_gpu" in _lowered(assign_and_subtract, x, c)
    for form in (Integers(2, 16), Integers(4, 128), Midrise(2, 1.0, 2, recode=True)):
        assert "mosaic_gpu" in _lowered(lambda x, c, f=form: assign_and_pack(x, c, f), x, c)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=jnp.zeros((2, 9, 64), jnp.bfloat16)), ValueError, r"\(2, 9, 64\)"),
        (dict(x=jnp.zeros((2, 9, 128), jnp.float32)), NotImplementedError, "float32.*'xla'"),
        (dict(c=jnp.zeros((2, 300, 128))), NotImplementedError, "300 centroids.*'xla'"),
        (dict(implementation="cuda"), ValueError, "implementation='cuda'"),
        (dict(form=Integers(3, 64)), NotImplementedError, "bits=3"),
        (dict(form=Integers(2, 4)), NotImplementedError, "group=4"),
    ],
)
def test_bad_input_is_named(change, error, message):
    x, c = clustered(2, 9, 4)
    args = dict(x=x, c=c, form=Integers(2, 64), implementation="mosaic") | change
    with pytest.raises(error, match=message):
        assign_and_pack(args["x"], args["c"], args["form"], implementation=args["implementation"])
