"""Features of attend against dense attention in float64: masks, soft-cap, learned sinks, log-sum-exp, no new keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qvg_jax as qvg
from qvg_jax.attention import choice
from qvg_jax.attention.cudnn import Workspaces, attend_cudnn
from qvg_jax.attention.features import features_of
from tests.attention.test_attention import ROPE, filled
from tests.support.cache_model import query

TOKENS = 5
SMALL = Workspaces(dense_bytes=1024, span_bytes=1536, parts=3)  # several calls, as in test_cudnn
RNG = np.random.default_rng(0)
LENGTHS = np.array([3, 5])
MASK = RNG.random((2, 4, TOKENS, TOKENS)) < 0.6
SINKS = jnp.asarray([0.5, -2.0, 3.0, 0.0])


def seen_by(causal=False, mask=None, lengths=None, rows=2):
    """Which new keys are seen, written out, bool (B, Hq, T, T)."""
    seen = np.ones((rows, 4, TOKENS, TOKENS), bool)
    for i in range(TOKENS):
        for j in range(TOKENS):
            seen[:, :, i, j] &= not causal or j <= i
            for row in range(rows):
                seen[row, :, i, j] &= lengths is None or j < lengths[row]
    return seen if mask is None else seen & mask


@functools.partial(jax.jit, static_argnames=("by", "causal", "softcap", "return_lse"))
def ours(q, view, k, v, by, **features):
    if by == "xla":
        return qvg.attend(q, view, k, v, layer=1, **features)
    asked = features_of(q.shape[:3], **features)
    call = (q, view, k, v, jnp.int32(1), jnp.float32(q.shape[-1] ** -0.5))
    out, lse = attend_cudnn(*call, asked, backend="xla", workspaces=SMALL)
    return (out, lse) if asked.return_lse else out


CASES = {
    "causal": dict(causal=True),
    "mask of a head": dict(mask=MASK),
    "mask of a row": dict(mask=MASK[:, 0]),
    "mask for all": dict(mask=MASK[0, 0]),
    "lengths": dict(lengths=LENGTHS),
    "causal with lengths": dict(causal=True, lengths=LENGTHS),
    "all masks": dict(causal=True, mask=MASK, lengths=LENGTHS),
    "learned sinks": dict(sink_logits=SINKS),
    "causal with learned sinks": dict(causal=True, sink_logits=SINKS),
    "soft-cap": dict(softcap=0.7),
    "everything": dict(causal=True, mask=MASK, lengths=LENGTHS, sink_logits=SINKS, softcap=0.7),
}


@pytest.fixture(scope="module", params=["", "aaaacaac"])
def history(request):
    return filled(request.param, batch=2)


QUICK = {("causal", "xla"), ("everything", "xla"), ("all masks", "cudnn")}
BOTH = [
    (n, by) for n in CASES for by in ("xla", "cudnn") if by == "xla" or "softcap" not in CASES[n]
]


@pytest.mark.parametrize(
    "name, by", [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in BOTH]
)
def test_features_equal_dense_attention(history, name, by):
    features = CASES[name]
    cache, model = history
    q, k, v, pos = query(7, cache.layout, heads=4, tokens=TOKENS)
    out, lse = ours(q, cache.view(pos, ROPE), k, v, by, **features, return_lse=True)
    masks = {n: x for n, x in features.items() if n in ("causal", "mask", "lengths")}
    if name == "mask of a row":
        masks["mask"] = MASK[:, :1]
    others = {n: x for n, x in features.items() if n in ("softcap", "sink_logits")}
    want, want_lse = model.attend_lse(q, k, v, 1, pos, ROPE, seen=seen_by(**masks), **others)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("by", ["xla", "cudnn"])
def test_branches_have_masks_of_their_own(by):
    cache, model = filled("aaaacaac", batch=2)
    q, k, v, pos = query(7, cache.layout, heads=4, tokens=TOKENS)
    lengths, twice = np.array([3, 5, 1, 4]), [jnp.concatenate([x, 2 * x]) for x in (q, k, v)]
    mask = np.concatenate([MASK, MASK[::-1]])
    features = dict(lengths=lengths, mask=mask, sink_logits=SINKS, causal=True)
    out = ours(twice[0], cache.view(pos, ROPE), *twice[1:], by, **features)
    for i, half in enumerate(np.split(np.arange(4), 2)):
        seen = seen_by(causal=True, mask=mask[half], lengths=lengths[half])
        qkv = [(1 + i) * x for x in (q, k, v)]
        want = model.attend_lse(*qkv, 1, pos, ROPE, seen=seen, sink_logits=SINKS)[0]
        np.testing.assert_allclose(out[half], want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("by", ["xla", "cudnn"])
@pytest.mark.parametrize("steps", ["", "aaaacaac"])
def test_without_new_keys_the_cache_alone_is_read(steps, by):
    cache, model = filled(steps, batch=2)
    q, k, v, pos = query(7, cache.layout, heads=4, tokens=TOKENS)
    none = k[:, :0]
    k, v = (None, None) if by == "xla" else (none, none)
    out, lse = ours(q, cache.view(pos, ROPE), k, v, by, sink_logits=SINKS, return_lse=True)
    want = model.attend_lse(q, none, none, 1, pos, ROPE, sink_logits=SINKS)
    np.testing.assert_allclose(out, want[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, want[1], rtol=2e-5, atol=2e-5)


def test_a_query_that_sees_nothing_gives_zero():
    cache, _ = filled("")
    q, k, v, pos = query(7, cache.layout, tokens=TOKENS)
    nothing = np.zeros((TOKENS, TOKENS), bool)
    out, lse = qvg.attend(q, cache.view(pos, ROPE), k, v, layer=0, mask=nothing, return_lse=True)
    assert not np.asarray(out).any() and np.isneginf(lse).all()


def test_padding_may_hold_nan():
    cache, model = filled("aaaacaac", batch=2)
    q, k, v, pos = query(7, cache.layout, heads=4, tokens=TOKENS)
    behind = np.arange(TOKENS)[None, :] >= LENGTHS[:, None]
    bad_k, bad_v = (jnp.where(behind[..., None, None], jnp.nan, x) for x in (k, v))
    want = model.attend_lse(q, k, v, 1, pos, ROPE, seen=seen_by(lengths=LENGTHS))[0]
    for by in ("xla", "cudnn"):
        out = ours(q, cache.view(pos, ROPE), bad_k, bad_v, by, lengths=LENGTHS)
        np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


def test_a_long_causal_block_is_masked_piece_by_piece(monkeypatch):
    monkeypatch.setattr("qvg_jax.attention.xla.SPAN_CHUNK_TOKENS", 2)
    cache, model = filled("aaaac", batch=2)
    q, k, v, pos = query(7, cache.layout, heads=4, tokens=TOKENS)
    out = qvg.attend(q, cache.view(pos, ROPE), k, v, layer=1, causal=True, mask=MASK)
    seen = seen_by(causal=True, mask=MASK)
    want = model.attend_lse(q, k, v, 1, pos, ROPE, seen=seen)[0]
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


def test_no_tokens_give_no_output():
    cache, _ = filled("a")
    q, k, v, pos = query(7, cache.layout, heads=4, tokens=0)
    out, lse = qvg.attend(
        q, cache, k, v, layer=0, positions=pos, rope=ROPE, return_lse=True, causal=True
    )
    assert out.shape == (1, 0, 4, 8) and lse.shape == (1, 0, 4)


def test_two_calls_merge_by_their_log_sum_exp():
    """The use of the log-sum-exp: attention to other keys, which the cache does not hold, joins in."""
    cache, model = filled("aaaacaac")
    q, k, v, pos = query(7, cache.layout)
    half = [(k[:, :1], v[:, :1]), (k[:, 1:], v[:, 1:])]
    view = cache.view(pos, ROPE)
    want = model.attend(q, k, v, 1, pos, ROPE)
    first, z1 = qvg.attend(
        q, view, k, v, layer=1, return_lse=True, mask=np.arange(3)[None] < np.ones((3, 1))
    )
    kr = ROPE.rotate(jnp.swapaxes(half[1][0], 1, 2), ROPE.table(pos[:, 1:]))
    qr = ROPE.rotate(jnp.swapaxes(q, 1, 2), ROPE.table(pos))
    s = jnp.einsum("bhqd,bhtd->bqht", qr, kr) / 8**0.5
    z2 = jax.nn.logsumexp(s, -1)
    second = jnp.einsum("bqht,bthd->bqhd", jax.nn.softmax(s, -1), half[1][1])
    share = jax.nn.sigmoid(z1 - z2)[..., None]
    np.testing.assert_allclose(share * first + (1 - share) * second, want, rtol=2e-5, atol=2e-5)


# --- choice ------------------------------------------------------------------------------------


def test_ways_that_cannot_serve_a_feature_say_so(monkeypatch):
    monkeypatch.setattr(choice, "no_hopper", lambda: None)
    cache = qvg.KVCache.create(
        heads=2, head_dim=64, block_tokens=4, span_blocks=2, max_spans=2, pos_dims=0
    )
    q = jnp.zeros((1, 4, 2, 64), jnp.bfloat16)
    asked = {
        "causal=True": dict(causal=True),
        "mask": dict(mask=np.ones((4, 4), bool)),
        "lengths": dict(lengths=np.array([2])),
        "sink_logits": dict(sink_logits=jnp.zeros(2)),
        "softcap=2.0": dict(softcap=2.0),
    }
    for name, features in asked.items():
        with pytest.raises(NotImplementedError, match=f"{name}: the kernels attend plainly"):
            qvg.attend(q, cache, q, q, implementation="mosaic", **features)
        assert qvg.explain(cache, q, **features).implementation == "xla"
    with pytest.raises(NotImplementedError, match="k=None: the kernels attend plainly"):
        qvg.attend(q, cache, None, None, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="softcap=2.0; cuDNN attends to plain logits"):
        qvg.attend(q, cache, q, q, implementation="cudnn", softcap=2)
    assert qvg.explain(cache, q, return_lse=True).implementation == "mosaic"
    # A single token sees itself: nothing has to be masked, and the kernels serve it.
    explained = qvg.explain(cache, q[:, :1], causal=True)
    assert explained.implementation == "mosaic"


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features, message",
    [
        (dict(mask=np.ones((3, 5), bool)), r"mask has shape \(3, 5\); accepted: \(5, 5\)"),
        (dict(mask=np.ones((3, 5, 5), bool)), r"mask has shape \(3, 5, 5\); accepted"),
        (dict(mask=np.ones((2, 3, 5, 5), bool)), r"or \(2 or 1, 4 or 1, 5, 5\)"),
        (dict(mask=np.ones((5, 5))), "mask has dtype float.*; accepted: bool"),
        (dict(lengths=np.array([1, 6])), r"lengths=\[1, 6\] are not accepted: give 0 to 5"),
        (dict(lengths=np.array([1])), r"lengths have shape \(1,\) .*; accepted: \(2,\) integers"),
        (dict(lengths=np.array([1.0, 2])), r"dtype float.*; accepted: \(2,\) integers"),
        (dict(scale=-1.0), "scale=-1.0; accepted: a positive number, or None"),
        (dict(scale=0), "scale=0; accepted: a positive number"),
        (dict(scale=float("nan")), "scale=nan; accepted: a positive number"),
        (dict(softcap=0), "softcap=0 is not accepted: give a finite number > 0"),
        (dict(softcap=jnp.float32(3)), "softcap=.* is not accepted"),
        (dict(sink_logits=jnp.zeros(2)), r"sink_logits have shape \(2,\); accepted: \(4,\)"),
    ],
)
def test_features_say_what_is_wrong(features, message):
    cache, _ = filled("a", batch=2)
    q, k, v, pos = query(3, cache.layout, heads=4, tokens=TOKENS)
    with pytest.raises(ValueError, match=message):
        qvg.attend(q, cache, k, v, positions=pos, rope=ROPE, layer=0, **features)


def test_masks_need_new_keys():
    cache, _ = filled("a")
    q, k, _, pos = query(3, cache.layout)
    view = cache.view(pos, ROPE)
    with pytest.raises(ValueError, match="k=None: causal, mask and lengths say what is seen"):
        qvg.attend(q, view, None, None, layer=0, causal=True)
    with pytest.raises(ValueError, match="k and v: one of them is None"):
        qvg.attend(q, view, k, None, layer=0)
