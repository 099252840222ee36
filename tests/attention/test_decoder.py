"""A small decoder of these tests with its own cache, and with ours under `identity`: the same logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qvg_jax as qvg

LAYERS, HEADS, GROUP, DIM, WIDTH, VOCAB, BLOCK = 2, 2, 2, 8, 16, 32, 4
ROPE = qvg.axial_rope([qvg.frequency_ladder(DIM)])
STEPS = 9  # single tokens after the prompt


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 6)
    n = functools.partial(jax.random.normal, dtype=jnp.float32)
    return dict(
        embed=n(keys[0], (VOCAB, WIDTH)),
        q=n(keys[1], (LAYERS, WIDTH, HEADS * GROUP, DIM)) / 4,
        k=n(keys[2], (LAYERS, WIDTH, HEADS, DIM)) / 4,
        v=n(keys[3], (LAYERS, WIDTH, HEADS, DIM)) / 4,
        o=n(keys[4], (LAYERS, HEADS * GROUP, DIM, WIDTH)) / 4,
        head=n(keys[5], (WIDTH, VOCAB)) / 4,
    )


def forward(params, tokens_BT, attend, xp=jnp):
    """Logits; `attend(layer, q, k, v)` is the only place that knows of a cache."""
    h, kv = params["embed"][tokens_BT], []
    for i in range(LAYERS):
        x = h / xp.sqrt(xp.mean(h * h, -1, keepdims=True) + 1e-6)
        q, k, v = (xp.einsum("btw,whd->bthd", x, params[n][i]) for n in "qkv")
        kv.append((k, v))
        h = h + xp.einsum("bthd,hdw->btw", attend(i, q, k, v), params["o"][i])
    return h @ params["head"], [xp.stack(x) for x in zip(*kv, strict=True)]


class OwnCache:
    """The decoder's own cache, in NumPy: rotated keys of all tokens, and for each row which of them count."""

    def __init__(self, rows):
        self.k = [np.zeros((rows, 0, HEADS, DIM), np.float32)] * LAYERS
        self.v = list(self.k)
        self.counts = np.zeros((rows, 0), bool)

    def step(self, params, tokens, positions, counts):
        """Logits of new tokens; tokens that do not count are padding."""
        angle = positions[..., None, None] * np.array(qvg.frequency_ladder(DIM), np.float32)

        def turned(x):
            a, b = np.split(x, 2, -1)
            cos, sin = np.cos(angle), np.sin(angle)
            return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

        self.counts = np.concatenate([self.counts, counts], 1)
        old, new = self.counts.shape[1] - tokens.shape[1], tokens.shape[1]
        seen = np.tril(np.ones((new, old + new), bool), old)[None] & self.counts[:, None]

        def attend(i, q, k, v):
            self.k[i] = np.concatenate([self.k[i], turned(k)], 1)
            self.v[i] = np.concatenate([self.v[i], v], 1)
            k, v = (np.repeat(x[i], GROUP, 2) for x in (self.k, self.v))
            s = np.einsum("bqhd,bkhd->bhqk", turned(q), k) / DIM**0.5
            s = np.where(seen[:, None], s, -1e30)
            weights = np.exp(s - s.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            return np.einsum("bhqk,bkhd->bqhd", weights, v)

        return forward(jax.tree.map(np.asarray, params), tokens, attend, np)[0]


@functools.partial(jax.jit, static_argnames="padded")
def our_step(params, cache, tokens, positions, lengths, padded):
    """The same step with our cache: the only lines that a model changes."""
    positions = positions[..., None].astype(jnp.float32)
    view = cache.view(positions)
    lengths = lengths if padded else None

    def attend(i, q, k, v):
        return qvg.attend(q, view, k, v, layer=i, causal=True, lengths=lengths)

    logits, (k, v) = forward(params, tokens, attend)
    return logits, qvg.compress(qvg.append(cache, k, v, positions, lengths=lengths))


def run(params, cache, tokens, lengths, steps):
    """Prompts in blocks, then single tokens: both caches; returns ours and the pairs of logits that count."""
    rows, own, pairs = tokens.shape[0], OwnCache(tokens.shape[0]), []
    padded = cache.layout.blocks == "padded"
    cuts = [(i, min(i + BLOCK, int(lengths.max()))) for i in range(0, int(lengths.max()), BLOCK)]
    cuts += [(int(lengths.max()) + i, int(lengths.max()) + i + 1) for i in range(steps)]
    for begin, end in cuts:
        at = np.arange(begin, end)[None]
        prompt = begin < lengths.max()
        counts = at < lengths[:, None] if prompt else np.ones((rows, 1), bool)
        position = (
            np.broadcast_to(at, (rows, end - begin))
            if prompt
            else lengths[:, None] + (begin - lengths.max())
        )
        new = jnp.asarray(tokens[:, begin:end])
        theirs = own.step(params, np.asarray(new), position, counts)
        ours, cache = our_step(
            params, cache, new, jnp.asarray(position), jnp.asarray(counts.sum(1)), padded
        )
        pairs.append((np.asarray(ours)[counts], np.asarray(theirs)[counts]))
    return cache, pairs


def decoder_cache(**settings):
    plain = qvg.identity("f32")
    sizes = dict(layers=LAYERS, heads=HEADS, head_dim=DIM, block_tokens=BLOCK, span_blocks=2)
    codecs = dict(key_codec=plain, value_codec=plain, dtype=jnp.float32)
    more = dict(max_spans=2, keep_recent=0, pos_dims=1, rope=ROPE)
    return qvg.KVCache.create(**(sizes | codecs | more | settings))


def test_prompt_in_blocks_then_single_tokens(params):
    """Ten tokens of prompt do not end at a block's border, and spans are compressed on the way."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 10 + STEPS))
    cache = decoder_cache(batch=2, blocks="partial")
    cache, pairs = run(params, cache, tokens, np.array([10, 10]), STEPS)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert int(cache.tokens) == 19 and int(cache.num_spans) == 1 and int(cache.filled) == 3
    assert our_step._cache_size() <= 4  # blocks of 4, the rest of a prompt, single tokens


def test_prompts_of_different_lengths(params):
    """Padding lies in sink, spans and window; no query sees it."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, 11 + STEPS))
    cache = decoder_cache(batch=3, blocks="padded")
    lengths = np.array([11, 3, 6])
    cache, pairs = run(params, cache, tokens, lengths, STEPS)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.row_tokens, lengths + STEPS)
    assert int(cache.num_spans) == 2 and int(cache.tokens) == 20
