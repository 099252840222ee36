"""A cache written as plain Python lists, a softmax written out, and codecs that are exact.

The tests compare the library with these. Nothing here is clever: history is a list of arrays, and
attention is one float64 softmax over their concatenation.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvg_jax.codecs.base import Codec

SIZES = dict(layers=2, batch=1, heads=2, head_dim=8, block_tokens=3)


class CoarsePacked(NamedTuple):
    codes_BHTD: Any
    scale_BHT1: Any
    centre_BH1D: Any


def coarse(levels: int = 3) -> Codec:
    """A lossy codec whose arithmetic is exact in float32, so that every program agrees bit by bit.

    Takes out a centre, scales by a power of two (stored as e4m3), rounds to +-levels. The centre
    is the last token of the *previous* span, so the state matters; it is stored with the span,
    so decoding does not depend on later spans.
    """

    def init(shape, dtype=jnp.bfloat16):
        b, h, _, d = shape
        return jnp.zeros((b, h, 1, d), jnp.float32)

    def encode(x_BHTD, state, *, key=None):
        x = x_BHTD.astype(jnp.float32)
        residual = x - state
        exponent = jnp.frexp(jnp.abs(residual).max(-1, keepdims=True))[1]
        scale = jnp.ldexp(jnp.float32(1 / 4), jnp.clip(exponent, -4, 8))
        codes = jnp.clip(jnp.round(residual / scale), -levels, levels).astype(jnp.int8)
        return CoarsePacked(codes, scale.astype(jnp.float8_e4m3fn), state), x[:, :, -1:]

    def decode(packed, dtype=jnp.bfloat16):
        scale = packed.scale_BHT1.astype(jnp.float32)
        x = packed.codes_BHTD.astype(jnp.float32) * scale + packed.centre_BH1D
        return x.astype(dtype)

    def nbytes(shape):
        b, h, t, d = shape
        return b * h * (t * d + t + 4 * d)

    def bits_per_element(shape):
        return 8 * nbytes(shape) / np.prod(shape)

    return Codec(init, encode, decode, bits_per_element, f"coarse {levels}", nbytes)


def stamped() -> Codec:
    """Stores nothing but a number drawn from the key: shows which random stream was used."""

    def init(shape, dtype=jnp.bfloat16):
        return ()

    def encode(x_BHTD, state, *, key=None):
        return jax.random.bits(key, x_BHTD.shape[:2], jnp.uint32), state

    def decode(packed, dtype=jnp.bfloat16):
        raise NotImplementedError("stamped spans hold no values")

    return Codec(init, encode, decode, lambda shape: 0.0, "stamped", lambda shape: 0)


class ListCache:
    """The same cache in Python lists, one block an entry, for all layers at once."""

    def __init__(self, layout):
        self.layout = layout
        self.sink, self.spans, self.window = [], [], []
        self.seen = self.dropped = self.rejected = 0
        state = [c.init(layout.span_shape, jnp.bfloat16) for c in self._codecs()]
        self.states = [[s] * layout.layers for s in state]

    def _codecs(self):
        return self.layout.key_codec, self.layout.value_codec

    def append(self, k_LBTHD, v_LBTHD, pos_BTP):
        lay = self.layout
        store = [np.swapaxes(x, 2, 3).astype(jnp.bfloat16) for x in (k_LBTHD, v_LBTHD)]
        block = (*store, np.asarray(pos_BTP, np.float32))
        self.seen += 1
        if len(self.sink) < lay.sink_blocks:
            self.sink.append(block)
        elif len(self.window) < lay.window_blocks:
            self.window.append(block)
        elif lay.is_ring:
            self.window = [*self.window[1:], block]
            self.dropped += 1
        else:
            self.rejected += 1

    def compress(self):
        lay = self.layout
        if not lay.max_spans or len(self.window) < lay.span_blocks + lay.keep_recent:
            return
        if len(self.spans) == lay.max_spans:
            if lay.overflow == "error":
                return
            self.evict(1)
        old, self.window = self.window[: lay.span_blocks], self.window[lay.span_blocks :]
        decoded = []
        for i, codec in enumerate(self._codecs()):
            x_LBHTD = np.concatenate([block[i] for block in old], axis=3)
            layers = []
            for layer in range(lay.layers):
                packed, state = jax.jit(codec.encode)(x_LBHTD[layer], self.states[i][layer])
                self.states[i][layer] = state
                layers.append(np.asarray(codec.decode(packed, jnp.float32)))
            decoded.append(np.stack(layers))
        self.spans.append((*decoded, np.concatenate([block[2] for block in old], axis=1)))

    def evict(self, spans=1):
        gone = min(spans, len(self.spans))
        self.spans = self.spans[gone:]
        self.dropped += gone * self.layout.span_blocks

    def history(self, layer):
        """K, V (B, H, T, D) and positions (B, T, P) of all valid tokens, float64."""
        lay = self.layout
        parts = [*self.sink, *self.spans, *self.window]
        head = (lay.batch, lay.heads, 0, lay.head_dim)
        k, v = (
            np.concatenate(
                [np.zeros(head), *(np.asarray(p[i][layer], np.float64) for p in parts)], 2
            )
            for i in (0, 1)
        )
        pos = [np.zeros((lay.batch, 0, lay.pos_dims)), *(p[2] for p in parts)]
        return k, v, np.concatenate(pos, 1)

    def attend(self, q_BTHD, k_BTHD, v_BTHD, layer, positions=None, rope=None, scale=None):
        """One float64 softmax over the concatenated history and the new block."""
        return self.attend_lse(q_BTHD, k_BTHD, v_BTHD, layer, positions, rope, scale)[0]

    def attend_lse(
        self, q_BTHD, k_BTHD, v_BTHD, layer, positions=None, rope=None, scale=None, *,
        seen=None, softcap=None, sink_logits=None,
    ):  # fmt: skip
        """The same with the log-sum-exp, and with features.

        `seen` is bool (B, Hq, T, T), which new keys a query sees.
        """
        old_k, old_v, old_pos = self.history(layer)
        q, k, v = (np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        new = k.shape[2]
        k, v = np.concatenate([old_k, k], 2), np.concatenate([old_v, v], 2)
        if rope is not None:
            positions = np.asarray(positions, np.float32)
            q = _rotate(rope, q, positions)
            k = _rotate(
                rope, k, np.concatenate([old_pos, positions[:, :new]], 1).astype(np.float32)
            )
        group = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
        logits = np.einsum("bhqd,bhtd->bhqt", q, k) * scale
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        visible = np.ones(logits.shape, bool)
        visible[..., : old_k.shape[2]] = self.visible_history(layer)[:, None, None]
        if seen is not None:
            visible[..., old_k.shape[2] :] &= seen
        logits = np.where(visible, logits, -np.inf)
        sinks = np.full(q.shape[1], -np.inf) if sink_logits is None else np.asarray(sink_logits)
        sinks = np.broadcast_to(sinks[None, :, None, None], (*logits.shape[:3], 1))
        weights = np.concatenate([logits, sinks], 3)
        lse = np.logaddexp.reduce(weights, 3)
        weights = np.exp(weights - np.where(np.isfinite(lse), lse, 0)[..., None])[..., :-1]
        out = np.einsum("bhqt,bhtd->bhqd", weights, v)
        return np.swapaxes(out, 1, 2), np.swapaxes(lse, 1, 2)

    def visible_history(self, layer):
        """Which tokens of the history count, bool (B, T)."""
        return np.ones((self.layout.batch, self.history(layer)[0].shape[2]), bool)


def _rotate(rope, x, positions):
    # At one padded length, so that JAX compiles once and not for every length of history.
    tokens = x.shape[2]
    pad = -tokens % 64
    x = np.pad(x, [(0, 0), (0, 0), (0, pad), (0, 0)]).astype(np.float32)
    positions = np.pad(positions, [(0, 0), (0, pad), (0, 0)])
    turned = _rotate_jit(rope, jnp.asarray(x), jnp.asarray(positions))
    return np.asarray(turned, np.float64)[:, :, :tokens]


@functools.partial(jax.jit, static_argnums=0)
def _rotate_jit(rope, x, positions):
    return rope.rotate(x, rope.table(positions))


def block(seed: int, layout, scale: float = 1.0):
    """Random K, V (L, B, T, H, D) and positions (B, T, P) of block number `seed`."""
    rng = np.random.default_rng(seed)
    shape = (layout.layers, layout.batch, layout.block_tokens, layout.heads, layout.head_dim)
    k, v = (jnp.asarray((rng.normal(size=shape) * scale).astype(np.float32)) for _ in range(2))
    pos = rng.uniform(-5, 5, size=(layout.batch, layout.block_tokens, layout.pos_dims))
    return k, v, jnp.asarray(pos, jnp.float32)


def query(seed: int, layout, heads=None, tokens=None, dtype=jnp.float32):
    """Random q, k, v (B, T, H, D) and positions (B, T, P) of a new block."""
    rng = np.random.default_rng([seed, 1])
    tokens = layout.block_tokens if tokens is None else tokens
    shape = (layout.batch, tokens, heads or layout.heads, layout.head_dim)
    q = jnp.asarray(rng.normal(size=shape), dtype)
    shape = (*shape[:2], layout.heads, layout.head_dim)
    k, v = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    pos = rng.uniform(-5, 5, size=(layout.batch, tokens, layout.pos_dims))
    return q, k, v, jnp.asarray(pos, jnp.float32)
