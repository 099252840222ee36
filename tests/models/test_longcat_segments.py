"""Long videos of LongCat: segments that go on from each other, their noise, and pixels as bytes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.longcat.pipeline import LongCat
from models.longcat.schedule import continuation, distilled, standard
from models.longcat.segments import (
    Segments,
    first_clip,
    from_bytes,
    long_video,
    segment_keys,
    segment_noise,
    to_bytes,
)
from qvg_jax.codecs import presets
from tests.support.longcat_model import model, prompt

TWO_STEPS = distilled(2)
KEY = jax.random.key(5)
CODEC = presets.qvg(num_centroids=4, group=12, cold_iters=2, warm_start=False, reseed=False)


class Pixels(nnx.Module):
    """A VAE without weights: every fourth frame, at half the size, in the first three channels."""

    config = SimpleNamespace(spatial_stride=2, temporal_stride=4, latent_channels=4)

    def encode(self, video):
        B, T, C, Y, X = video[:, ::4].shape
        small = video[:, ::4].reshape(B, T, C, Y // 2, 2, X // 2, 2).mean((4, 6))
        return jnp.pad(small, ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))

    def decode(self, latents):
        large = jnp.repeat(jnp.repeat(latents[:, :, :3], 2, axis=3), 2, axis=4)
        return jnp.tanh(jnp.concatenate([large[:, :1], jnp.repeat(large[:, 1:], 4, axis=1)], 1))


class Listening(LongCat):
    """Remembers what every segment started from."""

    def continue_video(self, prompt, given, noise, **options):
        self.heard = [*getattr(self, "heard", []), (np.asarray(given), np.asarray(noise))]
        return super().continue_video(prompt, given, noise, **options)


SHORT = Segments(frames=13, num_cond_frames=5)
RUN = dict(key=KEY, segments=SHORT, schedule=TWO_STEPS, guidance=1.0)


def test_runs_with_and_without_compression_share_their_noise_in_every_segment():
    vae, words = Pixels(), prompt(negative=False)
    clip = first_clip(LongCat(model()), vae, words, height=8, width=8, **RUN)
    assert clip.shape == (1, 13, 8, 8, 3) and clip.dtype == np.uint8
    plain = Listening(model())
    coded = Listening(model(), key_codec=CODEC, value_codec=CODEC)
    done = []
    videos = [
        list(long_video(p, vae, words, clip, count=3, progress=lambda *c: done.append(c), **RUN))
        for p in (plain, coded)
    ]
    assert done == [(1, 3), (2, 3), (3, 3)] * 2
    assert [v.shape for v in videos[0]] == [(1, 8, 8, 8, 3)] * 3
    assert SHORT.video_frames(3) == clip.shape[1] + sum(v.shape[1] for v in videos[0])
    arms = zip(plain.heard, coded.heard, strict=True)
    for i, ((given, noise), (other_given, other_noise)) in enumerate(arms):
        np.testing.assert_array_equal(noise, other_noise)
        assert np.array_equal(given, other_given) == (i == 0)
        assert noise.shape == (1, 2, 4, 4, 4)
    noises = [noise for _, noise in plain.heard]
    assert np.abs(noises[0] - noises[1]).max() > 1 and np.abs(noises[1] - noises[2]).max() > 1
    # The clip that a segment goes on from is the end of the one before, through bytes.
    tail = videos[0][0][:, -5:]
    np.testing.assert_allclose(plain.heard[1][0], vae.encode(from_bytes(tail)), atol=1e-6)


def test_streams_of_randomness_are_apart():
    keys = [jax.random.key_data(k) for i in range(3) for k in segment_keys(KEY, i)]
    assert len({tuple(k.tolist()) for k in keys}) == 6
    noise = segment_noise(KEY, 1, (1, 4, 4, 4, 4))
    assert abs(float(noise.std()) - 1) < 0.1


def test_bytes_are_cut_off():
    video = jnp.asarray([-2, -1, -0.001, 0.0, 0.9999, 1]).reshape(1, 1, 1, 1, 6).repeat(3, axis=2)
    assert to_bytes(video)[0, 0, 0, :, 0].tolist() == [0, 0, 127, 127, 254, 255]
    frames = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, axis=-1)
    assert np.abs(to_bytes(from_bytes(frames)).astype(int) - frames).max() <= 1


def test_numbers_of_the_released_runs():
    paper = Segments()
    assert (paper.latent_frames, paper.given_latents, paper.new_frames) == (24, 19, 20)
    demo = Segments(num_cond_frames=13)
    assert (demo.given_latents, demo.new_frames) == (4, 80)
    assert paper.video_frames(10) == 293
    assert (standard().steps, continuation().steps, distilled().steps) == (50, 56, 16)
    assert continuation().timesteps[-10:].tolist() == list(range(500, 0, -50))


CLIP = np.zeros((1, 13, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("clip", "changes", "said"),
    [
        (CLIP[:, :4], {}, "4 frames; a segment goes on from num_cond_frames=5"),
        (CLIP[:, :, :7], {}, "multiples of 2"),
        (CLIP.astype(np.float32), {}, "accepted: uint8"),
        (CLIP, dict(count=None), "one prompt and a count"),
        (CLIP, dict(prompts=[prompt()] * 3), "count=2 with 3 prompts"),
    ],
)
def test_bad_long_videos_fail_before_anything_runs(clip, changes, said):
    fields = dict(prompts=prompt(), count=2) | RUN | changes
    with pytest.raises(ValueError, match=said):
        long_video(LongCat(model()), Pixels(), clip_BTYX3=clip, **fields)


def test_bad_numbers_of_frames_and_steps_are_refused():
    for sizes in (
        dict(frames=92),
        dict(num_cond_frames=72),
        dict(num_cond_frames=93),
        dict(frames=0),
    ):
        with pytest.raises(ValueError, match=next(iter(sizes))):
            Segments(**sizes)
    for make in (standard, continuation, distilled):
        with pytest.raises(ValueError, match="steps=0"):
            make(0)
    with pytest.raises(ValueError, match="steps=51"):
        distilled(51)
    with pytest.raises(ValueError, match="multiples of 2"):
        first_clip(LongCat(model()), Pixels(), prompt(), height=7, width=8, **RUN)
