"""Trellis codes, signs per token, tokens by energy: definitions, bytes, edges, and what they are for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_jax.cache.operations import KVCache
from qvg_jax.codecs import presets
from qvg_jax.codecs.accounting import packed_bytes
from qvg_jax.codecs.base import identity
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.quantize import (
    by_energy,
    grid_quantize,
    heads_as_channels,
    heads_as_tokens,
    trellis_quantize,
)
from qvg_jax.codecs.quantize.trellis import _windows
from qvg_jax.codecs.quantize.trellis_levels import ERRORS, trellis_levels
from qvg_jax.codecs.quantize.viterbi import cheapest_path, closed_path
from qvg_jax.codecs.smoothing import rotation
from qvg_jax.codecs.smoothing.rotation import token_signs
from qvg_jax.codecs.transform_codec import transform_codec
from qvg_jax.sharding import attend_by_heads

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Level 0: each program runs once or twice here, so that compile time is what counts.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tokens(seed, shape=(1, 2, 24, 32), spread=0.6):
    """Normal channels, token sizes that differ, float32."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, spread, (*shape[:3], 1)))
    return jnp.asarray(rng.normal(0, 1, shape) * size, jnp.float32)


def code(codec, x):
    packed, _ = jit(codec.encode)(x, codec.init(x.shape, x.dtype))
    assert packed_bytes(packed) == codec.nbytes(x.shape)
    return packed, np.asarray(jit(codec.decode, static_argnums=1)(packed, jnp.float32))


def energy(x):
    return float((np.asarray(x, np.float64) ** 2).sum())


# The cheapest path.


@pytest.mark.parametrize(("memory", "bits"), [(3, 1), (3, 2), (2, 2)])
def test_no_path_is_cheaper(memory, bits):
    rng, states = np.random.default_rng(memory), 2**memory
    levels = rng.normal(0, 1, states).astype(np.float32)
    x = rng.normal(0, 1, (6, 4)).astype(np.float32)
    kept = states >> bits
    for starts in (None, rng.integers(0, kept, 6)):
        got = cheapest_path(x, levels, bits, None if starts is None else jnp.asarray(starts))
        for n in range(6):
            best = np.inf
            for start in range(kept) if starts is None else [starts[n]]:
                for codes in itertools.product(range(2**bits), repeat=4):
                    s, path = int(start), []
                    for c in codes:
                        s = (s << bits | c) % states
                        path.append(s)
                    if starts is None or s % kept == starts[n]:
                        best = min(best, ((x[n] - levels[path]) ** 2).sum())
            path = np.asarray(got)[n]
            assert ((x[n] - levels[path]) ** 2).sum() == pytest.approx(best, rel=1e-5)
            assert all(b >> bits == a % kept for a, b in itertools.pairwise(path))


