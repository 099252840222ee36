"""A walk in a thread of its own: keys in, blocks out, and requests between two blocks.

The device makes one block at a time, and a person presses keys when they like. Rules:

- A press is one block. A key that stays down is block after block until it is let go.
- The queue is one press long and the newest wins: keys faster than frames never pile up.
- Of several keys that are down, the one pressed last counts.
- Requests (another codec, a new world) come before keys, between two blocks.
- Keys and requests may come from any number of people; the walk is one.
- The twin, the same walk with a memory in bf16, comes after keys: a press never waits for more than the
  one block of it that is under way.
- The way back is a list of places. It goes on while nobody presses a key, at the pace of the twin.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from qvg_jax.app.play.keys import Keys
from qvg_jax.app.play.places import Box, Share, around, share
from qvg_jax.app.play.twin import Twin
from qvg_jax.app.play.walk import Meter, Seen, Walk

__all__ = ["Player", "Point", "in_memory"]

ROWS = 600  # blocks of the curve and the map; the oldest go first

log = logging.getLogger(__name__)


class Point(NamedTuple):
    """One block in the history of the walk; two for a block after which the codec was changed."""

    number: int
    codec: str
    real: bool  # part of the tour
    place: tuple[float, float]
    meter: Meter
    view: Box | None = None  # ground that the block's last frame shows
    ground: Box | None = None  # ground that any of its frames shows
    share: Share | None = None  # what of its last frame was in the memory before


def in_memory(points: Sequence[Point]) -> list[Point]:
    """The points whose blocks the memory still has after the last of them."""
    if not points:
        return []
    meter = points[-1].meter
    each = (meter.frames + meter.forgotten) // (points[-1].number + 1)  # frames of a block
    forgotten = range(meter.sink, meter.sink + meter.forgotten)
    return [point for point in points if point.number * each not in forgotten]


class Player:
    """Plays a walk until it is closed.

    What there is to see is in its attributes, which change only before a call of `tell`:
    `phase` ("starting", "tour", "ready", "busy", "ended"), `word` (what to say about it), `seen`
    and `truth` (the last block), `points`, `comparing` (whether the twin follows), `twin_seen` (its
    last block), `going_back`.
    """

    def __init__(
        self,
        walk: Walk,
        tell: Callable[[Seen | None], None],
        *,
        tour_seconds: float = 0.25,
    ):
        """Starts nothing; see `start`.

        Args:
            walk: the walk; from `start` on it belongs to the player's thread.
            tell: called in that thread with each block, and with None when something else changed.
            tour_seconds: at least so long for a block of the tour, for people to see it.
        """
        self.walk = walk
        self.phase, self.word = "starting", "compiling ..."
        self.seen: Seen | None = None
        self.truth: UInt8[np.ndarray, "F H W 3"] | None = None
        self._points: collections.deque[Point] = collections.deque(maxlen=ROWS)
        self._tell, self._tour_seconds = tell, tour_seconds
        self._keys, self._requests = Keys(), collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        self.comparing = False
        self._twin: Twin | None = None
        self._actions: list[str] = []  # behind the tour
        self._goals: list[Box] = []  # of the way back, the next one last
        self._thread = threading.Thread(target=self._run, name="walk", daemon=True)

    @property
    def points(self) -> tuple[Point, ...]:
        """The history of the walk as it is now; the player's thread goes on meanwhile."""
        with self._changed:
            return tuple(self._points)

    @property
    def twin_seen(self) -> Seen | None:
        """The last block of the twin; None while there is none."""
        return self._twin.seen if self.comparing and self._twin else None

    @property
    def behind(self) -> int:
        """Blocks that the twin has still to make; 0 without one."""
        return self.walk.blocks - self._twin.blocks if self.comparing and self._twin else 0

    @property
    def going_back(self) -> bool:
        """Whether the walk is on its way back."""
        return bool(self._goals)

    def _note(self, point: Point) -> None:
        with self._changed:
            self._points.append(point)

    def start(self) -> None:
        """Compiles and takes the tour, then waits for keys."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the block that it is making."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def press(self, who: Hashable, action: str) -> None:
        """See `Keys`. Before the tour is over, and after the walk has ended, keys do nothing."""
        with self._changed:
            if self.phase in ("ready", "busy"):
                self._goals.clear()
                self._keys.press(who, action)
                self._changed.notify()

    def release(self, who: Hashable, action: str) -> None:
        """See `Keys`."""
        with self._changed:
            self._keys.release(who, action)

    def leave(self, who: Hashable) -> None:
        """See `Keys`."""
        with self._changed:
            self._keys.leave(who)

    def go_back(self) -> None:
        """Walks back along the places of the walk, newest first, or stops doing so."""
        with self._changed:
            if self._goals or self.phase not in ("ready", "busy"):
                self._goals.clear()
            elif self.walk.world.toward is not None:
                self._goals = [p.view for p in self._points if p.view is not None][:-1]
            self._changed.notify()

    def _next_back(self) -> str | None:
        """The next action of the way back; places that are reached are crossed out."""
        toward, last = self.walk.world.toward, self._points[-1].view if self._points else None
        while self._goals and toward is not None and last is not None:
            if (action := toward(last, self._goals[-1])) is not None:
                return action
            self._goals.pop()
        return None

    def compare(self, on: bool) -> Future:
        """Lets a twin with a memory in bf16 make the same blocks, or stops it.

        A twin that was stopped makes the blocks that it has missed, and a new one all of them.
        """

        def compare(walk):
            self.comparing = on
            if on and self._twin is None:
                self._twin = Twin(walk.world, walk.seed)
                self._say("busy", "compiling the bf16 memory ...")
                self._twin.follow(self._actions)
            return on

        return self._ask(None, compare)

    def switch(self, codec: str) -> Future:
        """`Walk.switch` between two blocks, and the keys after it."""

        def switch(walk):
            meter = walk.switch(codec)
            if points := self.points:  # the same block, in other codes
                self._note(points[-1]._replace(codec=codec, meter=meter))
            return meter

        return self._ask(f"changing to {codec} ...", switch)

    def restart(self, seed: int) -> Future:
        """`Walk.restart` between two blocks; what was pressed is forgotten."""

        def restart(walk):
            walk.restart(seed)
            self.seen = self.truth = None
            with self._changed:
                self._points.clear()
                self._goals.clear()
            self._actions.clear()
            if self._twin is not None:
                self._twin.restart(seed)
            self._keys.clear()

        return self._ask("a new world ...", restart)

    def frames(self) -> Future:
        """`Walk.frames` between two blocks."""
        return self._ask(None, lambda walk: walk.frames())

    def _ask(self, word: str | None, function: Callable[[Walk], Any]) -> Future:
        future = Future()
        with self._changed:
            if self._closing:
                future.cancel()
            else:
                self._requests.append((future, word, function))
                self._changed.notify()
        return future

    def _run(self) -> None:
        self._say("starting", "compiling ...")
        while True:
            with self._changed:
                walk = self.walk
                touring = walk.blocks < walk.world.tour_blocks and not walk.broken
                request = action = None
                while not self._closing:
                    request = self._requests.popleft() if self._requests else None
                    if request or touring:
                        break
                    if (action := self._keys.next()) and not walk.broken:
                        break
                    if self.behind > 0:
                        break
                    if (action := self._next_back()) and not walk.broken:
                        break
                    self._changed.wait()
                if self._closing:
                    for future, _, _ in self._requests:
                        future.cancel()
                    return
            if request:
                self._answer(*request)
            elif touring or action:
                self._block(action)
            else:
                self._follow()

    def _answer(self, future: Future, word: str | None, function: Callable[[Walk], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if word:
            self._say("busy", word)
        try:
            result = function(self.walk)
        except Exception as error:  # whoever asked is told; the walk goes on
            future.set_exception(error)
        else:
            future.set_result(result)
        self._idle()

    def _follow(self) -> None:
        """Lets the twin make one block."""
        assert self._twin is not None
        try:
            self._twin.follow(self._actions)
        except Exception as error:  # the walk itself goes on
            log.error("the bf16 memory: %s", error)
            self.comparing, self._twin = False, None
        self._tell(None)

    def _known(self, view: Box) -> Share:
        """What of a view is in the memory, before the block that shows it is."""
        known = in_memory(self.points)
        return share(view, [(p.ground, p.real) for p in known if p.ground is not None])

    def _block(self, action: str | None) -> None:
        walk = self.walk
        begin = time.monotonic()
        try:
            seen = next(walk.tour()) if action is None else walk.step(action)
            self.truth = None
            if walk.world.truth:
                self.truth = walk.world.truth(walk.seed, seen.x)
        except Exception as error:
            # A state that was given to a step that failed is gone: only a new world helps.
            walk.broken = walk.broken or f"{type(error).__name__}: {error}"
            log.error("block %d: %s", walk.blocks, walk.broken)
            self._keys.clear()
        else:
            self.seen = seen
            if action is not None:
                self._actions.append(action)
            point = Point(seen.number, walk.codec, action is None, seen.place, seen.meter)
            if walk.world.views is not None:
                boxes = walk.world.views(seen.x)
                known = self._known(boxes[-1])
                point = point._replace(view=boxes[-1], ground=around(boxes), share=known)
            self._note(point)
            self._settle()
            self._tell(seen)
            if action is None:
                with self._changed:
                    left = self._tour_seconds - (time.monotonic() - begin)
                    if left > 0 and not self._closing and not self._requests:
                        self._changed.wait(left)
            return
        self._idle()

    def _idle(self) -> None:
        self._settle()
        self._tell(None)

    def _settle(self) -> None:
        walk = self.walk
        if walk.broken:
            self.phase, self.word = "ended", f"{walk.broken}. Save it, or start a new world."
        elif walk.blocks < walk.world.tour_blocks:
            self.phase, self.word = "tour", "a tour of real frames, for the memory to start with"
        else:
            self.phase, self.word = "ready", ""

    def _say(self, phase: str, word: str) -> None:
        self.phase, self.word = phase, word
        self._tell(None)
