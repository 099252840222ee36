"""Keys that come faster than frames, several people, requests between blocks: no model needed."""

import threading
import types

import numpy as np
import pytest

from qvg_jax.app.play.drawings import chart, svg_map
from qvg_jax.app.play.keys import Keys
from qvg_jax.app.play.player import Player
from qvg_jax.app.play.walk import Meter, Seen


def test_the_newest_press_wins_and_is_taken_once():
    keys = Keys()
    for action in "wdsa":
        keys.press("me", action)
        keys.release("me", action)
    assert [keys.next(), keys.next()] == ["a", None]


def test_a_key_that_stays_down_goes_on_and_the_last_one_counts():
    keys = Keys()
    keys.press("me", "w")
    assert [keys.next() for _ in range(3)] == ["w", "w", "w"]
    keys.press("you", "d")
    assert [keys.next(), keys.next()] == ["d", "d"]
    keys.release("you", "d")
    assert keys.next() == "w"
    keys.press("you", "s")
    keys.leave("you")  # the press that waits is still theirs to have
    assert [keys.next(), keys.next()] == ["s", "w"]
    keys.clear()
    assert keys.next() is None


class SlowWalk:
    """Looks like a `Walk`; a block takes until `go` is released."""

    def __init__(self, tour_blocks=2):
        truth = lambda seed, x: np.full((1, 2, 2, 3), seed, np.uint8)  # noqa: E731
        self.world = types.SimpleNamespace(
            tour_blocks=tour_blocks, truth=truth, block_frames=4, views=None, toward=None
        )
        self.go = threading.Semaphore(tour_blocks)
        self.taken, self.codec, self.broken, self.error = [], "bf16", None, None
        self.restart(0)

    def restart(self, seed):
        self.seed, self.blocks, self.broken = seed, 0, None

    def tour(self):
        while self.blocks < self.world.tour_blocks:
            yield self.step(None)

    def step(self, action):
        assert self.go.acquire(timeout=20)
        if self.error:
            self.error, error = None, self.error
            raise error
        self.taken.append(action)
        self.blocks += 1
        meter = Meter(10_000_000, 40_000_000, 2.5, 4 * self.blocks, 0, 100)
        frames = np.zeros((1, 2, 2, 3), np.uint8)
        return Seen(self.blocks - 1, action, frames, meter, 0.1, (self.blocks, 0.0), None)

    def switch(self, codec):
        if codec == "zip":
            raise ValueError("codec='zip' is not known")
        self.codec = codec
        return Meter(20_000_000, 40_000_000, 8.0, 4 * self.blocks, 0, 100)

    def frames(self):
        return list(range(self.blocks))


class Listener:
    """Counts what a player tells, and waits for it."""

    def __init__(self):
        self.told, self.player, self._changed = [], None, threading.Condition()

    def __call__(self, seen):
        with self._changed:
            self.told.append((seen, self.player.phase))
            self._changed.notify()

    def wait(self, condition):
        with self._changed:
            assert self._changed.wait_for(condition, timeout=20), self.told


@pytest.fixture
def playing():
    """playing(walk) -> (player, listener) after the tour."""
    players = []

    def playing(walk):
        listener = Listener()
        listener.player = player = Player(walk, listener, tour_seconds=0)
        players.append((walk, player))
        player.start()
        listener.wait(lambda: player.phase == "ready")
        return player, listener

    yield playing
    for walk, player in players:
        walk.go.release(1000)
        player.close()
        player.close()  # a second time does nothing


def test_keys_during_a_block_leave_one_press(playing):
    walk = SlowWalk()
    player, listener = playing(walk)
    assert walk.taken == [None, None] and listener.told[0] == (None, "starting")
    player.press("me", "w")
    player.release("me", "w")
    for action in "sdsdsdsda":  # the block of "w" is not over yet, or has not begun
        player.press("me", action)
        player.release("me", action)
    walk.go.release(20)
    listener.wait(lambda: walk.taken[-1] == "a")
    player.frames().result(timeout=20)  # between two blocks: nothing more comes
    assert walk.taken in ([None, None, "w", "a"], [None, None, "a"])
    assert player.seen.action == "a" and player.truth.max() == 0


