"""Bytes: formats against buffers, and the published ratios."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvg_jax.codecs import presets
from qvg_jax.codecs.accounting import bits_per_element, compression_ratio, packed_bytes
from qvg_jax.codecs.base import identity
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.quantize import residual_quantize
from qvg_jax.codecs.smoothing import kmeans_smoothing

pytestmark = pytest.mark.usefixtures("strict_dtypes")

CODECS = {
    "identity": identity(),
    "identity f32": identity(jnp.float32),
    "qvg": presets.qvg(num_centroids=16, iters=1, cold_iters=1),
    "qvg 3 bits": presets.qvg(3, 16, 32, iters=1, cold_iters=1),
    "qvg asymmetric bf16": presets.qvg(
        4, 16, 16, mode="asymmetric", scale_dtype="bf16", iters=1, cold_iters=1
    ),
    "qvg f32 centroids": presets.qvg(
        8, 16, 64, scale_dtype="f32", centroid_dtype=jnp.float32, iters=1, cold_iters=1
    ),
    "qvg-pro": presets.qvg_pro(num_centroids=16, stages=2, iters=1, cold_iters=1),
    "wide ids": presets.qvg(num_centroids=300, iters=1, cold_iters=1),
    "rtn": presets.rtn(),
    "two smoothings": chain(
        kmeans_smoothing(8, 1), kmeans_smoothing(4, 1), residual_quantize(2, 32, "asymmetric")
    ),
}


@pytest.mark.parametrize("shape", [(1, 1, 301, 64), (2, 3, 320, 192)])
@pytest.mark.parametrize("name", CODECS)
def test_bits_per_element_are_the_bytes_on_the_device(name, shape):
    codec = CODECS[name]
    x_BHTD = jnp.ones(shape, jnp.bfloat16)
    # Level 0: many programs that run once, so compile time is what counts here.
    encode = jax.jit(codec.encode, compiler_options={"xla_backend_optimization_level": 0})
    packed, _ = encode(x_BHTD, codec.init(shape))
    leaves = jax.tree.leaves(packed)
    on_device = sum(leaf.on_device_size_in_bytes() for leaf in leaves)
    assert packed_bytes(packed) == codec.nbytes(shape) == on_device
    assert codec.bits_per_element(shape) == 8 * on_device / x_BHTD.size
    assert bits_per_element(codec, shape) == codec.bits_per_element(shape)


def test_bytes_by_hand():
    # 100 tokens of 128 channels: 32 code bytes, 2 scales and 1 id a token; 16 bf16 centroids.
    codec = presets.qvg(num_centroids=16)
    assert codec.nbytes((1, 1, 100, 128)) == 100 * (32 + 2 + 1) + 16 * 128 * 2
    assert codec.nbytes((2, 3, 100, 128)) == 6 * codec.nbytes((1, 1, 100, 128))


@pytest.mark.parametrize(
    ("name", "span", "published"),
    [
        ("qvg", (29_640, 128), "6.88"),  # LongCat
        ("qvg", (37_440, 128), "6.97"),  # Self-Forcing
        ("qvg", (7_040, 256), "5.84"),  # WorldPlay
        ("rtn", (29_640, 128), "6.40"),
        ("rtn-4bit", (29_640, 128), "3.56"),
    ],
)
def test_published_ratios(name, span, published):
    assert f"{compression_ratio(presets.get(name), span):.2f}" == published
    assert f"{compression_ratio(presets.get(name), (2, 5, *span)):.2f}" == published


def test_longcat_span_in_megabytes():
    # 32 heads: 242.8 MB of bf16 become 35.3 MB.
    shape = (1, 32, 29_640, 128)
    assert f"{identity().nbytes(shape) / 1e6:.1f}" == "242.8"
    assert f"{presets.get('qvg').nbytes(shape) / 1e6:.1f}" == "35.3"


def test_packed_bytes_without_buffers():
    codec, shape = CODECS["qvg"], (1, 2, 333, 128)
    state = codec.init(shape)
    abstract, _ = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct(shape, jnp.float32), state)
    assert packed_bytes(abstract) == codec.nbytes(shape)

    seen = []
    jax.make_jaxpr(lambda p: seen.append(packed_bytes(p)))(abstract)
    assert seen == [codec.nbytes(shape)]
    assert packed_bytes({"a": np.zeros((3, 5), np.float32), "b": None}) == 60


def test_ratio_against_another_dtype():
    assert compression_ratio(identity(), (4, 8), jnp.float32) == 2
    assert compression_ratio(identity(), (4, 8)) == 1


def test_a_shape_the_codec_refuses():
    with pytest.raises(ValueError, match="num_centroids=256 is more than the 100 tokens"):
        bits_per_element(presets.get("qvg"), (100, 128))
    with pytest.raises(ValueError, match="group=64 must divide head_dim=96"):
        compression_ratio(presets.get("qvg"), (1000, 96))
