"""Formats, packed rows and caches for the kernel tests, on any device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dequantize import Encoded, Scheme
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.rope import Encodings, Rope, axial_rope, frequency_ladder
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import Codec
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.quantize.grid import grid_quantize
from qvg_jax.codecs.smoothing import kmeans_smoothing

E4M3 = jnp.float8_e4m3fn


def rope_of(pairing: str, head_dim: int) -> Rope:
    """RoPE by three coordinates."""
    small = head_dim // 3 // 2 * 2
    sizes = (head_dim - 2 * small, small, small)
    return axial_rope([frequency_ladder(n) for n in sizes], pairing=pairing)


HALF, INTERLEAVED = (rope_of(pairing, 128) for pairing in ("half", "interleaved"))
MIDRISE = chain(kmeans_smoothing(64), grid_quantize())

# Codecs whose encoding the kernels can do.
ENCODERS = {
    "qvg": lambda: presets.get("qvg", num_centroids=64),
    "qvg-pro": lambda: presets.get("qvg-pro", num_centroids=32, stages=2, iters=3, cold_iters=3),
    "plain, 4 bits": lambda: presets.get(
        "qvg", num_centroids=64, bits=4, reseed=False, warm_start=False, cold_iters=2
    ),
    "midrise keys": lambda: presets.pair("midrise", num_centroids=64)[0],
    "midrise values": lambda: presets.pair("midrise", num_centroids=64)[1],
    "1 bit keys": lambda: presets.pair("midrise-k1v3", num_centroids=64)[0],
    "dither keys": lambda: presets.pair("dither", num_centroids=64)[0],
    "dither-asym values": lambda: presets.pair("dither-asym", num_centroids=64)[1],
    "qvg-asym": lambda: presets.get("qvg-asym", num_centroids=64),
    "dither keys, learned from half": lambda: presets.pair("dither", num_centroids=16, subsample=2)[
        0
    ],
}

# name: scheme of 128 channels, and extra fields of the rows
FORMATS = {
    "qvg": (Scheme(bits=2, group=64, offset=1, stages=1), ()),
    "qvg-pro": (Scheme(bits=2, group=16, offset=1, stages=4), ()),
    "rtn, 4 bits": (Scheme(bits=4, group=16, offset=7, stages=0), ()),
    "midrise": (Scheme(bits=2, group=128, offset=1.5, stages=1), ("exponents", "int8")),
    "midrise, 1 bit, two stages": (
        Scheme(bits=1, group=128, offset=0.5, stages=2),
        ("exponents", "int8"),
    ),
    "midrise, 3 bits": (Scheme(bits=3, group=128, offset=3.5, stages=1), ("exponents", "int8")),
    "3 bits, integers": (Scheme(bits=3, group=16, offset=3, stages=0), ()),
    "8 bits": (Scheme(bits=8, group=64, offset=127.5, stages=1), ()),
    "midrise, e4m3 tables": (Scheme(bits=4, group=128, offset=7.5, stages=2), ("e4m3",)),
    "qvg-asym": (Scheme(bits=2, group=64, offset=0, stages=1, zero_points=True), ()),
    "dither": (
        Scheme(2, 128, 2 - 1 / 128, 1, dithered=True, deviations=True),
        ("exponents", "int8"),
    ),
    "dither-asym, 3 bits, no stage": (
        Scheme(3, 128, 4 - 1 / 128, 0, dithered=True, zero_points=True, deviations=True),
        ("exponents",),
    ),
    "dither, 4 bits": (Scheme(4, 128, 8 - 1 / 128, 2, dithered=True), ()),
}


def encoded(
    name: str, rows: int, tokens: int, seed: int = 0, head_dim: int = 128
) -> tuple[Encoded, Scheme]:
    """Random packed rows of a format: every byte value of codes and scales that can occur.

    Of a format with one scale for a token of 128 channels, tokens of other widths have one too.
    """
    scheme, extra = FORMATS[name]
    if scheme.group == 128:
        scheme = dataclasses.replace(scheme, group=head_dim)
    rng = np.random.default_rng(seed)
    s, k = scheme.stages, 64
    integers = lambda low, high, *shape: jnp.asarray(rng.integers(low, high, shape))  # noqa: E731
    tables, steps = jnp.asarray(rng.standard_normal((rows, s, k, head_dim)), jnp.bfloat16), None
    if "int8" in extra:
        tables = integers(-127, 128, rows, s, k, head_dim).astype(jnp.int8)
        steps = jnp.asarray(rng.uniform(0.01, 0.03, (rows, s, head_dim)), jnp.bfloat16)
    if "e4m3" in extra:
        tables = jax.lax.bitcast_convert_type(tables.astype(E4M3), jnp.uint8)
        steps = integers(-2, 3, rows, s).astype(jnp.int8)
    exponents = integers(-3, 1, rows).astype(jnp.int8) if "exponents" in extra else None
    form = (rows, tokens, head_dim // scheme.group)
    zeros = integers(0, 2, *form) * 128 + integers(0, 0x40, *form)
    deviations = jnp.asarray(rng.uniform(0.2, 2, (rows, head_dim)), jnp.bfloat16)
    return Encoded(
        codes_RTC=integers(0, 256, rows, tokens, head_dim * scheme.bits // 8).astype(jnp.uint8),
        scales_RTG=integers(0, 0x40, rows, tokens, head_dim // scheme.group).astype(jnp.uint8),
        ids_RST=integers(0, k, rows, s, tokens).astype(jnp.uint8) if s else None,
        centroids_RSKD=tables if s else None,
        exponents_R=exponents,
        steps_RS=steps,
        zeros_RTG=zeros.astype(jnp.uint8) if scheme.zero_points else None,
        deviations_RD=deviations if scheme.deviations else None,
    ), scheme


def on_cpu(f, *args):
    """f(*args) computed on the CPU, where a reference compiles in a fraction of a GPU's time."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return f(*jax.device_put(args, cpu))