@pytest.mark.parametrize("bits", ERRORS)
def test_a_closed_path_is_what_the_bytes_of_a_ring_say(bits):
    x = np.random.default_rng(bits).normal(0, 1, (7, 32)).astype(np.float32)
    path = np.asarray(jit(closed_path, static_argnums=2)(x, trellis_levels(bits), bits))
    kept = 256 >> bits
    np.testing.assert_array_equal(path >> bits, np.roll(path, 1, axis=1) % kept)
    stream = np.unpackbits((path % 2**bits).astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
    codes = np.packbits(stream.reshape(7, -1), axis=-1)
    np.testing.assert_array_equal(_windows(jnp.asarray(codes), bits), path)


# The quantizer.


@pytest.mark.parametrize("bits", ERRORS)
def test_error_of_normal_tokens(bits):
    x = tokens(1, (1, 1, 200, 128))
    _, hat = code(trellis_quantize(bits, gain="lsq"), x)
    assert energy(x - hat) / energy(x) == pytest.approx(ERRORS[bits], rel=0.1)
    if bits <= 4:
        _, scalar = code(grid_quantize(bits, gain="lsq"), x)
        assert energy(x - hat) < 0.82 * energy(x - scalar)


def test_gain_makes_the_inner_product_right():
    x = tokens(2, (1, 1, 300, 128))
    for gain, power in (("lsq", 0), ("match", 1), (0.5, 0.5)):
        packed, hat = code(trellis_quantize(2, gain=gain), x)
        along = float((np.asarray(x) * hat).sum()) / energy(x)
        assert along == pytest.approx((1 - ERRORS[2]) ** (1 - power), rel=0.01)
    np.testing.assert_array_equal(packed.codes_BHTC, code(trellis_quantize(2), x)[0].codes_BHTC)


def test_levels_are_centred_and_distinct():
    for bits, error in ERRORS.items():
        levels = trellis_levels(bits)
        assert levels.shape == (256,) and abs(levels.mean()) < 0.2
        assert abs((levels**2).mean() - 1) < 0.35 and error > 0.25**bits


THREE_BITS = trellis_quantize(3)  # one codec, so that all powers share its programs


@pytest.mark.parametrize("power", [-60, 9, 100])
def test_a_power_of_two_changes_no_code(power):
    x = tokens(3)
    one, hat = code(THREE_BITS, x)
    other, scaled = code(THREE_BITS, x * jnp.float32(2.0**power))
    np.testing.assert_array_equal(one.codes_BHTC, other.codes_BHTC)
    np.testing.assert_array_equal(hat * np.float32(2.0**power), scaled)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trellis_quantize(6), "bits=6 is not accepted: give 1 to 5"),
        (lambda: trellis_quantize(3, gain="none"), "gain='none' is not accepted"),
        (lambda: trellis_quantize(3, gain="best"), "gain='best' is not accepted"),
        (
            lambda: trellis_quantize(3).nbytes((1, 1, 4, 20)),
            "head_dim=20 is not accepted at bits=3",
        ),
        (lambda: trellis_quantize(4).nbytes((1, 1, 4, 8)), "head_dim=8 is not accepted"),
        (lambda: rotation(signs="head"), "signs='head' is not accepted"),
        (lambda: by_energy(identity(), identity(), 1.5), "share=1.5 is not accepted: give 0 to 1"),
    ],
)
def test_what_is_not_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Signs per token.


