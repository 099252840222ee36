"""The bias of compressed keys: what attend adds, that it undoes what it should, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.pocket_world import trial
from qvg_jax.attention import xla
from qvg_jax.attention.api import attend
from qvg_jax.cache.key_bias import KeyBias
from qvg_jax.cache.operations import KVCache, append, compress
from qvg_jax.cache.rope import Encodings
from qvg_jax.cache.slots import read_slot
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import identity
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.quantize import (
    allocated_quantize,
    by_energy,
    grid_quantize,
    heads_as_tokens,
    lattice_quantize,
    residual_quantize,
    trellis_quantize,
)
from qvg_jax.codecs.smoothing import kmeans_smoothing, rotation

# Level 0: each program runs once or twice here, so that compile time is what counts.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

STRETCHING = dataclasses.replace(
    rotation(), isometric=False
)  # differences of what it leaves say nothing
CODEC = chain(kmeans_smoothing(2), grid_quantize(2, gain="lsq"))


@functools.cache
def filled():
    cache = KVCache.create(
        heads=2, head_dim=16, block_tokens=6, span_blocks=2, max_spans=2, keep_recent=1,
        sink_blocks=1, pos_dims=0, key_codec=CODEC, value_codec=identity(jnp.float32),
        dtype=jnp.float32,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(6):
        k, v = (jnp.asarray(rng.normal(0, 1, (1, 6, 2, 16)), jnp.float32) for _ in "kv")
        cache = compress(append(cache, k, v))
    assert int(cache.num_spans) == 2 and int(cache.dense_blocks) == 2
    return cache


def cache_of(bias, codec=CODEC):
    """Two spans and two blocks; a bias is part of the layout and changes nothing that is stored."""
    layout = dataclasses.replace(filled().layout, key_bias=bias, key_codec=codec)
    return dataclasses.replace(filled(), layout=layout)


def new(seed=1, heads=4):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(0, 1, (1, 6, h, 16)), jnp.float32) for h in (heads, 2, 2))


def exact(cache, q, k, v, scale):
    """softmax of all keys at once, with the bias written out."""
    lay, bias = cache.layout, cache.layout.key_bias or KeyBias()
    keys, values, extra = [], [], []
    f32 = jnp.float32
    for slot in range(2):
        packed_k, packed_v = (read_slot(x, 0, slot) for x in (cache.span_k, cache.span_v))
        keys.append(lay.key_codec.decode(packed_k, f32))
        values.append(lay.value_codec.decode(packed_v, f32))
        extra.append(lay.key_codec.deficit(packed_k))
    tokens = int(cache.dense_blocks) * lay.block_tokens
    keys += [cache.dense_k[0][:, :, :tokens], jnp.swapaxes(k, 1, 2)]
    values += [cache.dense_v[0][:, :, :tokens], jnp.swapaxes(v, 1, 2)]
    keys, values = (np.repeat(np.concatenate(x, 2), 2, axis=1) for x in (keys, values))
    q = np.asarray(jnp.swapaxes(q, 1, 2), np.float64)
    s = np.einsum("bhqd,bhtd->bhqt", q, keys) * scale
    deficit = np.repeat(np.concatenate(extra, 2), 2, axis=1)
    n = deficit.shape[2]
    square = (q**2).sum(3)[..., None]
    s[..., :n] += bias.factor * scale**2 * square * deficit[:, :, None] / 2 + bias.offset
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhqt,bhtd->bqhd", p / p.sum(-1, keepdims=True), values)


@pytest.mark.parametrize(
    ("bias", "piece"),
    [(None, 7), (KeyBias(1.5, -0.5), 7), (KeyBias(1.5, -0.5), 1024), (KeyBias(offset=0.7), 1024)],
)
def test_attend_adds_it_to_the_logits_of_spans(bias, piece, monkeypatch):
    monkeypatch.setattr(xla, "SPAN_CHUNK_TOKENS", piece)
    cache, (q, k, v) = cache_of(bias), new()
    jax.clear_caches()  # the size of a piece is not part of jit's key
    out = attend(q, cache, k, v, scale=0.6)
    np.testing.assert_allclose(out, exact(cache, q, k, v, 0.6), rtol=2e-4, atol=2e-5)


def test_it_moves_attention_and_nothing_else():
    q, k, v = new()
    plain = attend(q, cache_of(None), k, v)
    np.testing.assert_array_equal(plain, attend(q, cache_of(KeyBias()), k, v))
    gone = attend(q, cache_of(KeyBias(offset=-80.0)), k, v)
    cache = cache_of(None)
    alone = dataclasses.replace(cache, num_spans=jnp.zeros_like(cache.num_spans))
    np.testing.assert_allclose(gone, attend(q, alone, k, v), rtol=1e-5, atol=1e-6)


def spread_tokens(seed, shape=(1, 1, 400, 64)):
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 0.4, (*shape[:3], 1)))
    return jnp.asarray(rng.normal(0, 1, shape) * size, jnp.float32)


CODECS = [
    grid_quantize(2, gain="lsq"),
    grid_quantize(2, gain="match"),
    grid_quantize(1, gain=0.5),
    grid_quantize(2, gain="none"),
    trellis_quantize(2, gain="match"),
    by_energy(grid_quantize(2, gain="lsq"), grid_quantize(1, gain="lsq")),
    heads_as_tokens(grid_quantize(2, gain="lsq")),
    allocated_quantize(2.0, min_bits=1, gain=1.0),
    chain(rotation(), grid_quantize(2, gain="match")),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_deficit_is_the_variance_that_is_lost(codec):
    x = spread_tokens(2)
    packed, _ = jit(codec.encode)(x, codec.init(x.shape, x.dtype))
    hat = np.asarray(codec.decode(packed, jnp.float32), np.float64)
    told = np.asarray(codec.deficit(packed), np.float64)
    assert told.shape == x.shape[:3]
    lost = float((np.asarray(x, np.float64) ** 2).mean() - (hat**2).mean())
    error = float(((np.asarray(x) - hat) ** 2).mean())
    assert told.mean() == pytest.approx(lost, abs=0.2 * error)


def test_deficit_of_integers_is_the_step_model_of_the_paper():
    x = spread_tokens(4)
    codec = residual_quantize(2, 64)
    packed, _ = jit(codec.encode)(x, codec.init(x.shape, x.dtype))
    step = np.asarray(packed.scales_BHTG, np.float64)
    told = np.asarray(codec.deficit(packed))
    np.testing.assert_allclose(told, -(step**2).mean(3) / 12, rtol=1e-5)
    hat = np.asarray(codec.decode(packed, jnp.float32), np.float64)
    lost = float((np.asarray(x, np.float64) ** 2).mean() - (hat**2).mean())
    assert 2.5 * lost < told.mean() < 1.5 * lost < 0  # three levels are no fine grid


@pytest.mark.parametrize("gain", ["lsq", "match", 0.5])
def test_it_undoes_the_exponential_on_average(gain):
    """Of many keys the mean weight is right with the bias, and wrong on the derived side without."""
    codec = grid_quantize(1, gain=gain)
    rng = np.random.default_rng(3)
    k = jnp.asarray(rng.normal(0, 1, (1, 1, 40_000, 16)), jnp.float32)
    q = rng.normal(0, 1, 16)
    q *= 1.2 / np.linalg.norm(q)  # logits of deviation 1.2, as s q
    packed, _ = jit(codec.encode)(k, codec.init(k.shape, k.dtype))
    hat = np.asarray(codec.decode(packed, jnp.float32))[0, 0]
    bias = (q**2).sum() * np.asarray(codec.deficit(packed))[0, 0] / 2
    true = np.exp(np.asarray(k)[0, 0] @ q).mean()
    without, with_it = np.exp(hat @ q).mean() / true, np.exp(hat @ q + bias).mean() / true
    assert {"lsq": without < 0.85, "match": without > 1.25, 0.5: abs(without - 1) < 0.08}[gain]
    assert abs(with_it - 1) < max(0.1, 0.5 * abs(without - 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeyBias(np.nan), "key_bias factor=nan is not accepted: give a finite number"),
        (lambda: KeyBias(offset=True), "key_bias offset=True is not accepted"),
        (lambda: cache_of(0.5), "key_bias=0.5 is not accepted: give a KeyBias"),
        (
            lambda: cache_of(KeyBias(1.0), lattice_quantize()),
            "key codec e8-e4m3 does not tell the variance that it loses; accepted: factor=0",
        ),
        (
            lambda: cache_of(KeyBias(1.0), chain(STRETCHING, grid_quantize(2))),
            "does not tell the variance",
        ),
    ],
)
def test_what_is_not_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_kernels_and_encodings_say_that_they_do_not_add_it():
    q, k, v = new(heads=2)
    for name in ("mosaic", "mosaic_fp8", "triton"):
        with pytest.raises(
            NotImplementedError, match=f"{name[:6]}.*has a key_bias.*'xla' serves it"
        ):
            attend(q, cache_of(KeyBias(offset=-0.5)), k, v, implementation=name)
    same = lambda x, table: x  # noqa: E731
    cache = KVCache.create(
        heads=2, head_dim=16, block_tokens=6, pos_dims=1, key_codec=CODEC, span_blocks=2,
        key_bias=KeyBias(1.0),
    )  # fmt: skip
    rope = Encodings(table=lambda p: p, keys=same, values=same, copies=1)
    with pytest.raises(NotImplementedError, match="factor=1.0: Encodings change the norms"):
        attend(q, cache, k, v, rope=rope)


def test_every_preset_tells_or_refuses():
    told = {n for n in (*presets.PRESETS, *presets.PAIRS) if presets.pair(n)[0].deficit is not None}
    assert {"qvg", "rtn", "midrise", "midrise-k1v3", "klt", "bf16"} <= told
    assert not {"kivi", "kmeans-e8", "nvfp4", "trellis"} & told


def test_the_trial_reads_it_from_the_recipe(monkeypatch):
    seen = {}

    def stop(*args, **settings):
        seen.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(trial.pipeline, "make_cache", stop)
    monkeypatch.setattr(trial, "tours", lambda *a: jnp.zeros((1, 8, 3)))
    args = trial.argparse.Namespace(
        worlds=1, seeds=1, tour=8, frames=4, half_width=1.0, key=0, span_blocks=2, steps=1
    )

    class Model:
        cfg = None

    for text, want in (("qvg", None), ("qvg@1", KeyBias(1.0)), ("qvg@0@-.5", KeyBias(0.0, -0.5))):
        with pytest.raises(KeyboardInterrupt):
            trial.run(Model, text, args)
        assert seen["key_bias"] == want