def test_a_tab_that_closes_lets_go(playing):
    walk = SlowWalk()
    player, listener = playing(walk)
    player.press("tab 1", "w")
    walk.go.release(3)
    listener.wait(lambda: len(walk.taken) == 5)
    player.leave("tab 1")
    walk.go.release(1)  # the block that had begun
    assert player.frames().result(timeout=20) == list(range(6))
    player.press("tab 2", "d")
    player.release("tab 2", "d")
    walk.go.release(5)
    listener.wait(lambda: walk.taken[-1] == "d")
    assert walk.taken == [None, None, "w", "w", "w", "w", "d"]


def test_requests_come_between_blocks_and_errors_go_to_who_asked(playing):
    walk = SlowWalk()
    player, listener = playing(walk)
    player.press("me", "w")
    refused, done = player.switch("zip"), player.switch("qvg")
    player.release("me", "w")
    walk.go.release(5)
    with pytest.raises(ValueError, match="zip"):
        refused.result(timeout=20)
    done.result(timeout=20)
    listener.wait(lambda: walk.taken[-1] == "w")
    listener.wait(lambda: player.phase == "ready")
    assert [p.codec for p in player.points if p.meter.span_bits == 8] == ["qvg"]
    assert walk.codec == "qvg" and ("busy" in [phase for _, phase in listener.told])


def test_a_new_world_forgets_keys_and_history(playing):
    walk = SlowWalk()
    player, listener = playing(walk)
    player.press("me", "w")
    walk.go.release(1)
    listener.wait(lambda: len(player.points) == 3)
    done = player.restart(7)
    walk.go.release(3)  # one more block may have begun
    done.result(timeout=20)
    listener.wait(lambda: player.phase == "ready" and walk.seed == 7)
    taken = len(walk.taken)
    walk.go.release(5)
    assert player.frames().result(timeout=20) == [0, 1]  # the tour again, and no "w"
    assert len(walk.taken) == taken and [p.real for p in player.points] == [True, True]


@pytest.mark.parametrize("error", [ValueError("NaN"), RuntimeError("no memory")])
def test_an_error_ends_the_walk_with_a_word(playing, error, caplog):
    walk = SlowWalk()
    player, listener = playing(walk)
    walk.error = error
    player.press("me", "w")
    walk.go.release(1)
    listener.wait(lambda: player.phase == "ended")
    assert str(error) in player.word and "new world" in player.word and caplog.records
    player.press("me", "d")  # does nothing
    assert player.frames().result(timeout=20) == [0, 1]
    walk.go.release(9)
    player.restart(1).result(timeout=20)
    listener.wait(lambda: player.phase == "ready")
    assert walk.taken == [None] * 4


def test_closing_cancels_what_was_asked(playing):
    walk = SlowWalk()
    player, listener = playing(walk)
    player.press("me", "w")
    asked = player.frames()
    threading.Timer(0.2, walk.go.release).start()
    player.close()
    assert asked.done() and player.frames().cancelled()


def test_drawings(playing):
    walk = SlowWalk()
    player, listener = playing(walk)
    player.switch("qvg").result(timeout=20)
    player.press("me", "w")
    walk.go.release(1)
    listener.wait(lambda: len(player.points) == 4)
    bf16, now = chart(player.points)["series"]
    assert (bf16["data"][-1], now["data"][-1]) == ([3, 40.0], [3, 10.0])
    assert now["data"][1:3] == [[2, 10.0], [2, 20.0]]
    marks = [(m["xAxis"], m["label"]["formatter"]) for m in now["markLine"]["data"]]
    assert marks == [(2, "qvg")]
    assert svg_map([]).startswith("<svg") and svg_map(player.points).count("<polyline") == 2