def test_signs_are_the_hash():
    def mix(h):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ h >> shift) * factor % 2**32
        return h ^ h >> 16

    got = np.asarray(token_signs(50, 40, seed=7))[0, 0]
    want = [
        [1 - 2 * (mix((t * 2 + d // 32 + 7 * 2654435761) % 2**32) >> d % 32 & 1) for d in range(40)]
        for t in range(50)
    ]
    np.testing.assert_array_equal(got, want)
    many = np.asarray(token_signs(512, 128, seed=0))[0, 0]
    assert abs(many.mean()) < 0.02
    likeness = many @ many.T / 128 - np.eye(512)
    assert abs(likeness).max() < 0.6  # no two tokens have nearly the same signs


@pytest.mark.parametrize("signs", ["span", "token"])
def test_a_rotation_is_undone(signs):
    x = tokens(4)
    turn = rotation(seed=3, signs=signs)
    node, y, _ = turn.encode(x, turn.init(x.shape, x.dtype))
    np.testing.assert_allclose(turn.decode(node, y), x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose((y**2).sum(3), (x**2).sum(3), rtol=1e-5)


def test_errors_of_equal_tokens_average_out_only_with_signs_per_token():
    one = np.random.default_rng(5).normal(0, 1, (1, 1, 1, 128))
    x = jnp.asarray(np.tile(one, (1, 1, 256, 1)), jnp.float32)
    left = {}
    for signs in ("span", "token"):
        _, hat = code(chain(rotation(signs=signs), grid_quantize(3)), x)
        mean = hat.mean(axis=2, keepdims=True)
        left[signs] = energy(mean - one) / (energy(hat - np.asarray(x)) / 256)
    assert left["span"] == pytest.approx(1, rel=1e-3)
    assert left["token"] < 0.1


# Tokens by energy.


def test_each_token_has_the_codec_of_its_class():
    x = tokens(6, (2, 2, 21, 32), spread=1.5)
    small = grid_quantize(1)
    codec = by_energy(identity(jnp.float32), small, 0.25)
    packed, hat = code(codec, x)
    size = (np.asarray(x) ** 2).sum(3)
    large = size >= np.sort(size, axis=2)[:, :, -5, None]  # 21 / 4 = 5 of them
    np.testing.assert_array_equal(np.unpackbits(packed.large_BHC, axis=2)[:, :, :21], large)
    np.testing.assert_array_equal(hat[large], np.asarray(x)[large])
    assert packed.large.values_BHTD.shape == (2, 2, 5, 32)
    # Every token stands for itself in a grid, but for the power of two of the span's scales.
    for b, h in itertools.product(range(2), repeat=2):
        rest = x[b, h][~large[b, h]][None, None]
        np.testing.assert_array_equal(hat[b, h][~large[b, h]], code(small, rest)[1][0, 0])


def test_classes_of_two_and_four_leave_less_error_for_the_bits():
    x = tokens(7, (1, 1, 256, 64), spread=0.8)
    t = functools.partial(trellis_quantize, gain="lsq")
    one, two = t(3), by_energy(t(4), t(2))
    half, quarters = by_energy(t(4), t(3)), by_energy(by_energy(t(5), t(4)), by_energy(t(3), t(2)))
    error = [energy(x - code(c, x)[1]) for c in (one, two, half, quarters)]
    assert error[1] < 0.8 * error[0] and error[3] < 0.8 * error[2]
    bits = [c.bits_per_element(x.shape) for c in (one, two, half, quarters)]
    assert bits[1] < bits[0] + 0.02 and bits[3] < bits[2] + 0.02


@given(count=st.integers(1, 9), share=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_number_of_tokens_and_any_share(count, share):
    x = tokens(count, (1, 2, count, 16))
    codec = by_energy(identity(jnp.float32), identity(jnp.float32), share)
    packed, hat = code(codec, x)
    np.testing.assert_array_equal(hat, x)
    parts = [p.values_BHTD.shape[2] for p in (packed.large, packed.small) if p is not None]
    assert sum(parts) == count


# Heads together.


def test_heads_are_tokens_or_channels_of_one():
    x = tokens(9, (2, 3, 10, 16))
    packed, hat = code(heads_as_tokens(grid_quantize(2, group=4)), x)
    assert packed.heads == 3 and packed.packed.codes_BHTC.shape == (2, 1, 30, 4)
    want = code(grid_quantize(2, group=4), x.reshape(2, 1, 30, 16))[1]
    np.testing.assert_array_equal(hat, want.reshape(x.shape))
    packed, hat = code(heads_as_channels(grid_quantize(2)), x)
    assert packed.packed.scales_BHTG.shape == (2, 1, 10, 1)  # one scale for all heads of a token
    joined = jnp.swapaxes(x, 1, 2).reshape(2, 1, 10, 48)
    want = np.asarray(code(grid_quantize(2), joined)[1]).reshape(2, 10, 3, 16)
    np.testing.assert_array_equal(hat, np.swapaxes(want, 1, 2))


def test_a_common_budget_gives_more_to_the_larger_head():
    x = tokens(10, (1, 2, 128, 64)) * jnp.asarray([1.0, 8.0])[None, :, None, None]
    apart = by_energy(trellis_quantize(4, gain="lsq"), trellis_quantize(2, gain="lsq"))
    together = heads_as_tokens(apart)
    assert together.bits_per_element(x.shape) <= apart.bits_per_element(x.shape)
    errors = [energy(x - code(c, x)[1]) for c in (apart, together)]
    assert errors[1] < 0.5 * errors[0]
    keys = [
        transform_codec(2.0, rank=4, across_heads=across, scale_dtype="bf16")
        for across in (False, True)
    ]
    for c in keys:
        assert 2.0 - 8 / 64 < c.bits_per_element(x.shape) <= 2.0
    errors = [energy(x - code_klt(c, x)) for c in keys]
    assert errors[1] < 0.5 * errors[0]


def code_klt(codec, x):
    packed, _ = jit(codec.encode)(x, codec.init(x.shape, x.dtype))
    assert packed_bytes(packed) == codec.nbytes(x.shape)
    return np.asarray(jit(codec.decode, static_argnums=1)(packed, jnp.float32))


def test_heads_that_are_together_cannot_be_divided():
    pair = presets.pair("trellis", num_centroids=2, key_budget=2.0)
    cache = KVCache.create(
        heads=2, head_dim=128, block_tokens=64, span_blocks=1, max_spans=1, pos_dims=0,
        key_codec=pair[0], value_codec=pair[1],
    )  # fmt: skip
    q = jnp.zeros((1, 4, 2, 128), jnp.bfloat16)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match="key codec trellis keeps heads together"),
    ):
        attend_by_heads(q, cache.view(), q, q, axis="heads")


# Bad input.

WHOLE = chain(rotation(signs="token"), by_energy(trellis_quantize(3), trellis_quantize(2)))
encode_whole, decode_whole = jit(WHOLE.encode), jit(WHOLE.decode, static_argnums=1)
PLAIN = trellis_quantize(2)
encode_plain, decode_plain = jit(PLAIN.encode), jit(PLAIN.decode, static_argnums=1)


@given(
    seed=st.integers(0, 10_000),
    power=st.integers(-90, 100),
    bad=st.sampled_from([None, np.nan, np.inf, -np.inf]),
    constant=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_nothing_makes_it_fail(seed, power, bad, constant):
    rng = np.random.default_rng(seed)
    x = np.full((1, 1, 6, 16), rng.normal()) if constant else rng.normal(0, 1, (1, 1, 6, 16))
    x = np.float32(x) * np.float32(2.0**power)
    at = tuple(rng.integers(0, x.shape))
    if bad is not None:
        x[at] = bad
    y = jnp.asarray(x)
    packed, _ = encode_whole(y, WHOLE.init(y.shape, y.dtype))
    hat = np.asarray(decode_whole(packed, jnp.float32))
    assert np.isfinite(hat).all()
    # A bad entry counts as zero here: it must not hurt its token, nor any other.
    known = np.where(np.isfinite(x), x, 0)
    assert energy(hat / np.float32(2.0**power) - known / np.float32(2.0**power)) <= 0.3 * energy(
        known / np.float32(2.0**power)
    )


def test_infinities_are_large_and_nan_is_zero():
    x = np.array(tokens(8, (1, 1, 4, 16)))
    state = PLAIN.init(x.shape)
    clean = np.asarray(decode_plain(encode_plain(jnp.asarray(x), state)[0], jnp.bfloat16))
    x[0, 0, 1, 3], x[0, 0, 2, 5], x[0, 0, 3, 7] = np.inf, -np.inf, np.nan
    hat = decode_plain(encode_plain(jnp.asarray(x), state)[0], jnp.float32)
    hat, rms = np.asarray(hat)[0, 0], np.sqrt((np.where(np.isfinite(x), x, 0) ** 2).mean(3))[0, 0]
    assert hat[1, 3] > 1.5 * rms[1] and hat[2, 5] < -1.5 * rms[2] and abs(hat[3, 7]) < rms[3]
    np.testing.assert_array_equal(hat[0].astype(clean.dtype), clean[0, 0, 0])
    zero = jnp.zeros((1, 1, 4, 16))
    packed, _ = encode_plain(zero, state)
    np.testing.assert_array_equal(decode_plain(packed, jnp.bfloat16), zero)
