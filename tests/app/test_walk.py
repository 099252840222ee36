"""Walking through pocket world, without a page: frames, codec switches, a bounded memory, NaN."""

import dataclasses

import av
import jax
import numpy as np
import pytest

from models.pocket_world import job, pipeline
from models.pocket_world import walk as pocket_walk
from models.pocket_world.entry import Options, WalkOptions
from qvg_jax.app.job import lockstep
from qvg_jax.app.play.walk import Walk
from qvg_jax.cache.health import NonFiniteError
from tests.support.tiny_world import as_in_its_own_process, random_weights

TOUR, CODEC = 48, "midrise-k1v3"  # one span is compressed at the end of the tour


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with as_in_its_own_process(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(random_weights(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def world(weights):
    return pocket_walk.walk(WalkOptions(weights=weights, tour=TOUR, memory=64))


def walked(walk, actions):
    """The frames of the tour and of a list of actions; "=NAME" is a switch."""
    frames = [seen.frames_FHW3 for seen in walk.tour()]
    for action in actions.split():
        if action[0] == "=":
            walk.switch(action[1:])
        else:
            frames.append(walk.step(action).frames_FHW3)
    return np.concatenate(frames)


def test_the_frames_are_those_of_generate(weights, world, tmp_path):
    actions = "w d up s down stay a"
    walk = Walk(world, seed=5, codec=CODEC)
    got = walked(walk, actions)
    path = ",".join(f"{a}-4" for a in actions.split())
    request = Options(weights=weights, tour=TOUR, seed=5, actions=path, codec=CODEC)
    request = dataclasses.replace(request, out=str(tmp_path))
    run = job.prepare(request)
    made = list(lockstep(dataclasses.replace(run, arms=run.arms[1:])))  # without bf16
    np.testing.assert_array_equal(got, np.concatenate([m.frames[CODEC] for m in made]))
    meter, size = walk.meter(), made[-1].bytes[CODEC]
    assert (meter.bf16_bytes, meter.bytes) == (size.bf16, size.in_use.total)
    assert meter.frames == TOUR + 4 * 7 and meter.forgotten == 0


@pytest.mark.slow
def test_an_endless_walk_recalls_what_made_room(weights, tmp_path, monkeypatch):
    """One span in sight of two: the frames are those of generate, and not those of a walk that forgets."""
    tour, seed = 100, 8  # at the end of this tour its first span is nearer than its second
    options = WalkOptions(weights=weights, tour=tour, memory=32, endless=True, recall=True)
    world = pocket_walk.walk(options)
    walk = Walk(world, seed=seed, codec=CODEC)
    got = walked(walk, "w")
    assert walk.meter().frames == len(got) - 32  # a span is out of sight
    request = Options(weights=weights, tour=tour, seed=seed, actions="w-4", codec=CODEC, memory=32)
    request = dataclasses.replace(request, endless=True, recall=True, out=str(tmp_path))
    monkeypatch.setattr(pipeline, "make_step", lambda *settings: world.step)  # compiled already
    run = job.prepare(request)
    made = list(lockstep(dataclasses.replace(run, arms=run.arms[1:])))
    np.testing.assert_array_equal(got, np.concatenate([m.frames[CODEC] for m in made]))
    forgetful = Walk(dataclasses.replace(world, before=None), seed=seed, codec=CODEC)
    assert np.any(walked(forgetful, "w")[-4:] != got[-4:])


def test_the_same_keys_and_switches_give_the_same_frames(world, caplog):
    walk = Walk(world, seed=2, codec=CODEC)
    first = walked(walk, "w w =rtn")
    with caplog.at_level("WARNING"), jax.log_compiles():
        first = np.concatenate([first, walk.step("d").frames_FHW3, walk.step("a").frames_FHW3])
    # The person who switches waits for the compiler, and not the one who presses a key.
    assert [r for r in caplog.records if "Compiling" in r.message] == []
    assert walk.codec == "rtn"
    again = Walk(world, seed=2, codec=CODEC)
    np.testing.assert_array_equal(walked(again, "w w =rtn d a"), first)
    np.testing.assert_array_equal(again.frames(), first)
    again.restart(3)
    assert again.meter().frames == 0 and again.frames() == [] and again.codec == "rtn"
    assert np.any(next(again.tour()).frames_FHW3 != first[:4])


def test_a_switch_shows_at_once_and_goes_on(world):
    walk = Walk(world, seed=2, codec="bf16")
    walked(walk, "w")
    before = walk.meter()
    assert before.times_smaller == pytest.approx(1, abs=0.02) and before.span_bits == 16
    after = walk.switch(CODEC)
    assert after == walk.meter() and after.span_bits < 2.4
    assert after.bf16_bytes == before.bf16_bytes and after.frames == before.frames
    assert after.bytes < 0.6 * before.bytes and after.bits < 9
    # bf16 spans lose nothing, so this is the walk that had the codec from the start.
    rest = [walk.step(a).frames_FHW3 for a in ("d", "s")]
    straight = Walk(world, seed=2, codec=CODEC)
    whole = walked(straight, "w d s")
    np.testing.assert_allclose(np.concatenate(rest), whole[-8:], atol=1)
    assert walk.switch(CODEC) == straight.meter()  # to the codec that is in use


@pytest.mark.parametrize("codec", ["zip", "qvg:mood=1", "midrise-k1v3:num_centroids=9999"])
def test_a_codec_that_is_not_accepted_changes_nothing(world, codec):
    walk = Walk(world, seed=2, codec=CODEC)
    walked(walk, "w")
    before = walk.meter()
    with pytest.raises(ValueError, match="accepted|accept"):
        walk.switch(codec)
    assert walk.codec == CODEC and walk.meter() == before
    assert walk.step("w").meter.frames == before.frames + 4


def test_unknown_actions_and_seeds(world):
    walk = Walk(world, codec=CODEC)
    with pytest.raises(ValueError, match="'jump'.*accepted: w, s, a, d, up"):
        walk.step("jump")
    with pytest.raises(ValueError, match="seed=-1"):
        walk.restart(-1)
    assert walk.blocks == 0 and walk.step("w").number == TOUR // 4  # takes the tour first


def test_a_full_memory_forgets_its_oldest_frames(world):
    walk = Walk(world, seed=1, codec=CODEC)
    capacity = walk.meter().capacity
    seen = [walk.step("wdsa"[i // 3 % 4]) for i in range(24)]
    meters = [s.meter for s in seen]
    assert max(m.frames for m in meters) <= capacity and meters[-1].forgotten >= 32
    assert all(
        m.frames + m.forgotten == 4 * (s.number + 1) for m, s in zip(meters, seen, strict=True)
    )
    assert walk.broken is None
    assert np.isfinite(seen[-1].place).all() and seen[0].frames_FHW3.std() > 0


def test_nan_ends_the_walk_with_a_word_and_a_restart_heals_it(world, tmp_path):
    def inputs(seed, actions):
        poisoned = []
        taken = (poisoned.append(a) or a for a in actions)
        for x in world.inputs(seed, taken):
            bad = poisoned and poisoned[-1] == "up"
            yield dataclasses.replace(x, pose=x.pose * np.float32("nan")) if bad else x

    walk = Walk(dataclasses.replace(world, inputs=inputs), codec=CODEC)
    walked(walk, "w")
    with pytest.raises(NonFiniteError, match=f"block {TOUR // 4 + 1} is not finite"):
        walk.step("up")
    for again in (lambda: walk.step("w"), lambda: walk.switch("bf16")):
        with pytest.raises(NonFiniteError, match="the walk has ended: .*; restart it"):
            again()
    assert walk.save(tmp_path / "walk.mp4") == TOUR + 4  # the frames before it
    walk.restart(0)
    assert walk.step("w").meter.frames == TOUR + 4


def test_the_clip_has_every_frame_enlarged(world, tmp_path):
    walk = Walk(world, seed=4, codec=CODEC)
    with pytest.raises(ValueError, match="no frame"):
        walk.save(tmp_path / "walk.mp4")
    frames = walked(walk, "d d")
    assert walk.save(tmp_path / "walk.mp4") == len(frames)
    with av.open(str(tmp_path / "walk.mp4")) as file:
        assert file.streams.video[0].average_rate == world.fps
        shown = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
    assert shown.shape == (len(frames), 64 * 8, 96 * 8, 3)
    middle = shown[:TOUR, 4::8, 4::8].astype(int)
    assert np.abs(middle - frames[:TOUR]).mean() < 5


def test_the_truth_of_a_tour_is_the_tour(world):
    walk = Walk(world, seed=4, codec=CODEC)
    seen = next(walk.tour())
    np.testing.assert_allclose(world.truth(4, seen.x).astype(int), seen.frames_FHW3, atol=1)


@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(seed=2**31), f"seed={2**31}"),
        (dict(weights="nowhere.safetensors"), "missing or corrupt"),
        (dict(steps=0), "steps=0"),
    ],
)
def test_bad_requests(weights, changes, part):
    with pytest.raises(ValueError, match=part):
        pocket_walk.walk(WalkOptions(**(dict(weights=weights) | changes)))
