"""What LongCat's pipelines promise beyond agreeing with the reference; no vectors needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.common.attention import dense_attention
from models.longcat.condition import build_condition, view_condition
from models.longcat.config import LongCatConfig
from models.longcat.modeling import TextKV
from models.longcat.params import skeleton
from models.longcat.passes import cached_forward
from models.longcat.pipeline import LongCat, Prompt
from models.longcat.sampler import StepInput, cached_step
from models.longcat.schedule import distilled, standard
from models.longcat.segments import Segments
from models.longcat.text import kept_rows, read_text
from qvg_jax.cache.health import NonFiniteError, cache_bytes
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import identity
from tests.support.longcat_model import CONFIG, U, model, normal, prompt

TWO_STEPS = distilled(2)
KEY = jax.random.key(5)
CODEC = presets.qvg(num_centroids=4, group=12, cold_iters=2, warm_start=False, reseed=False)
GIVEN, NOISE = normal(3, 2, 2, 4, 4, 4), normal(4, 2, 2, 4, 4, 4)


def test_videos_of_a_batch_do_not_mix_and_each_has_its_guidance():
    run = functools.partial(LongCat(model()).continue_video, schedule=standard(3))
    out = run(prompt(4, 6), GIVEN, NOISE, guidance=np.asarray([4.0, 1.5]))
    assert out.shape == (2, 4, 4, 4, 4)
    np.testing.assert_array_equal(out[:, :2], GIVEN)

    def swapped(p):
        other = dict(negative_BUE=p.negative_BUE, negative_mask_BU=p.negative_mask_BU)
        return Prompt(text_BUE=p.text_BUE[::-1], mask_BU=p.mask_BU[::-1], **other)

    back = run(swapped(prompt(4, 6)), GIVEN[::-1], NOISE[::-1], guidance=np.asarray([1.5, 4.0]))
    np.testing.assert_allclose(back[::-1], out, rtol=0, atol=1e-5)
    # The second video changes in every way; the first must not notice.
    other = run(prompt(4, 3), GIVEN * [[[[[1]]]], [[[[-2]]]]], NOISE * [[[[[1]]]], [[[[3]]]]])
    np.testing.assert_allclose(other[0], out[0], rtol=0, atol=1e-5)
    same = run(prompt(4, 6), GIVEN, NOISE, guidance=4.0)
    np.testing.assert_allclose(same[0], out[0], rtol=0, atol=1e-5)
    assert np.abs(same[1] - out[1]).max() > 1e-3


def test_without_guidance_cached_is_joint_and_a_two_bit_cache_is_near():
    unguided, progress = prompt(negative=False), []
    options = dict(schedule=TWO_STEPS, guidance=1.0, key=KEY)
    run = functools.partial(LongCat.continue_video, **options)
    one = (unguided, GIVEN[:1], NOISE[:1])
    cached = run(LongCat(model()), *one, progress=lambda *c: progress.append(c[:2]))
    assert progress == [(2, 2)]
    joint = run(LongCat(model()), *one, cached=False)
    np.testing.assert_allclose(joint, cached, rtol=0, atol=1e-5)

    pipe = LongCat(model(), key_codec=CODEC, value_codec=CODEC)
    near = run(pipe, *one)
    distance = np.linalg.norm(near[:, 2:] - cached[:, 2:]) / np.linalg.norm(cached[:, 2:])
    assert 1e-5 < distance < 0.2
    np.testing.assert_array_equal(run(pipe, *one), near)


def test_an_image_stays_the_first_frame_and_decides_the_rest():
    run = functools.partial(LongCat(model()).image_to_video, prompt(negative=False))
    options = dict(schedule=TWO_STEPS, guidance=1.0)
    image = GIVEN[:1, :1]
    one, other = (run(sign * image, NOISE[:1], **options) for sign in (1, -1))
    assert one.shape == (1, 3, 4, 4, 4)
    np.testing.assert_array_equal(one[:, :1], image)
    assert np.abs(one[:, 1:] - other[:, 1:]).max() > 1e-3


def made(jaxpr):
    """Shape and dtype of everything that a program computes on its way, loops included."""
    for eqn in jaxpr.eqns:
        inner = [x for p in eqn.params.values() for x in (p if isinstance(p, tuple) else (p,))]
        for x in (getattr(x, "jaxpr", x) for x in inner):
            yield from made(x) if hasattr(x, "eqns") else ()
        yield from (v.aval for v in eqn.outvars)


def test_a_span_is_decoded_once_for_all_branches():
    given, noise = (
        jax.ShapeDtypeStruct((batch, frames, 4, 10, 14), jnp.float32)
        for batch, frames in ((1, 2), (3, 1))
    )
    coded = functools.partial(build_condition, key_codec=CODEC, value_codec=CODEC)
    cache = jax.eval_shape(coded, skeleton(CONFIG), given)
    tokens = cache.layout.span_tokens
    text = jax.ShapeDtypeStruct((2, 3, U, 2, 12), jnp.float32)
    text_kv = TextKV(text, text, jax.ShapeDtypeStruct((3, U), jnp.float32))

    def run(model, cache, x, text_kv):
        view = view_condition(CONFIG, cache, x.shape)
        return cached_forward(model, x, jnp.zeros((1, 1)), text_kv, view).out_BFZYX

    jaxpr = jax.make_jaxpr(run)(skeleton(CONFIG), cache, noise, text_kv)
    decoded = [a.shape for a in made(jaxpr.jaxpr) if {tokens, CONFIG.head_dim} <= {*a.shape}]
    assert (1, 2, tokens, CONFIG.head_dim) in decoded
    assert not any(3 in shape for shape in decoded)


def test_released_size_compresses_to_less_than_a_sixth_and_never_holds_the_whole_cache():
    config, codec = LongCatConfig.longcat_video(), presets.qvg(warm_start=False)
    given = jax.ShapeDtypeStruct((1, Segments().given_latents, 16, 60, 104), jnp.bfloat16)
    build = functools.partial(build_condition, key_codec=codec, value_codec=codec)
    jaxpr, cache = jax.make_jaxpr(build, return_shape=True)(skeleton(config), given)
    assert cache.layout.span_shape == (1, 32, 29_640, 128)
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    plain = 2 * 48 * 2 * 29_640 * 32 * 128
    assert plain == 23_309_844_480 and plain / stored > 6.8

    sizes = [a.size * a.dtype.itemsize for a in made(jaxpr) if a.size > 1]
    assert max(sizes) < plain / 10

    text = jax.ShapeDtypeStruct((48, 2, 128, 32, 128), jnp.bfloat16)
    text_kv = TextKV(text, text, jax.ShapeDtypeStruct((2, 128), jnp.float32))
    x = jax.ShapeDtypeStruct((1, 5, 16, 60, 104), jnp.float32)
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    step = StepInput(*[jax.ShapeDtypeStruct((), jnp.float32)] * 3)
    after, _ = jax.eval_shape(cached_step, skeleton(config), text_kv, one, cache, x, step)
    assert (after.shape, after.dtype) == (x.shape, x.dtype)


def test_bytes_of_a_condition_cache_are_counted_from_its_buffers():
    plain = identity(jnp.bfloat16)
    cache = build_condition(model(), GIVEN[:1], key_codec=plain, value_codec=plain)
    count = cache_bytes(cache)
    tokens = GIVEN.shape[1] * 2 * 2
    assert count.tokens == tokens
    assert count.in_use.spans == count.bf16 == 2 * 2 * 2 * tokens * CONFIG.width


def test_long_attention_in_pieces_is_the_same():
    q, k, v = (jnp.asarray(normal(i, 2, 10, 3, 4)) for i in range(3))
    bias = jnp.where(jnp.arange(10) < 8, jnp.log(1.0 + jnp.arange(10)), -jnp.inf)[None]
    bias = jnp.broadcast_to(bias, (2, 10))
    whole = dense_attention(q, k, v, bias)
    pieces = dense_attention(q, k, v, bias, logits_bytes=3 * 4 * 2 * 3 * 10)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-6)
    s = np.einsum("bthd,buhd->bhtu", q, k) / 2 + np.asarray(bias)[:, None, None]
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.einsum("bhtu,buhd->bthd", p, v), whole, rtol=0, atol=1e-5)


def test_random_weights_fill_the_skeleton():
    def shapes_of(m):
        flat = nnx.to_flat_state(nnx.state(m, nnx.Param))
        return {path: (v.shape, v.dtype) for path, v in flat}

    assert shapes_of(model()) == shapes_of(skeleton(CONFIG))
    kernel = np.asarray(model().blocks.ffn.up.kernel[...])
    assert abs(kernel.std() * CONFIG.width**0.5 - 1) < 0.05
    assert not np.array_equal(kernel[0], kernel[1])
    assert not np.array_equal(kernel, model().blocks.ffn.gate.kernel[...])
    assert (model().blocks.cross_norm.scale[...] == 1).all()
    assert not model().patch.bias[...].any()


def test_rows_of_text_that_are_kept():
    mask = np.zeros((2, 512), int)
    mask[0, :100] = mask[1, :3] = 1
    assert kept_rows(mask) == 128
    mask[1, 127] = 1
    assert kept_rows(mask) == 192  # one padded row must be left
    assert kept_rows(np.ones((1, 512), int)) == 512


def test_nan_in_given_frames_is_an_error():
    bad = GIVEN[:1].copy()
    bad[0, 0, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError):
        LongCat(model()).continue_video(
            prompt(negative=False), bad, NOISE[:1], schedule=TWO_STEPS, guidance=1.0
        )


THREE = Prompt(text_BUE=normal(0, 3, U, CONFIG.text_width), mask_BU=np.ones((3, U), int))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(given=GIVEN[:1]), r"accepted: \(2, 2, 4, 4, 4\)"),
        (dict(given=GIVEN[:, :0]), "at least 1"),
        (dict(noise=NOISE[:, :0]), "no frames"),
        (dict(guidance=[4.0, 4.0, 4.0]), r"guidance has shape \(3,\)"),
        (dict(schedule=distilled(2)), "distilled"),
        (dict(prompt=prompt(4, 6, negative=False)), "needs negative_BUE"),
        (dict(prompt=THREE), "negative"),
        (dict(prompt=THREE, guidance=1), "text_BUE has shape"),
    ],
)
def test_bad_requests_say_what_is_wrong(changes, said):
    fields = dict(prompt=prompt(4, 6), given=GIVEN, noise=NOISE) | changes
    inputs = (fields.pop("prompt"), fields.pop("given"), fields.pop("noise"))
    with pytest.raises(ValueError, match=said):
        LongCat(model()).continue_video(*inputs, **fields)


def test_bad_pairs_of_codecs_and_images_are_refused():
    with pytest.raises(ValueError, match="both"):
        LongCat(model(), key_codec=CODEC)
    with pytest.raises(ValueError, match="1 frames|accepted: 1"):
        LongCat(model()).image_to_video(prompt(4, 6), GIVEN, NOISE)


def test_bad_text_is_refused():
    text, mask = jnp.zeros((1, U, 6)), jnp.ones((1, U), int)
    for inputs, rows, said in (
        ((text[..., :5], mask), None, "text_BUE has shape"),
        ((text, mask[:, :3]), None, "mask_BU has shape"),
        ((text, mask), U + 1, "rows=8"),
        ((text,), 3, "needs mask_BU"),
    ):
        with pytest.raises(ValueError, match=said):
            read_text(model(), *inputs, rows=rows)
