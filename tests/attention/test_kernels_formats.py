"""`attend` on the kernels: which codecs and ropes they know, what they refuse, and that it compiles with them.

What e4m3 adds to the error of two bits is here too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from models.worldplay.history import side_by_side
from pallas_kernels.dequant_attention import combine_splits, prepare
from pallas_kernels.dequant_attention import reference as attention_reference
from pallas_kernels.dequantize import Scheme, Spans, decode_keys, decode_values
from qvg_jax.attention import kernels as mosaic
from qvg_jax.attention.api import attend
from qvg_jax.attention.formats import encoded as encoded_of
from qvg_jax.attention.formats import halves, pairing_of, scheme_of
from qvg_jax.cache.rope import Rope
from qvg_jax.codecs import presets
from qvg_jax.codecs.quantize.grid import grid_quantize
from tests.support.kernel_cases import (
    E4M3,
    HALF,
    INTERLEAVED,
    codecs,
    exact_attention,
    filled_cache,
    form_of_cache,
    lowered,
    positions,
    with_window_garbage,
)


def test_formats_are_recognised_by_what_decode_gives():
    want = {
        "qvg": Scheme(bits=2, group=64, offset=1, stages=1),
        "rtn": Scheme(bits=2, group=16, offset=1, stages=0),
        "midrise": Scheme(bits=2, group=128, offset=1.5, stages=1),
        "bf16": None,
    }
    for name, scheme in want.items():
        assert scheme_of(codecs()[name], 128) == scheme
    for codec in codecs()["midrise, int8 tables"]:
        assert scheme_of(codec, 128) == want["midrise"]
    bits = {n: [scheme_of(c, 128) for c in codecs()[n]] for n in ("midrise-k1v3", "midrise-1bit")}
    assert [(s.bits, s.offset) for s in bits["midrise-k1v3"]] == [(1, 0.5), (3, 3.5)]
    assert [(s.bits, s.stages) for s in bits["midrise-1bit"]] == [(1, 2)] * 2
    for codec in (grid_quantize(grid="lloyd_max"), presets.get("rtn", mode="asymmetric")):
        assert isinstance(scheme_of(codec, 128), str)
    assert "kmeans" not in scheme_of(presets.get("rtn", scale_dtype="bf16"), 128)


def test_two_heads_in_one_vector_are_two_rows_to_the_kernels():
    codec, head = side_by_side(presets.qvg(num_centroids=64)), presets.qvg(num_centroids=64)
    assert scheme_of(codec, 128, joined=2) == Scheme(bits=2, group=64, offset=1, stages=1)
    assert isinstance(scheme_of(codec, 128), str) and isinstance(scheme_of(head, 128, 2), str)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 64, 128)), jnp.bfloat16)
    packed, _ = jax.jit(codec.encode)(x, codec.init(x.shape, x.dtype))
    source = halves(packed)
    here = dict(valid=64, dtype=jnp.bfloat16, implementation="reference")
    rows = decode_keys(Spans(source, scheme_of(codec, 128, 2), 0, 4), **here)
    np.testing.assert_array_equal(rows[:, :64], codec.decode(packed)[0])


def test_ropes_are_recognised_by_what_rotate_gives():
    assert pairing_of(HALF, 128, 3) == "half"
    assert pairing_of(INTERLEAVED, 128, 3) == "interleaved"
    other = Rope(lambda p: HALF.table(p), lambda x, t: HALF.rotate(x, t) * 2)
    assert pairing_of(other, 128, 3) is None
    assert pairing_of(Rope(lambda p: p, lambda x, t: x), 128, 3) is None


@pytest.mark.parametrize("narrow", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("precompute", [True, False], ids=["tables", "no tables"])
def test_attend_compiles_inside_a_scan_over_layers_and_copies_no_codes(narrow, precompute):
    cache = form_of_cache(codecs()["midrise"])
    x, pos = jax.ShapeDtypeStruct((1, 160, 4, 128), jnp.bfloat16), positions(9, 160)
    kv = jax.ShapeDtypeStruct((1, 160, 2, 128), jnp.bfloat16)

    def model(q, cache, k, v, pos):
        view = cache.view(pos, HALF, precompute=precompute)
        read = lambda h, i: mosaic.attend_kernels(  # noqa: E731
            h, view, k, v, i, jnp.float32(0.1), narrow=narrow
        )
        return lax.scan(lambda h, i: (read(h, i), None), q, jnp.arange(3))[0]

    text = lowered(model, x, cache, kv, kv, pos)
    # Codes of one span are 2 x 320 x 32 bytes. A slice of that size, of one layer, would be a copy.
    slices = [line for line in text.splitlines() if "dynamic_slice" in line]
    assert slices and not [line for line in slices if "320x32xui8" in line.split("->")[-1]]
    assert "tensor<24x320x32xui8>" in text  # 3 layers, 4 slots, 2 heads: all of them, uncut


def test_attend_names_what_is_missing_for_a_named_kernel():
    cache = filled_cache(codecs()["qvg"], layers=1, blocks=2)
    q = jnp.zeros((1, 96, 2, 128), jnp.bfloat16)
    args = dict(positions=positions(2, 96), rope=HALF)
    with pytest.raises(ValueError, match="implementation='cuda'"):
        attend(q, cache, q, q, implementation="cuda", **args)
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="Hopper.*'xla' serves it"):
            attend(q, cache, q, q, implementation="mosaic", **args)
    view = cache.view(positions(2, 96), HALF)
    assert mosaic.unsupported(view, q, narrow=True) is None
    assert "float32" in mosaic.unsupported(view, q.astype(jnp.float32), narrow=True)
    plain = filled_cache(codecs()["bf16"], layers=1, blocks=2).view(positions(2, 96), HALF)
    assert mosaic.unsupported(plain, q, narrow=False) is None
    assert "bound" in mosaic.unsupported(plain, q, narrow=True)
    odd = filled_cache(codecs()["bf16"], layers=1, blocks=2, head_dim=96).view(None, None)
    assert "64, 128, 256" in mosaic.unsupported(odd, q, narrow=False)


def test_naming_xla_changes_nothing_and_hidden_garbage_stays_hidden():
    cache = with_window_garbage(filled_cache(codecs()["midrise"], layers=1))
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 96, 2, 128)), jnp.bfloat16)
    args = dict(positions=positions(7, 96), rope=INTERLEAVED)
    named = attend(q, cache, q, q, implementation="xla", **args)
    assert bool(jnp.isfinite(named.astype(jnp.float32)).all())
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(named, attend(q, cache, q, q, **args))


def test_e4m3_adds_little_to_the_error_of_two_bits():
    """Of attention output: less than a tenth on top (emulated; products in float32)."""
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((40, 128))
    shape = (1, 2, 1024)
    k, v = (
        jnp.asarray(centres[rng.integers(0, 40, shape)] + 0.3 * rng.standard_normal((*shape, 128)))
        .astype(jnp.bfloat16)
        for _ in range(2)
    )  # fmt: skip
    q = jnp.asarray(rng.standard_normal((2, 64, 128)), jnp.float32)
    codec = codecs()["qvg"]
    packed = [jax.jit(codec.encode)(x, codec.init(x.shape, x.dtype))[0] for x in (k, v)]
    exact = exact_attention(*(np.asarray(x, np.float32) for x in (q, k[0], v[0])))
    stored = exact_attention(
        np.asarray(q), *(np.asarray(codec.decode(p, jnp.float32)[0]) for p in packed)
    )
    scale = jnp.full(2, 2.0**-5)
    spans = [Spans(encoded_of(p), scheme_of(codec, 128), 0, 2) for p in packed]
    here = dict(valid=1024, dtype=E4M3, scale_n=scale, implementation="reference")
    keys, values = decode_keys(spans[0], **here), decode_values(spans[1], **here)
    queries = prepare(q, jnp.float32(128**-0.5), E4M3)
    state = attention_reference.empty(1, *queries.q_nQD.shape)
    state = attention_reference.segment(*queries, keys, values, 1024, scale, scale, state)
    narrow = np.asarray(combine_splits(state, 64))
    error = lambda x: np.linalg.norm(x - exact)  # noqa: E731
    assert error(narrow) < 1.1 * error(stored)