def lowered(f, *args) -> str:
    """The GPU program of f as text; Mosaic infers layouts and checks shared memory on the way."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def exact_attention(q, k, v) -> np.ndarray:
    """Attention of queries (n, Q, 128) to keys and values (n, T, 128), by numpy."""
    s = np.einsum("nqd,ntd->nqt", q, k) / 128**0.5
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("nqt,ntd->nqd", p / p.sum(-1, keepdims=True), v)


def angles(seed: int, rows: int, tokens: int, head_dim: int = 128) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of random angles, (rows, tokens, head_dim / 2)."""
    form = (rows, tokens, head_dim // 2)
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi, form)
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


def filled_cache(
    codec, *, layers=2, heads=2, head_dim=128, block=96, blocks=7, **settings
) -> KVCache:
    """A cache as after `blocks` blocks: sink, two spans of two blocks, and a window.

    Spans hold random bytes that could have been encoded: compiling k-means takes longer than the tests.
    """
    if isinstance(codec, Codec):
        codec = (codec, codec)
    settings = dict(sink_blocks=1, span_blocks=2, max_spans=3, keep_recent=1) | settings
    cache = KVCache.create(
        layers=layers, heads=heads, head_dim=head_dim, block_tokens=block, pos_dims=3,
        key_codec=codec[0], value_codec=codec[1], **settings,
    )  # fmt: skip
    lay, rng = cache.layout, np.random.default_rng(1)
    spans = max(0, (blocks - lay.sink_blocks - lay.keep_recent) // lay.span_blocks)
    spans = min(spans, lay.max_spans)
    dense = blocks - spans * lay.span_blocks
    k, v = (_random_dense(x, dense * block, rng) for x in (cache.dense_k, cache.dense_v))
    near = {}
    if lay.own_window:
        for name in ("near_k", "near_v"):
            near[name] = _random_dense(getattr(cache, name), lay.near_blocks * block, rng)
        at = [*range(lay.sink_blocks), *range(blocks - lay.history.local_blocks, blocks)]
        at = jnp.concatenate([positions(i, block) for i in at], 1)
        near["near_pos"] = jnp.broadcast_to(at, cache.near_pos.shape)
    # As in a video: the sink is oldest, the window newest.
    old = [lay.sink_blocks + i for i in range(spans * lay.span_blocks)]
    new = [i for i in range(blocks) if i not in old]
    dense_pos, span_pos = (np.zeros(x.shape, np.float32) for x in (cache.dense_pos, cache.span_pos))
    if new:
        dense_pos[:, : dense * block] = np.concatenate([positions(i, block) for i in new], 1)
    for slot in range(spans):
        here = old[slot * lay.span_blocks : (slot + 1) * lay.span_blocks]
        span_pos[slot] = np.concatenate([positions(i, block) for i in here], 1)
    return dataclasses.replace(
        cache, dense_k=k, dense_v=v, dense_pos=jnp.asarray(dense_pos),
        span_k=_random_packed(cache.span_k, rng), span_v=_random_packed(cache.span_v, rng),
        span_pos=jnp.asarray(span_pos), dense_blocks=jnp.int32(dense), num_spans=jnp.int32(spans),
        seen_blocks=jnp.int32(blocks), **near,
    )  # fmt: skip


def _random_dense(like, tokens, rng) -> jax.Array:
    x = np.zeros(like.shape, jnp.bfloat16)
    x[..., :tokens, :] = rng.standard_normal(x[..., :tokens, :].shape)
    return jnp.asarray(x)


def _random_packed(slots, rng):
    """The packed spans of a codec that knows codes, e4m3 scales and centroids, with random bytes."""
    leaves, form = jax.tree_util.tree_flatten_with_path(slots)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    clusters = {x.shape[-2] for n, (_, x) in zip(names, leaves, strict=True) if "centroids" in n}

    def fill(name, x):
        if ".ids_" in name:
            return rng.integers(0, max(clusters), x.shape)
        if "bytes_x" in name:  # e4m3
            signed = rng.standard_normal(x.shape) * 0.7 if "centroids" in name else None
            value = rng.uniform(0.1, 0.5, x.shape) if signed is None else signed
            return np.asarray(value, np.float32).astype(E4M3).view(np.uint8)
        if "steps" in name and x.dtype != jnp.int8:
            return rng.uniform(0.005, 0.01, x.shape)
        if "deviations" in name:
            return rng.uniform(0.3, 1.5, x.shape)
        if x.dtype == jnp.int8:
            low, high = (-127, 128) if "centroids" in name else (-2, 2)
            return rng.integers(low, high, x.shape)
        if x.dtype == jnp.uint8:
            return rng.integers(0, 256, x.shape)
        return rng.standard_normal(x.shape)

    filled = [
        jnp.asarray(np.asarray(fill(name, x)).astype(x.dtype))
        for name, (_, x) in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(form, filled)


def positions(i: int, block: int) -> jax.Array:
    t = i * block + np.arange(block)
    return jnp.asarray(np.stack([t // 16, t % 16 // 4, t % 4], -1)[None], jnp.float32)


@functools.cache
def encodings() -> Encodings:
    """Two encodings: k rotated under both pairings, and v beside v rotated."""

    def both(a_BHTD, b_BHTD):
        return jnp.stack([a_BHTD, b_BHTD], 2).reshape(a_BHTD.shape[0], -1, *a_BHTD.shape[2:])

    return Encodings(
        HALF.table,
        lambda k, t: both(HALF.rotate(k, t), INTERLEAVED.rotate(k, t)),
        lambda v, t: both(v, INTERLEAVED.rotate(v, t)),
        2,
        lambda t: (jnp.float32(2**0.5), jnp.float32(2**0.5)),
    )


def codecs() -> dict:
    """Codecs whose bytes the kernels read."""
    return {
        "qvg": presets.get("qvg", num_centroids=64),
        "rtn": presets.get("rtn"),
        "midrise": MIDRISE,
        "midrise, int8 tables": presets.pair("midrise", num_centroids=64),
        "midrise-k1v3": presets.pair("midrise-k1v3", num_centroids=64),
        "midrise-1bit": presets.pair("midrise-1bit", num_centroids=64),
        "qvg-asym": presets.get("qvg-asym", num_centroids=64, group=64),
        "dither": presets.pair("dither", num_centroids=64),
        "dither-asym": presets.pair("dither-asym", num_centroids=64),
        "bf16": presets.get("bf16"),
    }


def with_window_garbage(cache: KVCache) -> KVCache:
    """The cache with NaN wherever its dense buffer holds nothing."""
    used = cache.dense_blocks * cache.layout.block_tokens
    hidden = jnp.arange(cache.dense_k.shape[3]) >= used
    fill = lambda x: jnp.where(hidden[None, None, None, :, None], jnp.nan, x)  # noqa: E731
    return dataclasses.replace(
        cache, dense_k=fill(cache.dense_k).astype(jnp.bfloat16),
        dense_v=fill(cache.dense_v).astype(jnp.bfloat16),
    )  # fmt: skip


def clustered(rows: int, tokens: int, clusters: int):
    """Tokens (R, T, D) around centres and slightly wrong centroids (R, K, D), both bf16."""
    rng = np.random.default_rng(tokens)
    centres = rng.standard_normal((rows, clusters, 128))
    picks = rng.integers(0, clusters, (rows, tokens))
    x = np.take_along_axis(centres, picks[..., None], 1)
    x = x + 0.3 * rng.standard_normal((rows, tokens, 128))
    c = centres + 0.1 * rng.standard_normal(centres.shape)
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(c, jnp.bfloat16)


def encoded_twice(codec: Codec, implementation: str | None, tokens: int = 300):
    """Two spans encoded one after the other: [(span, packed, state), ...]."""
    x = clustered(2, 2 * tokens, 64)[0][None]
    state, out = codec.init((1, 2, tokens, 128), x.dtype), []
    encode = jax.jit(functools.partial(codec.encode, implementation=implementation))
    for span in (x[:, :, :tokens], x[:, :, tokens:]):
        packed, state = encode(span, state)
        out.append((span, packed, state))
    return out


def round_trip_error(codec: Codec, case) -> float:
    span, packed, *_ = case
    decoded = codec.decode(packed, jnp.float32)
    return float(jnp.linalg.norm(decoded - span) / jnp.linalg.norm(span.astype(jnp.float32)))


def difference(a, b) -> float:
    """The relative difference |a - b| / |b|."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def form_of_cache(codec: Codec) -> KVCache:
    """Shapes of a cache of three layers, two heads and four slots of 320 tokens."""
    return jax.eval_shape(
        lambda: KVCache.create(
            layers=3, heads=2, head_dim=128, block_tokens=160, sink_blocks=1, span_blocks=2,
            max_spans=4, keep_recent=1, key_codec=codec, value_codec=codec,
        )
    )  # fmt: skip
