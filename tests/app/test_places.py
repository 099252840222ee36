"""What is remembered of a view, the way back, and the twin in bf16."""

import threading
import types

import numpy as np
import pytest

from qvg_jax.app.play.drawings import svg_map
from qvg_jax.app.play.places import Share, around, said, share
from qvg_jax.app.play.player import Player, in_memory
from qvg_jax.app.play.walk import Meter, Seen, Walk
from tests.support.fake_world import fake_world


def test_a_view_is_what_real_frames_made_frames_and_nobody_has_shown():
    left, middle = ((0, 0, 4, 8), True), ((2, 0, 6, 8), False)
    assert share((0, 0, 8, 8), [left, middle]) == Share(0.5, 0.25, 0.25)
    assert share((0, 0, 4, 8), [middle, left]) == Share(1, 0, 0)  # real frames count first
    assert share((20, 0, 28, 8), [left, middle]) == Share(0, 0, 1)
    assert around([(0, 1, 2, 3), (-1, 2, 1, 9)]) == (-1, 1, 2, 9)


@pytest.mark.parametrize(
    "part, real, kind, text",
    [
        (Share(0, 0, 1), True, "real", "real frames"),
        (Share(0, 0.05, 0.95), False, "invented", "not in the memory"),
        (Share(0.5, 0.25, 0.25), False, "mixed", "75% remembered, 25% invented"),
        (Share(0.97, 0, 0.03), False, "remembered", "remembered from real frames"),
        (Share(0.4, 0.6, 0), False, "remembered", "40% from real frames"),
        (Share(0, 1, 0), False, "remembered", "as the model invented it before"),
    ],
)
def test_what_is_said_of_a_frame(part, real, kind, text):
    assert said(part, real)[0] == kind and text in said(part, real)[1]


class Line:
    """A walk along a line: "d" is one to the right, "a" one to the left; the memory has 8 blocks."""

    def __init__(self):
        views = lambda x: [(x - 1.0, 0.0, x + 1.0, 2.0)]  # noqa: E731
        toward = lambda v, g: "d" if g[0] > v[0] else "a" if g[0] < v[0] else None  # noqa: E731
        self.world = types.SimpleNamespace(
            tour_blocks=4, truth=None, block_frames=1, views=views, toward=toward
        )
        self.codec, self.broken, self.seed, self.blocks, self.at = "qvg", None, 0, 0, -1
        self.taken = []

    def tour(self):
        yield self.step("d")

    def step(self, action):
        self.at += {"d": 1, "a": -1}[action]
        self.blocks += 1
        self.taken.append(action)
        forgotten = max(0, self.blocks - 8)
        meter = Meter(1, 2, 2.5, self.blocks - forgotten, forgotten, 8, sink=1)
        frames = np.zeros((1, 2, 2, 3), np.uint8)
        return Seen(self.blocks - 1, action, frames, meter, 0.1, (self.at, 0.0), self.at)

    def frames(self):
        return []


@pytest.fixture
def played():
    """played(walk) -> (player, until) after the tour; until(condition) waits for it."""
    players, changed = [], threading.Condition()

    def told(_):
        with changed:
            changed.notify()

    def until(condition):
        with changed:
            assert changed.wait_for(condition, timeout=60)

    def played(walk):
        players.append(player := Player(walk, told, tour_seconds=0))
        player.start()
        until(lambda: player.phase == "ready")
        return player, until

    yield played
    for player in players:
        player.close()


def test_the_way_back_goes_over_the_places_of_the_walk_and_a_key_ends_it(played):
    walk = Line()
    player, until = played(walk)
    assert [p.share.new for p in player.points] == [1, 0.5, 0.5, 0.5]
    player.press("me", "d")
    player.release("me", "d")
    until(lambda: walk.at == 4)
    assert player.points[-1].share == Share(0.5, 0, 0.5)
    player.go_back()
    until(lambda: walk.at == 0 and not player.going_back)
    assert walk.taken == ["d"] * 5 + ["a"] * 4
    last = player.points[-1]
    assert last.share == Share(1, 0, 0) and not last.real
    # Block 1 made room; the first one, the sink, and the others are still there.
    assert [p.number for p in in_memory(player.points)] == [0, *range(2, 9)]
    drawn = svg_map(player.points)
    assert drawn.count("<rect") == 8 + 1 and drawn.count("<polyline") == 2
    player.go_back()
    player.go_back()  # a second press stops it
    player.frames().result(timeout=20)
    assert not player.going_back and walk.blocks <= 10


def test_the_twin_makes_the_same_blocks_when_there_is_time(played):
    walk = Walk(fake_world(), codec="rtn")
    player, until = played(walk)
    assert player.twin_seen is None and player.behind == 0
    for key in "da":
        before = walk.blocks
        player.press("me", key)
        player.release("me", key)
        until(lambda n=before: walk.blocks > n)
    assert player.compare(True).result(timeout=60) is True
    until(lambda: player.behind == 0)
    np.testing.assert_array_equal(player.twin_seen.frames_FHW3, player.seen.frames_FHW3)
    assert (player.twin_seen.number, player.twin_seen.action) == (3, "a")
    assert player.twin_seen.meter.span_bits == 16 > player.seen.meter.span_bits
    player.restart(5).result(timeout=60)
    until(lambda: player.phase == "ready" and player.behind == 0 and player.twin_seen is not None)
    assert player.twin_seen.action is None and player.twin_seen.number == 1
    player.compare(False).result(timeout=60)
    assert player.twin_seen is None
